"""NeMo-Run's experiments as they lie on the disk, read without NeMo-Run, which takes 7 s to import."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from nemo_cpt import catalog
from nemo_cpt.errors import CptError
from nemo_cpt.executors.nemo_run_patches import newest_log, stopped_early

MODULES = {"nemo_cpt.executors.supervisor", "nemo_cpt.executors.runner"}  # what `stopping.supervise` starts
_ENDED = {"SUCCEEDED", "FAILED", "CANCELLED", "STOPPED", "UNKNOWN"}
_EXECUTOR = re.compile(r"^_target_: .*\.(\w+)Executor$", re.MULTILINE)
_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Experiment:
    """One experiment's folder.

    Attributes:
        folder: `$NEMORUN_HOME/experiments/TITLE/ID`.
    """

    folder: Path

    @property
    def id(self) -> str:
        """Its id, as `run` prints it."""
        return self.folder.name

    @property
    def started(self) -> str:
        """The local time of its start, which its id ends in; empty if that is no time."""
        stamp = self.id.rpartition("_")[2]
        # Ten digits are seconds; what goes beyond are fractions of one.
        seconds = int(stamp) / 10 ** max(len(stamp) - 10, 0) if stamp.isdigit() else 0
        return datetime.fromtimestamp(seconds).isoformat(" ", timespec="seconds") if seconds else ""

    @property
    def tasks(self) -> list[Path]:
        """Its tasks' folders."""
        return sorted(path.parent for path in self.folder.glob("*/configs"))

    @property
    def over_ssh(self) -> bool:
        """Whether its tasks, and their logs, are on a machine that is reached over SSH."""
        return any("SSHTunnel" in _configuration(task) for task in self.tasks)

    def executor(self, task: Path) -> str:
        """The kind of a task's executor: local, slurm, ..."""
        found = _EXECUTOR.search(_configuration(task))
        return found[1].lower() if found else ""

    def job(self, task: Path) -> tuple[str, str]:
        """A local task's state and its job's id, by what is on the disk; "" for one that a scheduler knows of."""
        # What a scheduler runs it alone knows the state of; asking takes NeMo-Run.
        if self.executor(task) != "local":
            return "", ""
        state, job_id = _noted(task)
        return task_state(state, str(task), local=True), job_id


def task_state(noted: str, job_dir: str, local: bool) -> str:
    """A task's state: NeMo-Run's, but for those that stopped and saved, and local ones that lost their launcher."""
    # Nobody notes the end of a job whose launcher was killed: its processes tell.
    state = "UNKNOWN" if local and noted == "RUNNING" and not list(processes_of(job_dir)) else noted
    return "STOPPED" if state in ("FAILED", "UNKNOWN") and stopped_early(job_dir) else state


def experiments() -> list[Experiment]:
    """Every experiment, the latest first.

    Raises:
        CptError: there is none.
    """
    home = _home() / "experiments"
    # A folder without _TASKS is no experiment, or one that is only just being made.
    known = sorted(home.glob("*/*_*/_TASKS"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not known:
        raise CptError(f"there are no experiments in {home}; NEMORUN_HOME names another place")
    return [Experiment(path.parent) for path in known]


def experiment(chosen: str | None) -> Experiment:
    """An experiment by its id, the latest if none is given.

    Raises:
        CptError: there is none.
    """
    known = experiments()
    found = next((each for each in known if chosen in (None, each.id)), None)
    if found is None:
        nearest = catalog.nearest(str(chosen), [each.id for each in known[:5]])
        raise CptError(f"there is no experiment {chosen!r} in {_home() / 'experiments'}; {nearest}")
    return found


def follow(experiment: Experiment) -> Iterator[str]:
    """What an experiment's tasks print to their newest logs from now on, until all of them have ended.

    Raises:
        CptError: the logs are on another machine.
    """
    if experiment.over_ssh:
        raise CptError(f"{experiment.id} runs on a machine reached over SSH; `logs` without -f fetches its logs")
    # From now on: what was there before has been printed by `logs`.
    read = {path: path.stat().st_size for task in experiment.tasks if (path := newest_log(task))}
    ended = False
    while True:
        for task in experiment.tasks:
            log = newest_log(task)
            if log and (text := _after(log, read.get(log, 0))):
                read[log] = read.get(log, 0) + len(text)
                yield text.decode(errors="replace")
        if ended:
            return
        ended = _ended(experiment)  # and once more what was printed until then
        time.sleep(0 if ended else _POLL_SECONDS)


def _ended(experiment: Experiment) -> bool:
    # Behind a task that failed nothing is started, and NeMo-Run's mark says that nothing will be.
    over = _ENDED | ({"UNSUBMITTED"} if (experiment.folder / "_DONE").exists() else set())
    return over.issuperset(experiment.job(task)[0] for task in experiment.tasks)


def _after(log: Path, offset: int) -> bytes:
    with open(log, "rb") as file:
        file.seek(offset)
        return file.read()


def processes_of(job_dir: str) -> Iterator[int]:
    """Processes that run a module of ours (`-m MODULE`) on a file in the job's folder."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()  # None where it may not be read
        modules = {word for option, word in pairwise(words) if option == "-m"}
        # The module alone would match every job on this machine.
        if modules & MODULES and any(word.startswith(f"{job_dir}/") for word in words):
            yield process.pid


def _noted(task: Path) -> tuple[str, str]:
    """What NeMo-Run noted last of a local task: its state, and its job's id."""
    try:
        # NeMo-Run's one file for all local jobs, which a crash may have torn.
        jobs: dict[str, Any] = json.loads((_home() / ".local_jobs.json").read_bytes())
    except (OSError, ValueError):
        jobs = {}
    inside = f"/{task.parent.name}/{task.name}/"  # the folder may have been moved
    found = (each for each in reversed(jobs.values()) if inside in str(each[2]))
    state, job_id, *_ = next(found, ("UNSUBMITTED", ""))
    return state, job_id


def _configuration(task: Path) -> str:
    """What NeMo-Run wrote of a task's executor, as YAML; empty if it is not there."""
    return "".join(path.read_text() for path in task.glob("configs/*_executor.yaml"))


def _home() -> Path:
    """NeMo-Run's folder: as it is set in this process, else by NeMo-Run's own rule."""
    # Only if it is imported already: importing it here would cost what this module saves.
    config = sys.modules.get("nemo_run.config")
    return Path(config.get_nemorun_home() if config else os.environ.get("NEMORUN_HOME", Path.home() / ".nemo_run"))
