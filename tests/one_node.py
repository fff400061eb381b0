"""A Slurm of one node, on this machine, for as long as a test needs it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "runuser")
_CONF = """
ClusterName=qatlab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for its credential to run out: two minutes by default.
AuthInfo=cred_expire=5
SchedulerParameters=sched_interval=2,batch_sched_delay=1
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What keeps a Slurm from being started here, "" where nothing does."""
    absent = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "a Slurm is started by root"


class Slurm:
    """Commands of a cluster of one node, started in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        conf = folder / "slurm.conf"
        ports = {"controller": _free_port(), "daemon": _free_port()}
        conf.write_text(_CONF.format(host=host, folder=folder, cpus=os.cpu_count(), **ports))
        self.environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        self.call("runuser", "-u", "munge", "--", "munged", "--force", check=False)  # one may run already
        self.call("slurmctld", "-f", str(conf))
        self.call("slurmd", "-f", str(conf))
        self.wait(lambda: "idle" in self.call("sinfo", "-h", "-o", "%T"), 30)

    def call(self, *command: str, check: bool = True, **given: str) -> str:
        """What a command prints."""
        environment = {**self.environment, **given}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=self.folder)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def fact(self, job: str, name: str) -> str:
        """What the controller knows of a job, such as its JobState."""
        shown = self.call("scontrol", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def ended(self, job: str, seconds: float) -> str:
        """The state that a job ends in."""
        self.wait(lambda: self.fact(job, "JobState") in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"), seconds)
        return self.fact(job, "JobState")

    def wait(self, until: object, seconds: float) -> None:
        """Wait for something to be true."""
        assert callable(until)
        deadline = time.monotonic() + seconds
        while not until():
            logs = [(path.name, path.read_text()[-2000:]) for path in self.folder.glob("*.log")]
            assert time.monotonic() < deadline, logs
            time.sleep(0.5)

    def stop(self) -> None:
        """End the daemons; munged stays, as another may use it."""
        self.call("scancel", "--user=root", check=False)
        for name in ("slurmd", "slurmctld"):
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
