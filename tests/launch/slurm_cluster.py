"""A cluster of Slurm on this machine, of one node: munged, slurmctld and slurmd in a folder. Needs root."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CPUS = 4
PATH = f"{os.environ['PATH']}:/usr/sbin"


class Cluster:
    """Enter it; `environment` leads Slurm's commands to it."""

    def __init__(self, folder: Path):
        self.folder, self._running = folder, list[subprocess.Popen[bytes]]()
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        host, socket_file = socket.gethostname(), self.folder / "munge" / "socket"
        (self.folder / "slurm.conf").write_text(
            f"""ClusterName=test
            SlurmctldHost={host}(127.0.0.1)
            SlurmUser=root
            SlurmctldPort={free_port()}
            SlurmdPort={free_port()}
            AuthType=auth/munge
            CredType=cred/munge
            AuthInfo=socket={socket_file},cred_expire=5
            StateSaveLocation={self.folder}/state
            SlurmdSpoolDir={self.folder}/spool
            SlurmctldPidFile={self.folder}/slurmctld.pid
            SlurmdPidFile={self.folder}/slurmd.pid
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            SelectType=select/cons_tres
            MpiDefault=none
            ReturnToService=2
            SlurmdParameters=config_overrides
            SchedulerParameters=sched_interval=1
            KillWait=30
            NodeName={host} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory=8000 State=UNKNOWN
            PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
            """
        )
        self._start("munged", "--foreground", "--force", f"--socket={socket_file}", f"--key-file={key}",
                    f"--log-file={self.folder}/munge/log", f"--pid-file={self.folder}/munge/pid",
                    f"--seed-file={self.folder}/munge/seed")  # fmt: skip
        self._start("slurmctld", "-D", "-c")
        self._start("slurmd", "-D", "-N", host)
        for _ in range(100):
            found = self.run("sinfo", "--noheader", "--format=%T", check=False)
            if found.stdout.strip() == "idle":
                return self
            time.sleep(0.2)
        logs = "\n".join(file.read_text()[-2000:] for file in self.folder.glob("*.log"))
        raise RuntimeError(f"the cluster is not there: {found}\n{logs}")

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, *words: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of Slurm, or one that calls it."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=check, cwd=cwd)

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, ..."""
        told = self.run("scontrol", "show", "job", job).stdout
        return told.split("JobState=")[1].split()[0]

    def wait(self, job: str, seconds: float) -> str:
        """The state that a job ends in."""
        until = time.monotonic() + seconds
        while (state := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            if time.monotonic() > until:
                raise TimeoutError(f"job {job} is {state} after {seconds} s")
            time.sleep(0.2)
        return state

    def _start(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.log").open("w") as log:
            self._running.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))
        time.sleep(0.5)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def is_installed() -> bool:
    """Whether there is all that it takes."""
    return os.geteuid() == 0 and all(shutil.which(name, path=PATH) for name in PROGRAMS)
