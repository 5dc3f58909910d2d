"""The TPU VM script against a gcloud that does what it is told, with workers that really run what they are told."""

import json
import os
import re
import signal

import pytest
from jobs import COUNTING, LEFT, QUEUED, ROOT, SPOT, wait_until


def test_a_tpu_that_is_taken_away_is_made_again_and_the_run_goes_on_to_its_end(cloud, program, tmp_path):
    cloud.says(take_away={"worker.sh state [0-9]": [1, 8]})
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    command = ("python", str(program(COUNTING)), str(bucket), "40", "gs://bucket/run")
    ended = cloud.launch("job", "tpu", *SPOT, "--", *command)
    assert ended.returncode == 0, ended.stderr
    assert [(bucket / f"tpu-{i}").read_text() for i in (0, 1)] == ["40", "40"]
    creations = cloud.calls(*QUEUED, "create")
    assert len(creations) == 2 and creations[0] == creations[1]
    for flag in ("--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--spot", "--node-id=tpu"):
        assert flag in creations[0]
    assert cloud.state() is None
    assert "tpu was taken away: making it again" in ended.stderr and "tpu is deleted" in ended.stderr
    assert LEFT not in ended.stderr
    begun = [int(line.split()[-1]) for line in ended.stdout.splitlines() if line.startswith("begins at")]
    assert begun[0] == 0 and 0 < begun[1] < 40, "the second TPU goes on from what the first one saved"
    second = [int(line.split()[-1]) for line in ended.stdout.rpartition("begins at")[2].splitlines()]
    assert second == [begun[1], *range(begun[1] + 1, 41)], "its output is shown whole, and once"
    (logs,) = (cloud.checkout / "runs" / "launch" / "tpu").iterdir()
    assert {file.name for file in logs.iterdir()} == {"tpu-worker-0.log", "tpu-worker-1.log"}
    assert (logs / "tpu-worker-1.log").read_text().endswith("count 40\n")
    installed = (cloud.home() / "uv.log").read_text()
    assert "-c constraints.txt -e .[tpu,gcs]" in installed


@pytest.mark.parametrize(
    "trouble",
    [
        {"fail": {"queued-resources create": [1, "UNAVAILABLE: try again", [2, 3]]}},
        {"first_states": {"2": "FAILED"}},
    ],
    ids=["refused", "failed"],
)
def test_a_tpu_that_cannot_be_made_again_at_once_is_made_later(cloud, program, tmp_path, trouble):
    cloud.says(take_away={"worker.sh state [0-9]": [1, 6]}, **trouble)
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", str(program(COUNTING)), str(tmp_path), "40", "gs://b/run")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "tpu-1").read_text() == "40" and cloud.state() is None
    assert "somebody else" not in ended.stderr and LEFT not in ended.stderr


def test_a_job_that_waits_for_its_tpu_to_be_made_again_ends_where_somebody_deletes_it(cloud, program, tmp_path):
    cloud.says(take_away={"worker.sh state [0-9]": [1, 4]}, first_states={"2": "ACCEPTED"})
    job = cloud.begin("job", "tpu", *SPOT, "--", "python", str(program(COUNTING)), str(tmp_path), "999", "gs://b/run")
    wait_until(lambda: cloud.calls(*QUEUED, "create")[1:] and cloud.state() == "ACCEPTED")
    assert cloud.launch("delete", "tpu").returncode == 0
    _, said = job.communicate(timeout=30)
    assert job.returncode == 75 and "tpu was deleted by somebody else" in said
    assert len(cloud.calls(*QUEUED, "create")) == 2 and cloud.state() is None


def test_one_worker_that_is_not_reached_is_replaced_with_its_tpu(cloud, program, tmp_path):
    cloud.says(fail={"tpu-vm ssh .*worker=1 ": [255, "Connection timed out", 13]})
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", str(program(COUNTING)), str(tmp_path), "5", "gs://b/run")
    assert ended.returncode == 0, ended.stderr
    assert len(cloud.calls(*QUEUED, "create")) == 2 and "no worker was ever reached" not in ended.stderr


