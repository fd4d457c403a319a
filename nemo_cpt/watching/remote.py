"""A run on a cluster that is reached over SSH alone: its files are fetched into a folder here as they grow.

One connection serves all that is asked (OpenSSH's ControlMaster); rsync sends what is new of each file. Where the
connection breaks, what was fetched stays, and it is tried again.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from nemo_cpt import catalog
from nemo_cpt.cache import cache_folder
from nemo_cpt.constants import PLAINLY
from nemo_cpt.errors import CptError
from nemo_cpt.executors.supervisor import REACHED_FILE
from nemo_cpt.launching.description import describe, moves_its_folder
from nemo_cpt.launching.experiments import Experiment, experiments
from nemo_cpt.watching.following import QUIET_SECONDS, RANK_0_LOG, Follower
from nemo_cpt.watching.view import Snapshot

FETCH_SECONDS = 2.0  # between two looks
TRANSFER_SECONDS = 60
# What the view shows: never a checkpoint's weights, but that they are there.
FETCHED = (
    "/metrics/", "/metrics/**", "/run/", "/run/owner.json", f"/{RANK_0_LOG}",
    "/checkpoints/", "/checkpoints/*/", "/checkpoints/*/weights/", "/checkpoints/*/run.json",
    "/checkpoints/*-unfinished",
)  # fmt: skip
IN_CONTACT = (0, 23, 24)  # rsync's codes; the last two say that files were not there, or were removed meanwhile
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}  # Slurm's states


@dataclass(frozen=True)
class Reached:
    """A run on a cluster, and the way there.

    Attributes:
        experiment: the id under which it was submitted from here.
        folder: the run's, on the cluster.
        jobs: ids of its Slurm jobs, of which all but one wait for another.
        host: the login node.
        user: account there.
        port: SSH port.
        identity: private key file; None for the agent's and the default ones.
    """

    experiment: str
    folder: Path
    jobs: Sequence[str]
    host: str
    user: str
    port: int
    identity: str | None


@dataclass(frozen=True)
class Queued:
    """What Slurm says of a run's job.

    Attributes:
        state: one of Slurm's; empty where it knows the job no more.
        started: when it was started, in seconds since 1970; 0 while it waits.
    """

    state: str
    started: float = 0.0


class Connection:
    """A way to a login node, which fetches a run's files; see `connected`.

    Args:
        reached: the task, and how its machine is reached.
        mirror: folder for the run's files.
    """

    def __init__(self, reached: Reached, mirror: Path) -> None:
        self.reached, self.mirror = reached, mirror
        self.job: Queued | None = None  # None while Slurm has said nothing
        self._is_gone = False
        self.trouble = ""  # why it was not heard of since
        self.heard = time.monotonic()
        self._sockets = Path(tempfile.mkdtemp(prefix="nemo_cpt_"))  # short: a socket's path has 107 characters at most
        self._end = threading.Event()

    @property
    def silent_seconds(self) -> float:
        """Since it was heard of last; 0 while all is well."""
        return time.monotonic() - self.heard if self.trouble else 0.0

    def open(self, ask: bool) -> None:
        """Log in; a process of ssh's stays behind that later ones go through, and ends a minute behind the last.

        Args:
            ask: the user may be asked for a password, on the terminal.

        Raises:
            CptError: the node cannot be reached, or lets nobody in.
        """
        master = ("ControlMaster=yes", "ControlPersist=60", "ConnectTimeout=10")
        words = [*self._ssh(ask), *(word for each in master for word in ("-o", each)), self._where, "true"]
        # A file and not a pipe, which the process that stays behind would keep open.
        with tempfile.TemporaryFile("w+") as said:
            code = subprocess.call(words, stdin=None if ask else subprocess.DEVNULL, stdout=said, stderr=said)
            said.seek(0)
            reason = _last_line(said.read()) or f"ssh ended with {code}"
        if code:
            raise CptError(f"SSH to {self._where}, port {self.reached.port}: {reason}")

    def close(self) -> None:
        """Log out."""
        self._end.set()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._call([*self._ssh(), "-O", "exit", self._where])
        shutil.rmtree(self._sockets, ignore_errors=True)

    def keep_fetching(self) -> None:
        """Fetch again and again, in a thread of its own: a broken connection must not hold the view up."""
        threading.Thread(target=self._work, daemon=True, name="fetching").start()

    def _work(self) -> None:
        asked = 0.0
        while not self._end.wait(FETCH_SECONDS):
            try:
                if not self._control.exists():
                    self.open(ask=False)
                # Slurm's controller serves everybody: it is asked more seldom than files are fetched.
                if time.monotonic() - asked > QUIET_SECONDS:
                    self.look()
                    asked = time.monotonic()
                else:
                    self.fetch()
            except (CptError, subprocess.TimeoutExpired) as error:
                self.trouble = str(error)

    def look(self) -> None:
        """Bring up to date what Slurm says of the job, and the files.

        Raises:
            CptError: the connection is broken.
        """
        queued = self._queued()
        # Behind the queue, so that of a job that is gone the files are whole when that is told; and it is told at the
        # second time, because what a login node sees of a shared file system may be some seconds old.
        self.fetch()
        if queued is not None and (queued.state or self._is_gone):
            self.job = queued
        self._is_gone = queued is not None and not queued.state

    def fetch(self) -> None:
        """Bring the files here up to date.

        Raises:
            CptError: the connection is broken.
        """
        filters = [f"--include={each}" for each in FETCHED] + ["--exclude=*"]
        through = shlex.join(self._ssh())
        source = f"{self._where}:{self.reached.folder}/"
        self.mirror.mkdir(parents=True, exist_ok=True)
        # -s: the path is sent as it is, and not to the shell there.
        done = self._call(["rsync", "-rts", "--delete", *filters, "-e", through, source, f"{self.mirror}/"])
        if done.returncode not in IN_CONTACT:
            said = done.stderr.strip().partition("\n")[0]  # what comes behind is rsync's own name for it
            raise CptError(f"{self.reached.host}: {said or f'rsync ended with {done.returncode}'}")
        self.heard, self.trouble = time.monotonic(), ""

    def _queued(self) -> Queued | None:
        """The job in Slurm's queue; None where that does not answer."""
        jobs = ["--jobs", ",".join(self.reached.jobs)]
        asked = [*PLAINLY, "TZ=UTC", "squeue", "--noheader", *jobs, "--format", "%T %S"]
        done = self._call([*self._ssh(), self._where, shlex.join(asked)])
        return _in_queue(done.stdout) if done.returncode == 0 or "Invalid job id" in done.stderr else None

    def _call(self, words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        # In a session of its own: it can ask for nothing on the terminal, and the view's Ctrl-C is not its own.
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", start_new_session=True,
            # "C": what Slurm and rsync say is looked at.
            timeout=TRANSFER_SECONDS, env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip

    def _ssh(self, ask: bool = False) -> list[str]:
        reached = self.reached
        options = ["ControlPath=" + str(self._control), "ServerAliveInterval=5", "ServerAliveCountMax=3"]
        options += [] if ask else ["BatchMode=yes"]
        identity = ["-i", reached.identity] if reached.identity else []
        return ["ssh", "-p", str(reached.port), *identity, *(word for each in options for word in ("-o", each))]

    @property
    def _control(self) -> Path:
        return self._sockets / "control"

    @property
    def _where(self) -> str:
        return f"{self.reached.user}@{self.reached.host}"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _in_queue(printed: str) -> Queued:
    """The job of a chain that has come furthest, by squeue's lines of state and start."""
    jobs = [line.split() for line in printed.splitlines() if line.strip()]
    # Of a chain the others wait for the one that runs.
    jobs.sort(key=lambda job: job[0] in WAITING)
    if not jobs:
        return Queued("")
    state, start = jobs[0]
    # "N/A" of one that waits; else UTC, as it was asked for.
    known = state not in WAITING and start[:1].isdigit()
    return Queued(state, datetime.fromisoformat(start).replace(tzinfo=UTC).timestamp() if known else 0.0)


class RemoteFollower(Follower):
    """Follows a run by the files that a connection fetches, and by what Slurm says of its job."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection.mirror)
        self._connection, self._job = connection, connection.job

    def snapshot(self, log: Path | None = None) -> Snapshot:
        """The run as it is now, by files that are no older than what is known of its job."""
        self._job = self._connection.job
        return super().snapshot(log)

    def _state(self) -> tuple[str, str]:
        job, end = self._job, self._record.end
        if job and job.state in WAITING:
            return "queued", ""
        # An end that was written before the job was started is an earlier one's.
        if end and not (job and job.started > end["time"]):
            return end["state"], end["message"]
        if job and not job.state:
            return "killed", "its job has left Slurm's queue without a word; nemo-cpt logs may say why"
        described = self._record.description.get("started")
        earlier = described and job and datetime.fromisoformat(described).timestamp() < job.started
        return ("running" if described and not earlier else "starting"), ""

    def _log(self) -> Path | None:
        own = self.folder / RANK_0_LOG
        return own if own.is_file() else None

    def _trouble(self) -> str:
        silent = self._connection.silent_seconds
        return f"not heard of for {silent:.0f} s ({self._connection.trouble})" if silent else ""


def find(chosen: str | None) -> Reached | None:
    """The newest run over SSH, or that of an experiment's id, of a run's name or of its folder there; None for none."""
    for experiment, task, folder in _submitted(chosen):
        if (record := task / REACHED_FILE).is_file():
            about: dict[str, Any] = json.loads(record.read_bytes())
            return Reached(experiment.id, Path(about.pop("runs_in"), folder), **about)
    return None


def not_begun(chosen: str | None, directory: Path) -> Experiment | None:
    """The newest experiment of a scheduler's here that would train such a run, and has made no folder for it yet.

    Args:
        chosen: as for `find`.
        directory: where runs are kept; of no chosen run, those alone that would be kept there.
    """
    for experiment, _, folder in _submitted(chosen):
        # The newest alone: an older one whose folder is gone was removed, and does not wait.
        if chosen or folder.absolute().parent == directory.absolute():
            return None if folder.exists() else experiment
    return None


def _submitted(chosen: str | None) -> Iterator[tuple[Experiment, Path, Path]]:
    """What schedulers were given of the chosen run, or of all, the latest first: experiment, task, the run's folder."""
    try:
        known = experiments()
    except CptError:  # there are none
        return
    for experiment in known:
        for task in experiment.tasks:
            folder = _folder_of(task) if experiment.executor(task) != "local" else None
            if folder is not None and chosen in (None, experiment.id, folder.name, str(folder)):
                yield experiment, task, folder


def _folder_of(task: Path) -> Path | None:
    """A task's run folder, from where it runs, by what NeMo-Run wrote of it; None where that does not say."""
    config: dict[str, Any] = next((yaml.safe_load(path.read_text()) for path in task.glob("configs/*_config.yaml")), {})
    if "recipe" in config:  # of `nemo-cpt run`, or a workflow's
        fields = config.get("overrides", config.get("fields", ()))
        with contextlib.suppress(CptError):  # of a recipe that has been renamed since
            function = catalog.recipe(config["recipe"])
            if not moves_its_folder(fields):
                return describe(function, config["arguments"], fields, "local", ()).directory
    log = config.get("log", {})  # of a script's
    if log.get("explicit_log_dir"):
        return Path(log["explicit_log_dir"])
    return Path(log["log_dir"], log["name"]) if log.get("log_dir") and log.get("name") else None


@contextlib.contextmanager
def connected(reached: Reached) -> Iterator[RemoteFollower]:
    """A follower of a run over SSH; asks for a password where the login node does.

    Raises:
        CptError: the login node cannot be reached, or a program that it takes is missing.
    """
    if missing := [program for program in ("ssh", "rsync") if not shutil.which(program)]:
        raise CptError(f"{' and '.join(missing)} not installed here: a run over SSH is watched through ssh and rsync")
    connection = Connection(reached, cache_folder("watched") / reached.experiment / reached.folder.name)
    try:
        connection.open(ask=True)
        connection.look()
        connection.keep_fetching()
        yield RemoteFollower(connection)
    finally:
        connection.close()
