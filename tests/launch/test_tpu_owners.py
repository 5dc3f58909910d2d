"""Whose a TPU is, and what is on it: two jobs with one TPU, workers that a job lost, looks that come amiss."""

import json
import os
import signal
import subprocess
import sys

import pytest
from jobs import COUNTING, LEFT, QUEUED, ROOT, SPOT, wait_until

RUNS = """
import pathlib, sys, time
if '/workers/1/' in str(pathlib.Path.home()):
    sys.exit(143)
pathlib.Path(sys.argv[1] + '/begun').touch()
while not pathlib.Path(sys.argv[1] + '/end').exists():
    time.sleep(0.05)
"""  # ends at once on a first TPU


def held_at(job, text):
    """What a job has said up to `text`, at which it is stopped."""
    said = ""
    while text not in said and job.poll() is None:
        said += job.stderr.readline()
    job.send_signal(signal.SIGSTOP)
    return said


def goes_on(job, said):
    job.send_signal(signal.SIGCONT)
    return said + job.communicate(timeout=60)[1]


@pytest.mark.parametrize(("kind", "workers"), [("v5p-16", 2), ("v5p-32", 4)], ids=["alike", "of another size"])
def test_a_job_whose_tpu_another_has_made_again_leaves_it_to_that_one(cloud, program, tmp_path, kind, workers):
    """The first learns that it was taken away while it waits for it, and wakes when the second follows the new one."""
    command = ("--", "python", str(program(RUNS)), str(tmp_path), "gs://b/run")
    # Looks of its first life: three until it is ACTIVE, at its end, before it begins again, and while it waits then.
    cloud.says(take_away={"queued-resources list": [1, 6]})
    first = cloud.begin("job", "tpu", *SPOT, "--keep", *command, poll=1)
    said = held_at(first, "beginning again (2 of")
    assert cloud.state() == "SUSPENDING"
    cloud.says(workers=workers)
    second = cloud.begin("job", "tpu", "--type", kind, "--attach", *command)
    wait_until((tmp_path / "begun").exists)
    said = goes_on(first, said)
    assert first.returncode == 75 and "another job follows tpu now: it is left to that one" in said, said
    (tmp_path / "end").touch()
    assert second.communicate(timeout=60) and second.returncode == 0 and cloud.state() is None


def test_a_job_that_cannot_make_its_tpu_again_leaves_one_that_another_has_made_under_its_name(cloud, program, tmp_path):
    command = ("--", "python", str(program(RUNS)), str(tmp_path), "gs://b/run")
    cloud.says(take_away={"queued-resources list": [1, 4]}, fail={"resources create": [1, "RESOURCE_EXHAUSTED", [2]]})
    first = cloud.begin("job", "tpu", *SPOT, *command, poll=1)
    said = held_at(first, "beginning again (2 of")
    assert cloud.state() is None and "RESOURCE_EXHAUSTED" in said, said
    cloud.says()
    second = cloud.begin("job", "tpu", *SPOT, *command)
    wait_until((tmp_path / "begun").exists)
    said = goes_on(first, said)
    assert first.returncode == 2 and "tpu was made by somebody else meanwhile" in said and LEFT in said, said
    (tmp_path / "end").touch()
    assert second.communicate(timeout=60) and second.returncode == 0 and cloud.state() is None


def test_a_tpu_that_a_job_neither_asked_for_nor_followed_is_left(cloud):
    """It waits still when the job goes on with it, and is of another type than is said."""
    assert cloud.launch("create", "tpu", *SPOT).returncode == 0
    state = json.loads((cloud.store / "state.json").read_text())
    (cloud.store / "state.json").write_text(json.dumps(state | {"tpus": {"tpu": "WAITING_FOR_RESOURCES"}}))
    ended = cloud.launch("job", "tpu", "--type", "v5p-32", "--attach", "--", "true", "gs://b/run")
    assert ended.returncode == 1 and "neither asked for it nor followed it" in ended.stderr and LEFT in ended.stderr
    assert cloud.state() == "ACTIVE"


def test_a_worker_that_has_lost_its_home_is_set_up_anew(cloud, program, tmp_path):
    command = ("--", "python", str(program(COUNTING)), str(tmp_path), "60", "gs://b/run")
    job = cloud.begin("job", "tpu", *SPOT, *command)
    wait_until((tmp_path / "tpu-0").exists)
    home = cloud.home(1, "tpu-0")
    (home / "mathscale").rename(home / "lost")
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 0 and "another job" not in said and "nothing was started on some workers" in said, said
    assert len(cloud.calls(*QUEUED, "create")) == 1 and cloud.state() is None