def test_a_tpu_that_is_never_made_again_ends_the_job_when_it_was_begun_again_as_often_as_it_may(
    cloud, program, tmp_path
):
    cloud.says(take_away={"worker.sh state [0-9]": [1, 4]},
               fail={"queued-resources create": [1, "UNAVAILABLE", list(range(2, 99))]})  # fmt: skip
    ended = cloud.launch(
        "job", "tpu", *SPOT, "--restarts", "3", "--", "python", str(program(COUNTING)), str(tmp_path), "999", "gs://b/r"
    )
    assert ended.returncode == 75 and "begun again 3 times (--restarts): given up" in ended.stderr
    assert len(cloud.calls(*QUEUED, "create")) == 1 + 3 and LEFT not in ended.stderr


def test_words_arrive_as_they_were_given(cloud, program, tmp_path):
    words = ["it's", 'a "b"', "$HOME `id` $(id) \\", "new\nline", "*", "; exit 3", "ümlaut", "", "a{shard}b", "--x=y z"]
    show = program(
        "import json, pathlib, sys\npathlib.Path.home().joinpath('words').write_text(json.dumps(sys.argv[1:]))"
    )
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", str(show), "gs://bucket/x", *words)
    assert ended.returncode == 0, ended.stderr
    for number in (0, 1):
        words[8] = f"a{number}/2b"
        assert json.loads((cloud.home(1, f"tpu-{number}") / "words").read_text()) == ["gs://bucket/x", *words]


def test_a_command_that_asks_to_be_run_again_is_on_the_same_tpu(cloud, program, tmp_path):
    again = program("import pathlib, sys\nf = pathlib.Path.home() / 'runs'\nf.open('a').write('x')\n"
                    "sys.exit(75 if len(f.read_text()) < 3 else 0)")  # fmt: skip
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", str(again), "gs://bucket/x")
    assert ended.returncode == 0, ended.stderr
    assert (cloud.home() / "runs").read_text() == "xxx" and len(cloud.calls(*QUEUED, "create")) == 1
    assert len((cloud.home() / "uv.log").read_text().splitlines()) == 2, "what is installed is not installed again"


def test_restarts_are_bounded_and_nothing_is_left(cloud, program):
    ended = cloud.launch(
        "job", "tpu", *SPOT, "--restarts", "2", "--", "python", str(program("import sys; sys.exit(75)")), "gs://b/x"
    )
    assert ended.returncode == 75 and "begun again 2 times (--restarts): given up" in ended.stderr
    assert cloud.state() is None and ended.stderr.count("beginning again") == 2


def test_a_command_that_fails_is_shown_and_not_begun_again(cloud, program):
    wrong = program(
        "import pathlib, sys, time\n"
        "if pathlib.Path.home().name == 'tpu-1':\n    sys.exit('no such config')\n"
        "time.sleep(0.5); sys.exit(134)"
    )
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", str(wrong), "gs://bucket/x")
    assert ended.returncode == 1
    assert "worker tpu 1 ended with 1; the end of its output:\nno such config" in ended.stderr
    assert cloud.state() is None and len(cloud.calls(*QUEUED, "create")) == 1


def test_a_job_ends_with_its_hours(cloud, program, tmp_path):
    command = ("python", str(program(COUNTING)), str(tmp_path), "100000", "gs://bucket/run")
    ended = cloud.launch("job", "tpu", *SPOT, "--hours", "0.003", "--", *command)
    assert ended.returncode == 75 and "--hours 0.003 are over: stopping" in ended.stderr
    assert cloud.state() is None and "beginning again" not in ended.stderr


def test_a_command_that_does_not_end_when_its_hours_are_over_is_deleted_with_the_tpu(cloud, program):
    deaf = program("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)")
    ended = cloud.launch("job", "tpu", *SPOT, "--hours", "0.002", "--", "python", str(deaf), "gs://bucket/run")
    assert ended.returncode == 75 and "it does not end by itself" in ended.stderr and cloud.state() is None


