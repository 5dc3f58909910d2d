"""A `gcloud` that has one project, and does with a TPU what a script says; its workers are folders on this machine.

In the folder that GCLOUD_STORE names: `script.json` (what happens), `state.json` (what exists), `calls.jsonl` (what was
asked), and `workers/LIFE/NODE-INDEX`, the home folders of the workers of the LIFE-th TPU.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

STORE = Path(os.environ["GCLOUD_STORE"])
ORDER = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def main(arguments):
    with (STORE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (STORE / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps(arguments) + "\n")
        script = json.loads((STORE / "script.json").read_text())
        file = STORE / "state.json"
        state = json.loads(file.read_text()) if file.exists() else {"tpu": None, "life": 0, "count": {}}
        whole = " ".join(arguments)
        for pattern, (code, said, times) in script.get("fail", {}).items():
            count = state["count"][pattern] = state["count"].get(pattern, 0) + bool(re.search(pattern, whole))
            if re.search(pattern, whole) and count <= times:
                file.write_text(json.dumps(state))
                fail(said, code)
        for pattern, (life, number) in script.get("take_away", {}).items():  # at the number-th such call of this life
            if re.search(pattern, whole) and state["life"] == life and state["tpu"]:
                count = state["count"][f"{pattern} {life}"] = state["count"].get(f"{pattern} {life}", 0) + 1
                if count == number:
                    state["tpu"] = "SUSPENDED"
                    end_workers(life)
        file.write_text(json.dumps(state))
        act = answer(arguments, script, state)
        file.write_text(json.dumps(state))
    if act is not None:
        sys.exit(act())


def answer(arguments, script, state):
    """Prints; or gives what is done without the lock."""
    names = [word for word in arguments if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    nodes = script.get("nodes", ["tpu"])
    match names:
        case ["auth", "print-access-token"]:
            print("token")
        case ["config", "get-value", key]:
            print(script.get(key, "(unset)"))
        case ["storage", "buckets", "describe", _]:
            print(script.get("location", "US-WEST4"))
        case ["compute", "tpus", "queued-resources", "create", _]:
            if state["tpu"]:
                fail("ALREADY_EXISTS: the resource exists", 1)
            state["life"] += 1
            state["tpu"] = script.get("first_state", ORDER[0])
        case ["compute", "tpus", "queued-resources", "list"]:
            if state["tpu"]:
                print(state["tpu"])
            if state["tpu"] in ORDER:
                state["tpu"] = ORDER[min(ORDER.index(state["tpu"]) + 1, 2)]
        case ["compute", "tpus", "queued-resources", "describe", _]:
            print("no such accelerator here")
        case ["compute", "tpus", "queued-resources", "delete", _]:
            end_workers(state["life"])
            state["tpu"] = None
        case ["compute", "tpus", "tpu-vm", "list"]:
            for node in nodes if state["tpu"] == "ACTIVE" else []:
                print(node, script.get("workers", 2))
        case ["compute", "tpus", "tpu-vm", "ssh", node]:
            home = worker(state, node, flags["worker"])
            environment = os.environ | {"HOME": str(home), "PATH": f"{STORE / 'bin'}:{os.environ['PATH']}"}
            return lambda: subprocess.run(["sh", "-c", flags["command"]], cwd=home, env=environment).returncode
        case ["compute", "tpus", "tpu-vm", "scp", source, target]:
            node, _, name = target.partition(":")
            shutil.copy(source, worker(state, node, flags["worker"]) / name)
        case _:
            fail(f"unknown command: {arguments}", 2)


def worker(state, node, index):
    if state["tpu"] != "ACTIVE":
        fail("ssh: connect to host: Connection timed out", 255)
    home = STORE / "workers" / str(state["life"]) / f"{node}-{index}"
    home.mkdir(parents=True, exist_ok=True)
    return home


def end_workers(life):
    for pid in (STORE / "workers" / str(life)).glob("*/mathscale/run/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def fail(said, code):
    print(said, file=sys.stderr)
    sys.exit(code)


main(sys.argv[1:])
