"""What a dry run of the TPU VM script shows: every call, what it is for, and what is paid for."""

import pytest
from jobs import SPOT

PLACE = ("--project", "my-project", "--zone", "us-west4-a")
DRY = (*PLACE, "--dry-run")


@pytest.mark.parametrize(
    ("command", "call", "purpose"),
    [
        ("stop", "worker.sh stop", "# ask the command to end"),
        ("status", "worker.sh state", "# what is there, and what runs on it?"),
        ("follow", "mathscale/run/log", "# gather the logs"),
        ("setup", "tpu-vm scp", "# bring this checkout"),
        ("delete", "queued-resources delete tpu", "# delete the TPU"),
    ],
)
def test_a_dry_run_of_a_single_step_shows_what_it_does(cloud, command, call, purpose):
    ended = cloud.launch(command, "tpu", *DRY)
    assert ended.returncode == 0 and call in ended.stdout and purpose in ended.stdout and not cloud.calls()


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (("job",), ("python", "-c", "0", "gs://b/x")),
        (("job", "--hours", "2", "--slices", "2"), ("python", "-c", "0", "gs://b/x")),
        (("create",), ()),
        (("delete",), ()),
    ],
)
def test_a_dry_run_shows_the_kinds_of_call_that_a_run_makes_and_makes_none(cloud, words, flags):
    """In the order in which a run comes to them first, but for those that ask for login and defaults."""
    name, *options = words
    rented = SPOT if name in ("job", "create") else ()
    command = (name, "tpu", *rented, *options, *PLACE)
    behind = ("--", *flags) if flags else ()
    dry = cloud.launch(*command, "--dry-run", *behind)
    assert dry.returncode == 0 and not cloud.calls(), dry.stderr
    if name == "delete":
        assert cloud.launch("create", "tpu", *SPOT, *PLACE).returncode == 0
    before = len(cloud.calls())
    cloud.says(nodes=["tpu-0", "tpu-1"] if "--slices" in words else ["tpu"])
    real = cloud.launch(*command, *behind)
    assert real.returncode == 0, real.stderr
    made = [call for call in cloud.calls()[before:] if call[0] not in ("auth", "config")]
    shown = [line.split()[1:] for line in dry.stdout.splitlines() if line.startswith("gcloud ")]
    assert kinds(shown) == kinds(made)


def kinds(calls):
    return list(dict.fromkeys(tuple(call[:4] if call[0] == "compute" else call[:3]) for call in calls))


def test_a_dry_run_whose_reader_has_gone_ends_well(cloud):
    with cloud.begin("job", "tpu", *SPOT, *DRY, "--", "x", "gs://b/x") as job:
        job.stdout.close()
        assert job.wait() == 0 and not job.stderr.read()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            (),
            [
                "1 x v5p-16 of 8 chips, 2 workers; spot, in us-west4-a",
                "waits for at most 24 hours,",
                "--hours sets a limit",
            ],
        ),
        (
            ("--hours", "2", "--slices", "3"),
            [
                "3 x v5p-16 of 8 chips, 2 workers each;",
                "all is over after 2 hours",
                "waits for at most 2 hours,",
                "at most 52 chip-hours",
            ],
        ),
        (
            ("--keep", "--wait", "0.5", "--restarts", "1"),
            ["0.5 hours", "at most 1 time (", "# paid for until you delete it (--keep)"],
        ),
        (("--keep", "--hours", "1"), ["told to stop after 1 hour (--hours); paid for until you delete it (--keep)"]),
    ],
)
def test_a_dry_run_says_what_a_job_takes_and_how_long_it_is_paid_for(cloud, flags, told):
    """52 chip-hours: 3 slices of 8 chips, 2 hours, and 10 minutes to save and end."""
    ended = cloud.launch("job", "tpu", *SPOT, *DRY, *flags, "--", "python", "gs://b/x", poll=20)
    summary = ended.stdout.split("gcloud")[0]
    assert all(text in summary for text in told), ended.stdout


def test_a_dry_run_is_a_list_of_calls_in_which_all_else_is_a_comment(cloud):
    words = ("--task", "gsm8k", "--checkpoint", "gs://b/c", "--out", "gs://b/x")
    ended = cloud.launch("evaluate", "tpu", *SPOT, *DRY, "--", *words)
    lines = [line for line in ended.stdout.splitlines() if line]
    assert ended.returncode == 0 and all(line.startswith(("gcloud ", "# ")) for line in lines)
    create = [line for line in lines if "queued-resources create" in line]
    assert len(create) == 1 and ended.stdout.count("worker.sh start") == 3
    stages = [line for line in lines if line.startswith("# python -m eval")]
    assert stages == [
        "# python -m eval sample",
        "# python -m eval grade, on the first worker alone",
        "# python -m eval report, on the first worker alone",
    ]
