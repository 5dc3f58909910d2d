"""Whose a TPU is, and what is on it: two jobs with one TPU, workers that a job lost, looks that come amiss."""

import os
import signal

import pytest
from jobs import QUEUED, SPOT, wait_until


def test_a_job_whose_tpu_another_has_made_again_leaves_it_to_that_one(cloud, program, tmp_path):
    """The first learns that it was taken away while it waits for it, and wakes when the second follows the new one."""
    text = f"""
import pathlib, sys, time
if '/workers/1/' in str(pathlib.Path.home()):
    sys.exit(143)
pathlib.Path({str(tmp_path / "begun")!r}).touch()
while not pathlib.Path({str(tmp_path / "end")!r}).exists():
    time.sleep(0.05)
"""
    command = ("--", "python", str(program(text)), "gs://b/run")
    # Looks of its first life: three until it is ACTIVE, at its end, before it begins again, and while it waits then.
    cloud.says(take_away={"queued-resources list": [1, 6]})
    first = cloud.begin("job", "tpu", *SPOT, "--keep", *command, poll=1)
    said = ""
    while "beginning again (2 of" not in said and first.poll() is None:
        said += first.stderr.readline()
    os.kill(first.pid, signal.SIGSTOP)
    assert cloud.state() == "SUSPENDING"
    second = cloud.begin("job", "tpu", *SPOT, "--attach", *command)
    wait_until((tmp_path / "begun").exists)
    os.kill(first.pid, signal.SIGCONT)
    said += first.communicate(timeout=60)[1]
    assert first.returncode == 75 and "another job follows tpu now: it is left to that one" in said, said
    (tmp_path / "end").touch()
    assert second.communicate(timeout=60) and second.returncode == 0 and cloud.state() is None


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


@pytest.mark.parametrize("blind", [[7], [7, 8, 9], [2]], ids=["begun again", "several times", "gone on with"])
def test_looks_that_find_nothing_ask_for_no_second_tpu(cloud, program, blind):
    """Looks: of the command itself, before it is asked for, three until it is ACTIVE, at the end; then begun again."""
    command = ("--", "python", ends_with_143_at_first(program), "gs://b/run")
    if blind == [2]:  # of the job that goes on
        assert cloud.launch("create", "tpu", *SPOT).returncode == 0
        cloud.says(
            blind_looks=[len(cloud.calls(*QUEUED, "list")) + look for look in (1, 3, 5)]
        )  # each look is followed by another
        ended = cloud.launch("job", "tpu", *SPOT, "--attach", *command)
    else:
        cloud.says(blind_looks=blind)
        ended = cloud.launch("job", "tpu", *SPOT, *command)
    assert ended.returncode == 0 and "beginning again (1 of at most 20)" in ended.stderr, ended.stderr
    assert len(cloud.calls(*QUEUED, "create")) == 1 and "error" not in ended.stderr and cloud.state() is None
