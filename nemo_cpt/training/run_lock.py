"""One job at a time in a run's folder: a lock that says who holds it, between machines too. Imports no torch.

Two jobs in one folder train the same steps twice, and the second's start removes the checkpoint that the first is
writing. Rank 0 locks `FOLDER/run/lock` for the job's life: with a POSIX lock, which the kernel drops when the process
dies, and which forked writers do not inherit. Some shared file systems keep such locks to one machine (NFS with nolock,
Lustre with localflock). So `FOLDER/run/owner.json` says who holds it, and is touched every second. A holder on another
machine is taken for dead if Slurm does not run its job any more, or if nothing touched the file for a minute while we
watched; two machines' clocks are not compared.
"""

import atexit
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from nemo_cpt.constants import PLAINLY
from nemo_cpt.errors import CptError
from nemo_cpt.records import restored

FOLDER = "run"  # a folder, because NeMo moves plain files away when a run is resumed
BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 60.0  # without a beat, after which a holder on another machine is dead
LONG_AGO_SECONDS = 600.0  # more than clocks differ
_JOB = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT")  # fmt: skip
_SLURM_RUNS = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}  # its processes may be there

_held: dict[Path, "RunLock"] = {}


@dataclass(frozen=True)
class Owner:
    """Who holds a run's folder.

    Attributes:
        token: of this start.
        job: the same for all processes of a job, another for its next start.
        host: the machine.
        boot: of its kernel, which the containers of a machine share.
        pid: of rank 0.
        slurm: cluster, id and number of restarts of its Slurm job; empty without Slurm.
        since: when it took the folder.
    """

    token: str
    job: str
    host: str
    boot: str
    pid: int
    slurm: tuple[str, str, int] | tuple[()]
    since: str

    def __str__(self) -> str:
        job = f" (Slurm job {self.slurm[1]})" if self.slurm else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def this_process(environ: Mapping[str, str] = os.environ) -> Owner:
    """This process as an owner."""
    job, restarts = environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT", 0))
    return Owner(
        token=uuid.uuid4().hex,
        job=this_job(environ),
        host=socket.gethostname(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid=os.getpid(),
        slurm=(environ.get("SLURM_CLUSTER_NAME", ""), job, restarts) if job else (),
        since=datetime.now().astimezone().isoformat(" ", timespec="seconds"),
    )


def this_job(environ: Mapping[str, str] = os.environ) -> str:
    """What the processes of a job share and its next start does not, as far as their launcher tells them."""
    return "/".join(environ.get(name, "") for name in _JOB)


class RunLock:
    """The lock of one run's folder, for rank 0.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self.owner = this_process()
        self._file: BinaryIO | None = None
        self._end = threading.Event()

    def acquire(self) -> None:
        """Hold the folder until `release` or the end of this process.

        Raises:
            CptError: Another job holds it, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as on_failure:
                file = on_failure.enter_context(open(self.folder / "lock", "a+b"))
                self._take(_lock(file))
                # From here on the file stays open: the lock lives as long as this descriptor.
                on_failure.pop_all()
        except BlockingIOError:
            raise CptError(_in_use(self.folder.parent)) from None
        except OSError as error:
            raise CptError(f"{self.folder} cannot be written: {error}. Give the run another directory.") from error
        self._file = file
        # By folder, so that a second run of this process in the same folder finds its own lock (POSIX locks do not
        # conflict within a process).
        _held[self.folder] = self
        atexit.register(self.release)
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    def _take(self, kernel_decides: bool) -> None:
        before = read_owner(self.folder.parent)
        # On the same machine the kernel's lock says all: it was just given to us, so that the one of before is dead.
        if before and not (kernel_decides and before.boot == self.owner.boot) and self._lives(before):
            raise CptError(_in_use(self.folder.parent))
        partial = self.folder / f"owner.{self.owner.token}"
        partial.write_text(json.dumps(asdict(self.owner)))
        partial.rename(self.folder / "owner.json")
        # The descriptor, not the name: who is taken over must not keep its successor's file young.
        self._beats = os.open(self.folder / "owner.json", os.O_RDONLY)

    def check(self) -> None:
        """Raise CptError if another job took the folder, as it may when this one was suspended for long."""
        owner = read_owner(self.folder.parent)
        if owner is not None and owner.token != self.owner.token:
            raise CptError(f"{self.folder.parent} was taken over by {owner}: this job writes nothing there any more")

    def release(self) -> None:
        """Let go of the folder; a second call does nothing."""
        # A forked child inherits the atexit hook, and would let go of its parent's folder.
        if self._file is None or os.getpid() != self.owner.pid:
            return
        self._end.set()
        owner = read_owner(self.folder.parent)
        if owner is not None and owner.token == self.owner.token:
            (self.folder / "owner.json").unlink(missing_ok=True)
        self._file.close()
        self._file = None
        _held.pop(self.folder, None)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the next one may get through
                os.utime(self._beats)
        os.close(self._beats)

    def _lives(self, owner: Owner) -> bool:
        # Two proofs that need no waiting; without one, its file is watched.
        if _slurm_ended(owner, self.owner) or _last_beat(self.folder) < time.time() - LONG_AGO_SECONDS:
            return False
        print(f"nemo_cpt: {self.folder.parent} was held by {owner}; waiting for a sign of life", flush=True)
        return _beats_within(self.folder, PATIENCE_SECONDS)


def hold(folder: Path) -> RunLock:
    """Hold a run's folder; where this process does already, nothing changes.

    Raises:
        CptError: see `RunLock.acquire`.
    """
    lock = _held.get(folder / FOLDER) or RunLock(folder)
    if lock._file is None:
        lock.acquire()
    return lock


def check_held(folder: Path) -> None:
    """Raise CptError if this process held a run's folder, and another job took it over."""
    if lock := _held.get(folder / FOLDER):
        lock.check()


def check_free(folder: Path) -> None:
    """Raise CptError if another job holds a run's folder; within two seconds, and without changing anything there.

    It may miss a holder on another machine that is slow to touch its file; `RunLock.acquire` does not.
    """
    owner = read_owner(folder)
    # Our own job's other processes hold it, not a stranger; without a launcher's variables nothing tells them apart.
    if owner is None or folder / FOLDER in _held or (owner.job == this_job() and this_job().strip("/")):
        return
    try:
        with open(folder / FOLDER / "lock", "rb") as file:
            kernel_decides = _lock(file, shared=True, patience=0)
    except BlockingIOError:
        raise CptError(_in_use(folder)) from None
    except OSError:
        return
    here = this_process()
    ended = (kernel_decides and owner.boot == here.boot) or _slurm_ended(owner, here)
    if not ended and _beats_within(folder / FOLDER, 1.5 * BEAT_SECONDS):
        raise CptError(_in_use(folder))


def wait_until_held_by(job: str, folder: Path, patience: float = 2 * PATIENCE_SECONDS) -> None:
    """Wait, in the processes beside rank 0, until rank 0 of their job holds the run's folder.

    Raises:
        CptError: it does not.
    """
    deadline = time.monotonic() + patience
    # By the job's name: the owner of an earlier start may still be written there.
    while (owner := read_owner(folder)) is None or owner.job != job:
        if time.monotonic() > deadline:
            raise CptError(f"rank 0 did not take {folder} within {patience:.0f} s; its own message says why")
        time.sleep(0.1)


def read_owner(folder: Path) -> Owner | None:
    """Who holds a run's folder, or held it until it died; None if it was let go of."""
    try:
        fields = json.loads((folder / FOLDER / "owner.json").read_bytes())
        return restored(Owner, fields, slurm=tuple(fields["slurm"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _lock(file: BinaryIO, shared: bool = False, patience: float = 1.0) -> bool:
    """Lock a file, and return whether the file system has such locks; BlockingIOError if another process has it.

    It is tried for a second, because `check_free` holds the lock for a moment.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            if time.monotonic() > deadline:
                raise BlockingIOError(*error.args) from None
            time.sleep(0.05)
        except OSError:
            return False


def _beats_within(folder: Path, seconds: float) -> bool:
    deadline, before = time.monotonic() + seconds, _last_beat(folder)
    while time.monotonic() < deadline:
        if _last_beat(folder) != before:
            return True
        time.sleep(0.1)
    return False


def _last_beat(folder: Path) -> float:
    try:
        with open(folder / "owner.json", "rb") as file:  # opened anew, so that NFS asks its server
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0


def _slurm_ended(owner: Owner, here: Owner) -> bool:
    """Whether Slurm ended the owner's job, or the run of it that the owner was; False if it cannot be known here."""
    if not owner.slurm or not here.slurm or owner.slurm[0] != here.slurm[0]:
        return False
    _, job, restarts = owner.slurm
    if here.slurm[1] == job:
        return here.slurm[2] > restarts
    command = [*PLAINLY, "squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    # Slurm forgets a job some minutes after its end, and then refuses its id. Any other failure says nothing of it.
    known = asked.returncode == 0 or "Invalid job id" in asked.stderr
    return known and not set(asked.stdout.split()) & _SLURM_RUNS


def _in_use(folder: Path) -> str:
    return (
        f"{folder} is in use by {read_owner(folder) or 'another process'}: two jobs in one folder destroy each other's "
        "checkpoints. Wait for that one, or stop it; to train beside it, give this run another name"
    )