def test_hours_count_while_a_tpu_is_waited_for(cloud):
    cloud.says(first_state="CREATING")
    ended = cloud.launch("job", "tpu", *SPOT, "--hours", "0.0003", "--", "true", "gs://bucket/run")
    assert ended.returncode == 75 and cloud.state() is None


@pytest.mark.parametrize("word", ["delete", "stop"])
def test_a_job_ends_where_somebody_else_ends_it(cloud, program, tmp_path, word):
    job = cloud.begin(
        "job", "tpu", *SPOT, "--", "python", str(program(COUNTING)), str(tmp_path), "100000", "gs://b/run"
    )
    wait_until((tmp_path / "tpu-1").exists)
    assert cloud.launch(word, "tpu").returncode == 0
    _, said = job.communicate(timeout=60)
    assert job.returncode == 75 and cloud.state() is None and len(cloud.calls(*QUEUED, "create")) == 1
    assert "beginning again" not in said.replace("beginning again (1 of at most 20)", "", 1)
    assert ("was deleted by somebody else" in said) == (word == "delete")


def test_of_two_jobs_of_one_name_the_last_one_has_it(cloud, program, tmp_path):
    command = ("--", "python", str(program(COUNTING)), str(tmp_path), "150", "gs://b/run")
    first = cloud.begin("job", "tpu", *SPOT, *command)
    wait_until((tmp_path / "tpu-1").exists)
    second = cloud.begin("job", "tpu", *SPOT, "--attach", *command)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75 and "another job follows tpu now" in said and LEFT not in said
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and out.endswith("count 150\n") and cloud.state() is None
    assert len(cloud.calls(*QUEUED, "create")) == 1


def test_another_command_than_the_one_that_runs_is_refused_and_harms_nothing(cloud, program, tmp_path):
    job = cloud.begin(
        "job", "tpu", *SPOT, "--", "python", str(program(COUNTING)), str(tmp_path), "100000", "gs://b/run"
    )
    wait_until((tmp_path / "tpu-1").exists)
    refused = cloud.launch("job", "tpu", *SPOT, "--attach", "--", "touch", "second", "gs://b/run")
    assert refused.returncode == 2 and "another command runs on tpu" in refused.stderr and LEFT in refused.stderr
    assert cloud.state() == "ACTIVE" and job.poll() is None
    job.send_signal(signal.SIGINT)
    assert LEFT in job.communicate(timeout=20)[1] and job.returncode == 130


def test_a_flake_of_the_network_costs_nothing(cloud, program, tmp_path):
    flake = {
        "worker=1 .*=bash [a-z/]*worker.sh state": [255, "Connection reset by peer", 2],
        "scp": [1, "curl: (56)", 1],
    }
    cloud.says(fail=flake)
    command = ("--", "python", str(program(COUNTING)), str(tmp_path), "40", "gs://b/run")
    ended = cloud.launch("job", "tpu", *SPOT, *command)
    assert ended.returncode == 0 and len(cloud.calls(*QUEUED, "create")) == 1


def test_a_look_that_finds_nothing_deletes_and_forgets_nothing(cloud, program, tmp_path):
    cloud.says(blind_looks=[2, 5, 6, 7, 8])
    again = program(
        "import pathlib, sys\nf = pathlib.Path.home() / 'runs'\nf.open('a').write('x')\n"
        "sys.exit(75 if len(f.read_text()) < 4 else 0)"
    )
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", str(again), "gs://bucket/x")
    assert ended.returncode == 0 and len(cloud.calls(*QUEUED, "create")) == 1 and cloud.state() is None


