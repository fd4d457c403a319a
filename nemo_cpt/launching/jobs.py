"""Jobs of `nemo-cpt run`: submitted through NeMo-Run, found again by the experiment's id."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_cpt import catalog
from nemo_cpt.errors import CptError
from nemo_cpt.executors.supervisor import processes, seconds_to_save

MODULES = {"nemo_cpt.executors.supervisor", "nemo_cpt.executors.runner"}  # what `stopping.supervise` starts


def give_time_to_save(
    executor: Any, recipe: catalog.Function, arguments: Mapping[str, Any], fields: Sequence[str]
) -> None:
    """Have the job told to stop as early ahead of its end as the plan of its recipe needs to save."""
    from nemo_cpt.catalog.workloads import workload
    from nemo_cpt.executors import nemo_run_patches
    from nemo_cpt.planning.save_window import saving

    def needed() -> int | None:
        try:
            return saving(workload(recipe.name, arguments, fields)).window
        except CptError:  # a recipe that the planner cannot read may run all the same
            return None

    nemo_run_patches.give_time_to_save(executor, needed)


def submit(
    recipe: catalog.Function, arguments: Mapping[str, Any], fields: list[str], executor: Any, detach: bool, dryrun: bool
) -> dict[str, Any]:
    """Run a recipe on an executor and wait for it, unless detached.

    Returns:
        The experiment's id and its tasks' job ids.

    Raises:
        CptError: the job was refused, or failed; with the log's last lines.
    """
    import nemo_run as run

    from nemo_cpt.launching.task import run_recipe

    plain: dict[str, Any] = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in arguments.items()
    }
    task = run.Partial(run_recipe, recipe=recipe.name, arguments=plain, overrides=fields)
    title = recipe.name.replace(".", "-")
    with run.Experiment(title, executor=executor, enable_goodbye_message=False) as experiment:
        experiment.add(task, name=title, tail_logs=True)
        if dryrun:
            experiment.dryrun()
        else:
            experiment.run(detach=detach)
    print(f"experiment {experiment._id}: nemo-cpt status|logs|cancel {experiment._id}")
    return {"experiment": experiment._id, "jobs": [job.handle for job in experiment.jobs]}


def status(experiment_id: str | None) -> dict[str, Any]:
    """Return an experiment's id and its tasks: name, status, job id, folder.

    Raises:
        CptError: there is no such experiment.
    """
    with _opened(experiment_id) as experiment:
        found = experiment.status(return_dict=True) or {}
    tasks = [
        {
            "name": name,
            "status": _state(task),
            "job_id": task["job_id"],
            "folder": task.get("remote_dir") or task["local_dir"],
        }
        for name, task in found.items()
    ]
    return {"experiment": experiment._id, "tasks": tasks}


def logs(experiment_id: str | None, lines: int) -> str:
    """Return the last lines of the logs of an experiment's tasks, each headed by its path."""
    from nemo_run.core.tunnel.client import SSHTunnel

    from nemo_cpt.executors.nemo_run_patches import log_tail

    printed = []
    with _opened(experiment_id) as experiment:
        for job in experiment.jobs:
            if isinstance(getattr(job.executor, "tunnel", None), SSHTunnel):
                experiment.logs(job.id)
            printed.append(log_tail(job.executor.job_dir, lines))
    return "\n".join(printed)


def cancel(experiment_id: str | None) -> dict[str, Any]:
    """Cancel an experiment's tasks; local ones by ending their processes, which NeMo-Run cannot from outside.

    Returns:
        The experiment's id and its tasks; `killed` names the local ones that did not save in time.
    """
    killed = []
    with _opened(experiment_id) as experiment:
        for job in experiment.jobs:
            if not job.handle.startswith("local"):
                experiment.cancel(job.id)
            elif not _end_processes(job.executor.job_dir):
                killed.append(job.id)
        return {"experiment": experiment._id, "tasks": [job.id for job in experiment.jobs], "killed": killed}


@contextlib.contextmanager
def _opened(experiment_id: str | None) -> Iterator[Any]:
    """An experiment of NeMo-Run's, the latest if no id is given."""
    import nemo_run as run
    from nemo_run.config import get_nemorun_home

    from nemo_cpt.executors import nemo_run_patches

    nemo_run_patches.apply()
    home = Path(get_nemorun_home(), "experiments")
    known = sorted(home.glob("*/*_*/_TASKS"), key=lambda path: path.stat().st_mtime)
    if not known:
        raise CptError(f"there are no experiments in {home}")
    names = [path.parent.name for path in known]
    chosen = experiment_id or names[-1]
    if chosen not in names:
        raise CptError(f"there is no experiment {chosen!r} in {home}; {catalog.nearest(chosen, names[-5:])}")
    yield run.Experiment.from_id(chosen)


def _state(task: Mapping[str, Any]) -> str:
    """A task's state: NeMo-Run's, but for local tasks that were stopped and saved, or that died with their launcher."""
    from nemo_cpt.executors.nemo_run_patches import stopped_early

    state = str(getattr(task["status"], "name", task["status"]))
    if task["handle"].startswith("local") and state == "RUNNING" and not list(_processes(task["local_dir"])):
        state = "UNKNOWN"
    return "STOPPED" if state in ("FAILED", "UNKNOWN") and stopped_early(task["local_dir"]) else state


def _processes(job_dir: str) -> Iterator[int]:
    """Processes that run a module of ours (`-m MODULE`) on a file in the job's folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
            modules = {word for option, word in pairwise(words) if option == "-m"}
            if modules & MODULES and any(word.startswith(f"{job_dir}/") for word in words):
                yield int(folder.name)


def _end_processes(job_dir: str) -> bool:
    """Stop a job through its supervisor, the one process that no other of the job's started, so that it may save.

    Returns:
        Whether it ended by itself; a job that takes longer than its plan allows (`seconds_to_save`) is killed.

    Raises:
        CptError: the job is another user's.
    """
    every = set(_processes(job_dir))
    parents = {pid: parent for pid, (parent, _) in processes().items()}
    supervisors = [pid for pid in every if parents.get(pid) not in every]
    patience = max(map(seconds_to_save, supervisors), default=0)
    job, deadline, in_time = _with_descendants(every), time.monotonic() + patience, True
    for pid in supervisors:
        _signal(pid, signal.SIGTERM)
    if job:
        print(f"told to stop; it has {patience} s to save, then it is killed", file=sys.stderr, flush=True)
    while job := _with_descendants(job):
        if time.monotonic() > deadline:
            in_time = False
            for pid in job:
                _signal(pid, signal.SIGKILL)
        time.sleep(0.2)
    return in_time


def _with_descendants(pids: set[int]) -> set[int]:
    """Those of the processes that have not ended, and what they started and has not."""
    alive = {pid: parent for pid, (parent, state) in processes().items() if state != "Z"}
    found = pids & alive.keys()
    while more := {pid for pid, parent in alive.items() if parent in found} - found:
        found |= more
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended since it was listed
    except PermissionError:
        raise CptError(f"the job's process {pid} is another user's: cancel the experiment as that user") from None