def test_troubles_of_one_stage_cost_no_tpu_at_the_next(cloud):
    cloud.python_is("exit 0")
    cloud.says(fail={"worker=0 .*worker.sh start": [255, "reset", [1, 2]]})
    words = ("--task", "gsm8k", "--checkpoint", "gs://b/c", "--out", "gs://b/eval")
    ended = cloud.launch("evaluate", "tpu", *SPOT, "--", *words)
    assert ended.returncode == 0 and cloud.state() is None, ended.stderr
    assert len(cloud.calls(*QUEUED, "create")) == 2  # after two starts that failed, and never again
    assert cloud.told().count("eval grade") == cloud.told().count("eval report") == 1


def test_a_look_that_fails_after_the_jobs_own_deletion_is_no_end(cloud, program, tmp_path):
    command = ("--", "python", str(program(RUNS)), str(tmp_path), "gs://b/run")
    (tmp_path / "end").touch()
    # Looks: of the command, of the job, three until it is ACTIVE, at its end, one that finds it gone: and then deleted.
    cloud.says(take_away={"queued-resources list": [1, 4]}, fail={"queued-resources list": [1, "no network", [8]]})
    ended = cloud.launch("job", "tpu", *SPOT, *command)
    assert ended.returncode == 0 and "error: gcloud compute tpus queued-resources list failed" in ended.stderr
    assert "deleted by somebody else" not in ended.stderr and len(cloud.calls(*QUEUED, "create")) == 2


def test_a_call_has_time_when_hours_are_long_over_too(tmp_path):
    """A minute, with looks every 20 seconds: gcloud takes more than one second."""
    (tmp_path / "gcloud").write_text("#!/bin/sh\nsleep 1.5; echo said")
    (tmp_path / "gcloud").chmod(0o755)
    script = "from gcloud_cli import Gcloud; c = Gcloud('p', 'z'); c.seconds_left = lambda: -100.0; print(c('x'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "launch", capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MATHSCALE_POLL": "20"},
    )  # fmt: skip
    assert done.stdout == "said\n", done.stderr


def test_workers_that_a_second_start_did_not_reach_are_begun_again_while_the_others_run(cloud, program, tmp_path):
    """What they show is the end of the first start of the same command."""
    text = f"""
import pathlib, sys, time
runs = pathlib.Path.home() / 'runs'
runs.open('a').write('x')
if runs.read_text() == 'x':
    sys.exit(143)
while not pathlib.Path({str(tmp_path / "end")!r}).exists():
    time.sleep(0.05)
"""
    cloud.says(fail={"worker=1 .*worker.sh start": [255, "reset", [2]]})
    job = cloud.begin("job", "tpu", *SPOT, "--", "python", str(program(text)), "gs://b/run")
    runs = [cloud.home(1, f"tpu-{number}") / "runs" for number in (0, 1)]
    wait_until(lambda: all(run.exists() and run.read_text() == "xx" for run in runs))
    (tmp_path / "end").touch()
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 0 and "beginning again (2 of" in said and "beginning again (3 of" not in said, said


def ends_with_143_at_first(program):
    text = "import pathlib, sys; f = pathlib.Path.home() / 'begun'; sys.exit(0 if f.exists() else f.touch() or 143)"
    return str(program(text))


@pytest.mark.parametrize("blind", [[7], [7, 8, 9]])
def test_looks_that_find_nothing_ask_for_no_second_tpu(cloud, program, blind):
    """Looks: of the command itself, before it is asked for, three until it is ACTIVE, at the end; then begun again."""
    cloud.says(blind_looks=blind)
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", ends_with_143_at_first(program), "gs://b/run")
    assert ended.returncode == 0 and "beginning again (1 of at most 20)" in ended.stderr, ended.stderr
    assert len(cloud.calls(*QUEUED, "create")) == 1 and "error" not in ended.stderr and cloud.state() is None


def test_looks_that_find_nothing_ask_for_no_tpu_where_one_is_gone_on_with(cloud, program):
    """Each of its first three looks finds nothing, and is followed by another that does."""
    assert cloud.launch("create", "tpu", *SPOT).returncode == 0
    before = len(cloud.calls(*QUEUED, "list"))
    cloud.says(blind_looks=[before + 1, before + 3, before + 5])
    ended = cloud.launch("job", "tpu", *SPOT, "--attach", "--", "python", ends_with_143_at_first(program), "gs://b/run")
    assert ended.returncode == 0 and len(cloud.calls(*QUEUED, "create")) == 1, ended.stderr
    assert "error" not in ended.stderr and cloud.state() is None