def test_a_failed_deletion_is_not_called_one_whatever_numbers_are_in_its_message(cloud):
    cloud.says(fail={"resources delete": [1, "INTERNAL: projects/orb-404912/x not found in cache", 10**6]})
    ended = cloud.launch("job", "tpu", *SPOT, "--", "true", "gs://bucket/x")
    assert ended.returncode == 1 and "is deleted" not in ended.stderr and LEFT in ended.stderr
    cloud.says()
    assert cloud.launch("delete", "tpu").returncode == 0
    nobody = cloud.launch("delete", "other")
    assert nobody.returncode == 1 and "there is no other in us-west4-a of my-project" in nobody.stderr


def test_a_start_that_reached_half_of_the_workers_is_finished(cloud, program, tmp_path):
    cloud.says(fail={"worker=1 .*worker.sh start": [255, "reset", 1]})
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", str(program(COUNTING)), str(tmp_path), "60", "gs://b/run")
    assert ended.returncode == 0, ended.stderr
    assert [(tmp_path / f"tpu-{i}").read_text() for i in (0, 1)] == ["60", "60"]
    begun = [log.read_text().count("begins at 0") for log in cloud.checkout.glob("runs/launch/tpu/*/*.log")]
    assert begun == [1, 1]


def test_a_network_that_is_away_ends_nothing(cloud, program, tmp_path):
    command = ("--", "python", str(program(COUNTING)), str(tmp_path), "120", "gs://b/run")
    job = cloud.begin("job", "tpu", *SPOT, *command)
    wait_until((tmp_path / "tpu-1").exists)
    cloud.says(fail={".": [1, "Unable to find the server", 25]})
    _, said = job.communicate(timeout=60)
    assert job.returncode == 0 and said.count("Unable to find the server") >= 1 and cloud.state() is None
    assert len(cloud.calls(*QUEUED, "create")) == 1


def test_a_tpu_that_a_person_has_taken_down_is_not_bought_again(cloud, program, tmp_path):
    cloud.says(take_away={"worker.sh state [0-9]": [1, 6]}, initiator="USER")
    ended = cloud.launch(
        "job", "tpu", *SPOT, "--", "python", str(program(COUNTING)), str(tmp_path), "999", "gs://b/run"
    )
    assert ended.returncode == 75 and "was deleted by somebody else" in ended.stderr
    assert len(cloud.calls(*QUEUED, "create")) == 1 and cloud.state() is None


def test_a_slice_that_is_not_whole_is_not_used(cloud):
    cloud.says(workers=1)
    ended = cloud.launch("job", "tpu", "--type", "v5litepod-16", "--", "true", "gs://b/run")
    assert ended.returncode == 1 and "has 1 worker of 1 slice, where 1 slice of v5litepod-16" in ended.stderr
    assert cloud.state() is None


def test_workers_that_were_all_told_to_stop_before_they_could_heed_it_begin_again(cloud, program):
    once = program(
        "import os, pathlib, signal\nf = pathlib.Path.home() / 'once'\n"
        "if not f.exists():\n    f.write_text('')\n    os.kill(os.getpid(), signal.SIGTERM)"
    )
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", str(once), "gs://b/run")
    assert ended.returncode == 0 and "beginning again (1 of" in ended.stderr


def test_workers_that_ended_before_a_job_was_gone_on_with_are_not_begun_again(cloud, program, tmp_path):
    uneven = program(
        "import pathlib, time\nhome = pathlib.Path.home()\n(home / 'runs').open('a').write('x')\n"
        "time.sleep(0 if home.name == 'tpu-0' else 6)"
    )
    command = ("--", "python", str(uneven), "gs://b/run")
    first = cloud.begin("job", "tpu", *SPOT, *command)
    wait_until((cloud.home(1, "tpu-1") / "runs").exists)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=30)
    assert cloud.launch("job", "tpu", *SPOT, "--attach", *command).returncode == 0
    assert [(cloud.home(1, f"tpu-{number}") / "runs").read_text() for number in (0, 1)] == ["x", "x"]


