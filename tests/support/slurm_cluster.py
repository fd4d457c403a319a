"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, out of a temporary folder.

Debian's packages have all it needs: slurm-wlm, munge. It starts as root and is gone after `stop`.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from nemo_cpt.executors import window

NODES = ("cpt1", "cpt2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")

CONFIG = """
ClusterName=cpt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters={shares}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=20
MinJobAge={remembers}
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 State=UP
PartitionName=patient Nodes=ALL MaxTime=60 PriorityTier=1 GraceTime=30 State=UP
PartitionName=short Nodes=ALL DefaultTime=1 MaxTime=60 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 State=UP
"""


def missing() -> str:
    """Return why no cluster can be started here, or an empty string."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd and slurmctld need root"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_job() -> int:
    """A cluster's first job id: Lightning makes the port where a job's tasks meet of its last four digits, and the
    clusters of other workers run on this machine, too.
    """
    return 1 + 3000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 3)


class SlurmCluster:
    """The daemons and their folder; `environ` is what clients need to reach them.

    Args:
        folder: where all of it lies.
        shares: Slurm's SelectTypeParameters, what of a node jobs share out.
        memory: MB that each node says it has.
        remembers: seconds after which it forgets a job that has ended; no test takes as long. Slurm makes 2 of 0.
    """

    def __init__(self, folder: Path, shares: str = "CR_Core", memory: int = 4000, remembers: int = 36000) -> None:
        self.folder, self.shares, self.memory, self.remembers = folder, shares, memory, remembers
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "SlurmCluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self._write_config()
        self._start_munge()
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait_until(self._nodes_are_idle)

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands and return what it printed."""
        return subprocess.run(
            command, env=os.environ | self.environ, check=check, capture_output=True, text=True, timeout=60
        ).stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state, for example RUNNING; an empty string once Slurm has forgotten it."""
        return self._fact(job, "JobState")

    def starts(self, job: str) -> int:
        """Return how often a job was started, the start included that Slurm is about to make."""
        return 1 + int(self._fact(job, "Restarts") or 0)

    def _fact(self, job: str, name: str) -> str:
        shown = self.run("scontrol", "show", "job", "-o", job, check=False)
        return shown.partition(f" {name}=")[2].partition(" ")[0]

    def wait_for(self, job: str, *states: str, timeout: float = 600) -> str:
        """Wait until a job is in one of `states`; returns the state."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state}, not {states}:\n{self.run('scontrol', 'show', 'job', job)}")
            time.sleep(0.5)  # to ask is to start a process
        return state

    def jobs(self) -> list[str]:
        """Return the ids of the jobs that are queued, running or ending; a cancelled one ends with its tasks."""
        return self.run("squeue", "-h", "-o", "%i").split()

    def set_minutes_left(self, job: str, minutes: int) -> None:
        """Change a running job's time limit so that it has so many minutes left, and up to one more."""
        ran = window.seconds_of(self.run("squeue", "-h", "-j", job, "-o", "%M")) or 0
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={ran // 60 + 1 + minutes}")

    def _write_config(self) -> None:
        nodes = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={free_port()} "
            f"CPUs=8 RealMemory={self.memory} Gres=gpu:2 State=UNKNOWN"
            for name in NODES
        ]
        config = CONFIG.format(
            folder=self.folder, host=socket.gethostname(), controller_port=free_port(), nodes="\n".join(nodes),
            shares=self.shares, remembers=self.remembers, first_job=_first_job(),
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(config)
        stand_ins = [f"NodeName={','.join(NODES)} Name=gpu File={device}\n" for device in ("/dev/null", "/dev/zero")]
        (self.folder / "gres.conf").write_text("".join(stand_ins))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.chmod(0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder / 'socket'}",
            f"--pid-file={folder / 'pid'}", f"--seed-file={folder / 'seed'}",
        )  # fmt: skip
        self._wait_until((folder / "socket").exists)

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{len(self.daemons)}.out").open("wb")
        process = subprocess.Popen(
            command, env=os.environ | self.environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.daemons.append(process)

    def _nodes_are_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "cpu", "-o", "%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def _wait_until(self, true: Callable[[], bool], timeout: float = 600) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out"))
                raise RuntimeError(f"Slurm did not come up in {timeout} s:\n{logs}")
            time.sleep(0.1)
