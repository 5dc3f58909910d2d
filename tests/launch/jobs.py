"""What tests of the TPU VM script say: where, what, and a command that can be taken away in mid-run."""

import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUEUED = ("compute", "tpus", "queued-resources")
SPOT = ("--type", "v5p-16", "--spot")
LEFT = "may still exist, and cost money: tpu_vm.py follow|stop|delete tpu --zone us-west4-a --project my-project"
TRAIN, DEMO = ("python", "-m", "mathscale_jax.train", "--config"), "configs/demo.yaml"
# Counts to `last` in a file, and goes on where it was; ends with 75 on SIGTERM, as training does. The file is replaced
# whole, for a TPU that is taken away kills at any instant, also between emptying a file and filling it.
COUNTING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
file, last = pathlib.Path(sys.argv[1] + "/" + pathlib.Path.home().name), int(sys.argv[2])
count = int(file.read_text()) if file.exists() else 0
print("begins at", count, flush=True)
while count < last:
    time.sleep(0.05)
    count += 1
    file.with_suffix(".new").write_text(str(count))
    file.with_suffix(".new").replace(file)
    print("count", count, flush=True)
"""


def wait_until(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