def test_an_evaluation_whose_grading_was_left_alone_goes_on_there(cloud, program):
    cloud.python_is("case \"$*\" in *'eval grade'*) sleep 4;; esac")
    words = ("evaluate", "tpu", *SPOT, "--", "--task", "gsm8k", "--checkpoint", "gs://b/c", "--out", "gs://b/eval")
    job = cloud.begin(*words)
    wait_until(lambda: "eval grade" in cloud.told())
    job.send_signal(signal.SIGINT)
    assert LEFT in job.communicate(timeout=30)[1]
    ended = cloud.launch("evaluate", "tpu", *SPOT, "--attach", *words[5:])
    assert ended.returncode == 0, ended.stderr
    told = cloud.told()
    assert told.count("eval sample") == 2 and told.count("eval grade") == 1 and told.count("eval report") == 1


@pytest.mark.parametrize("stage", ["WAITING_FOR_RESOURCES", "setting up", "count"])
def test_ctrl_c_leaves_what_there_is_and_names_it(cloud, program, tmp_path, stage):
    cloud.says(first_state="CREATING" if stage == "WAITING_FOR_RESOURCES" else "PROVISIONING",
               hang=["worker.sh install"] if stage == "setting up" else [])  # fmt: skip
    job = cloud.begin(
        "job", "tpu", *SPOT, "--", "python", str(program(COUNTING)), str(tmp_path), "100000", "gs://b/run"
    )
    calls = {"WAITING_FOR_RESOURCES": "resources create", "setting up": "sh install", "count": "sh state [0-9]"}
    wait_until(lambda: any(re.search(calls[stage], " ".join(call)) for call in cloud.calls()))
    job.send_signal(signal.SIGINT)
    said = job.communicate(timeout=30)[1]
    assert job.returncode == 130 and said.rstrip().endswith(LEFT) and "Traceback" not in said, said
    assert cloud.state() in ("CREATING", "ACTIVE")


