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
import time
from pathlib import Path

STORE = Path(os.environ["GCLOUD_STORE"])
ORDER = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def main(arguments):
    if arguments[0] == "alpha":
        arguments = arguments[1:]
    act = None
    with (STORE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (STORE / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps(arguments) + "\n")
        script = json.loads((STORE / "script.json").read_text())
        file = STORE / "state.json"
        state = json.loads(file.read_text()) if file.exists() else {"tpus": {}, "life": 0, "count": {}, "looks": 0}
        whole = " ".join(arguments)
        said = None
        for pattern, (code, text, times) in script.get("fail", {}).items():  # the first so many times, or at these
            if re.search(pattern, whole):
                count = state["count"][pattern] = state["count"].get(pattern, 0) + 1
                said = (text, code) if (count in times if isinstance(times, list) else count <= times) else said
        for pattern, (life, number) in script.get("take_away", {}).items():  # at the number-th such call of this life
            if re.search(pattern, whole) and state["life"] == life and state["tpus"]:
                count = state["count"][f"{pattern} {life}"] = state["count"].get(f"{pattern} {life}", 0) + 1
                if count == number:
                    state["tpus"] = dict.fromkeys(state["tpus"], "SUSPENDING")
                    end_workers(life)
        try:
            if said is not None:
                fail(*said)
            act = answer(arguments, script, state)
        finally:
            written = STORE / "state.new"
            written.write_text(json.dumps(state))
            written.replace(file)
    if any(re.search(pattern, whole) for pattern in script.get("hang", [])):
        time.sleep(3600)
    if act is not None:
        sys.exit(act())


def answer(arguments, script, state):
    """Prints; or gives what is done without the lock."""
    names = [word for word in arguments if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    tpus = state["tpus"]

    def demand(**expected):
        """Real gcloud asks where a flag is missing, refuses unknown ones, and means something else by other values."""
        for name, pattern in ({"zone": "us-west4-a", "project": "my-project", "quiet": ""} | expected).items():
            name = name.replace("_", "-")
            if name not in flags or not re.fullmatch(pattern, flags[name]):
                fail(f"ERROR: (gcloud) --{name}={flags.get(name)}: expected {pattern}", 2)
        others = flags.keys() - {"zone", "project", "quiet"} - {name.replace("_", "-") for name in expected}
        if unknown := others - {"spot", "reserved"}:
            fail(f"ERROR: (gcloud) unrecognized arguments: {unknown}", 2)

    match names:
        case ["auth", "print-access-token"]:
            print("token")
        case ["config", "get-value", key]:
            print(script.get(key, "(unset)"))
        case ["storage", "buckets", "describe", _]:
            print(script.get("location", "US-WEST4"))
        case ["compute", "tpus", "queued-resources", "create", name]:
            several = {"node_count": r"\d+", "node_prefix": name} if "node-count" in flags else {"node_id": name}
            demand(
                accelerator_type=".+-.+", runtime_version=".+", valid_until_duration=r"\d+s", **{"async": ""}, **several
            )
            if name in tpus:
                fail("ALREADY_EXISTS: the resource exists", 1)
            state["life"] += 1
            tpus[name] = script.get("first_states", {}).get(str(state["life"]), script.get("first_state", ORDER[0]))
        case ["compute", "tpus", "queued-resources", "list"]:
            name = flags["filter"].removeprefix("name~/").removesuffix("$")
            demand(filter=rf"name~/{name}\$", format=r"value\(state\.state,state\.stateInitiator\)")
            state["looks"] += 1
            if state["looks"] in script.get("blind_looks", []):
                return None
            if name in tpus:
                print(tpus[name], script.get("initiator", "SERVICE"), sep="\t")
                if tpus[name] in ORDER:
                    tpus[name] = ORDER[min(ORDER.index(tpus[name]) + 1, 2)]
                if tpus[name] == "SUSPENDING" and state["looks"] % 3 == 0:
                    tpus[name] = "SUSPENDED"
        case ["compute", "tpus", "queued-resources", "describe", _]:
            demand(format=r"value\(state\.failedData\.error\.message\)")
            print("no such accelerator here")
        case ["compute", "tpus", "queued-resources", "delete", name]:
            demand(force="")
            if name not in tpus:
                fail("NOT_FOUND: there is none", 1)
            if tpus[name] == "SUSPENDING":
                fail("FAILED_PRECONDITION: it is being suspended", 1)
            end_workers(state["life"])
            del tpus[name]
        case ["compute", "tpus", "tpu-vm", "list"]:
            name = flags["filter"].removeprefix("queuedResource~/").removesuffix("$")
            columns = r'csv\[no-heading,separator=" "\]\(name\.basename\(\),networkEndpoints\.len\(\)\)'
            demand(filter=rf"queuedResource~/{name}\$", format=columns)
            for node in script.get("nodes", [name]) if tpus.get(name) == "ACTIVE" else []:
                print(node, script.get("workers", 2))
        case ["compute", "tpus", "tpu-vm", "ssh", node]:
            demand(
                worker=r"\d+", strict_host_key_checking="no", command=r"(?s:.+)", ssh_flag="-oServerAliveInterval=15"
            )
            home = worker(state, node, flags["worker"])
            environment = os.environ | {"HOME": str(home), "PATH": f"{STORE / 'bin'}:{os.environ['PATH']}"}
            return lambda: subprocess.run(["sh", "-c", flags["command"]], cwd=home, env=environment).returncode
        case ["compute", "tpus", "tpu-vm", "scp", source, target]:
            demand(worker=r"\d+", strict_host_key_checking="no")
            node, _, name = target.partition(":")
            shutil.copy(source, worker(state, node, flags["worker"]) / name)
        case _:
            fail(f"unknown command: {arguments}", 2)


def worker(state, node, index):
    owners = [
        name for name, stands in state["tpus"].items() if stands == "ACTIVE" and re.fullmatch(rf"{name}(-\d+)?", node)
    ]
    if not owners:
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