def test_a_call_that_hangs_is_given_up(cloud, monkeypatch):
    cloud.says(hang=["print-access-token"])
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.setenv("PATH", f"{cloud.store / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("GCLOUD_STORE", str(cloud.store))
    from cloud_tpu import CloudError, Gcloud

    with pytest.raises(CloudError, match="gcloud auth print-access-token did not end in 1 s"):
        Gcloud("p", "z-a")("auth", "print-access-token", seconds=1)


def test_the_single_steps_and_what_a_stop_leaves(cloud, program, tmp_path):
    assert cloud.launch("create", "tpu", *SPOT).returncode == 0
    assert cloud.launch("setup", "tpu").returncode == 0
    command = ("python", str(program(COUNTING)), str(tmp_path), "100000")
    run = cloud.begin("run", "tpu", "--", *command)
    assert run.stdout is not None and run.stdout.readline() == "begins at 0\n"
    run.terminate()
    assert LEFT in run.communicate(timeout=20)[1], "it runs on, and is named"
    assert "tpu 0: running\ntpu 1: running" in cloud.launch("status", "tpu").stdout
    busy = cloud.launch("run", "tpu", "--", "python", "-c", "1")
    assert busy.returncode == 1 and "a command is running here" in busy.stderr
    busy = cloud.launch("setup", "tpu")
    assert busy.returncode == 0, "the same code is there"
    assert cloud.launch("stop", "tpu").returncode == 0
    followed = cloud.launch("follow", "tpu")
    assert followed.returncode == 75 and followed.stdout.startswith("begins at 0\ncount 1\n")
    assert LEFT in followed.stderr
    assert cloud.launch("delete", "tpu").returncode == 0 and cloud.state() is None
    assert "does not exist" in cloud.launch("status", "tpu").stderr


def test_a_job_goes_on_with_a_tpu_that_is_there_where_it_is_told_to(cloud, program, tmp_path):
    assert cloud.launch("create", "tpu", *SPOT).returncode == 0
    command = ("--", "python", str(program(COUNTING)), str(tmp_path), "5", "gs://bucket/run")
    refused = cloud.launch("job", "tpu", *SPOT, *command)
    assert refused.returncode == 2 and "tpu exists already (ACTIVE): add --attach" in refused.stderr
    assert LEFT in refused.stderr and cloud.state() == "ACTIVE"
    assert cloud.launch("job", "tpu", *SPOT, "--attach", *command).returncode == 0
    assert len(cloud.calls(*QUEUED, "create")) == 1 and cloud.state() is None


def test_slices_are_made_as_one_and_all_their_workers_run(cloud, program, tmp_path):
    cloud.says(nodes=["tpu-0", "tpu-1"])
    command = ("python", str(program(COUNTING)), str(tmp_path), "3", "gs://bucket/run")
    ended = cloud.launch("job", "tpu", "--type", "v5p-16", "--slices", "2", "--", *command)
    assert ended.returncode == 0, ended.stderr
    (creation,) = cloud.calls(*QUEUED, "create")
    assert {"--node-count=2", "--node-prefix=tpu"} < set(creation) and "--spot" not in creation
    assert all((tmp_path / f"tpu-{node}-{index}").read_text() == "3" for node in (0, 1) for index in (0, 1))


def test_an_evaluation_gives_each_worker_its_share_and_one_grades(cloud):
    told = cloud.store / "told"
    cloud.write_program("uv", f"""for last; do :; done; case $1 in venv) mkdir -p "$last/bin"
        printf '#!/bin/sh\\necho "$TPU_PROCESS_BOUNDS $@" >> {told}\\n' > "$last/bin/python"
        chmod +x "$last/bin/python";; esac""")  # fmt: skip
    (cloud.checkout / "launch" / "worker.sh").write_text(
        (cloud.checkout / "launch" / "worker.sh").read_text().replace("python - ", "cat - > /dev/null; echo ")
    )
    ended = cloud.launch(
        "evaluate", "tpu", *SPOT, "--", "--task", "gsm8k", "--checkpoint", "gs://b/c", "--out", "gs://b/eval"
    )
    assert ended.returncode == 0, ended.stderr
    sample = "1,1,1 -m eval sample --task gsm8k --checkpoint gs://b/c --out gs://b/eval --shard"
    lines = told.read_text().splitlines()
    assert sorted(lines[:2]) == [f"{sample} 0/2", f"{sample} 1/2"]
    assert lines[2:] == [" -m eval grade gs://b/eval", " -m eval report gs://b/eval"]
    refused = cloud.launch("evaluate", "tpu", *SPOT, "--", "--task", "gsm8k", "--out", "runs/eval")
    assert refused.returncode == 2 and "evaluate needs --out gs://" in refused.stderr


def test_workers_of_other_versions_are_refused(cloud):
    assert cloud.launch("create", "tpu", *SPOT).returncode == 0
    assert cloud.launch("setup", "tpu").returncode == 0
    (cloud.home(1, "tpu-1") / "mathscale" / "digest").write_text("other\n")
    refused = cloud.launch("run", "tpu", "--", "python", "-c", "1")
    assert refused.returncode == 1
    assert "worker tpu 1 has other versions than worker tpu 0:\n" in refused.stderr and "`setup NAME`" in refused.stderr
    assert cloud.launch("setup", "tpu").returncode == 0 and cloud.launch("run", "tpu", "--", "true").returncode == 0


def test_a_worker_whose_machine_was_started_anew_begins_again(cloud, program, tmp_path):
    assert cloud.launch("create", "tpu", *SPOT).returncode == 0 and cloud.launch("setup", "tpu").returncode == 0
    assert cloud.launch("run", "tpu", "--", "sleep", "0").returncode == 0
    for number in (0, 1):
        run = cloud.home(1, f"tpu-{number}") / "mathscale" / "run"
        (run / "code").unlink()
        (run / "boot").write_text("before")
    assert "tpu 0: lost" in cloud.launch("status", "tpu").stdout
    assert cloud.launch("follow", "tpu").returncode == 75
