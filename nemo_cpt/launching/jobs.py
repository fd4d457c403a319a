"""Jobs of `nemo-cpt run`: submitted through NeMo-Run, found again by the experiment's id."""

import contextlib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import psutil

from nemo_cpt import catalog
from nemo_cpt.errors import CptError
from nemo_cpt.executors.supervisor import seconds_to_save
from nemo_cpt.launching import experiments
from nemo_cpt.launching.experiments import processes_of

ALIVE = ("PENDING", "SUBMITTED", "RUNNING")
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "STOPPED")  # not UNKNOWN, which a scheduler may still run


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


def check_detaches(executor: Any) -> None:
    """Raise CptError for an executor whose jobs NeMo-Run waits for, also where it is asked to leave them alone."""
    import nemo_run as run

    if type(executor) not in run.Experiment._DETACH_SUPPORTED_EXECUTORS:
        raise CptError(
            f"--detach is for a scheduler's jobs, and NeMo-Run waits for those of {type(executor).__name__}: leave it "
            "away; in the background a command goes on as `nohup nemo-cpt ... &`"
        )


def submit(
    recipe: catalog.Function,
    arguments: Mapping[str, Any],
    fields: list[str],
    executor: Any,
    detach: bool,
    begun: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe on an executor and wait for it, unless detached.

    Args:
        recipe: as the catalog reads it.
        arguments: those given to it.
        fields: `path.to.field=value` on its config.
        executor: NeMo-Run's.
        detach: return once it is submitted.
        begun: called with the experiment's folder before the job is submitted; its log is then not printed.

    Returns:
        The experiment's id and its tasks' job ids.

    Raises:
        CptError: the job was refused, or failed; with the log's last lines.
    """
    # Where a view is shown, the log would write over it.
    with _experiment(recipe, arguments, fields, executor, tail_logs=begun is None) as experiment:
        if begun:
            begun(Path(experiment._exp_dir))
        experiment.run(detach=detach)
    print(f"experiment {experiment._id}: nemo-cpt status|logs|cancel {experiment._id}")
    return {"experiment": experiment._id, "jobs": [job.handle for job in experiment.jobs]}


def prepared(
    recipe: catalog.Function, arguments: Mapping[str, Any], fields: list[str], executor: Any
) -> dict[str, str]:
    """What NeMo-Run would submit, without submitting it: the experiment's title, and NeMo-Run's own words.

    Raises:
        CptError: the executor refuses it.
    """
    said, folder = io.StringIO(), Path()
    try:
        with contextlib.redirect_stdout(said), _experiment(recipe, arguments, fields, executor) as experiment:
            folder = Path(experiment._exp_dir)
            experiment.dryrun()
    finally:
        # NeMo-Run removes it where nothing is wrong, and leaves the one above, of the title, in any case.
        if folder.name:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other experiments, or was not made
                folder.parent.rmdir()
    return {"experiment": experiment._title, "submitted": said.getvalue()}


@contextlib.contextmanager
def _experiment(
    recipe: catalog.Function, arguments: Mapping[str, Any], fields: list[str], executor: Any, tail_logs: bool = True
) -> Iterator[Any]:
    """NeMo-Run's experiment with the recipe as its one task."""
    import nemo_run as run

    from nemo_cpt.launching.task import run_recipe

    plain: dict[str, Any] = {
        name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for name, value in arguments.items()
    }
    # Name and arguments travel, not the built config: the launcher need not import NeMo, and the job builds it.
    task = run.Partial(run_recipe, recipe=recipe.name, arguments=plain, overrides=fields)
    title = recipe.name.replace(".", "-")
    with run.Experiment(title, executor=executor, enable_goodbye_message=False) as experiment:
        experiment.add(task, name=title, tail_logs=tail_logs)
        yield experiment


def status(experiment_id: str | None) -> dict[str, Any]:
    """Return an experiment's id and its tasks: name, status, job id, folder.

    Raises:
        CptError: there is no such experiment.
    """
    chosen = experiments.experiment(experiment_id)
    # From the disk alone, where that knows: NeMo-Run takes 7 s to import.
    if all(chosen.executor(task) == "local" for task in chosen.tasks):
        return listed(chosen)
    with _opened(chosen.id) as experiment:
        found = experiment.status(return_dict=True) or {}
    tasks = [
        {
            "name": name,
            "status": experiments.task_state(
                str(getattr(task["status"], "name", task["status"])),
                task["local_dir"],
                local=task["handle"].startswith("local"),
            ),
            "job_id": task["job_id"],
            "folder": task.get("remote_dir") or task["local_dir"],
        }
        for name, task in found.items()
    ]
    return {"experiment": chosen.id, "tasks": tasks}


def listed(experiment: experiments.Experiment) -> dict[str, Any]:
    """What `status` returns, without asking a scheduler: of tasks that only one knows of, the state is empty."""
    jobs = [(task, *experiment.job(task)) for task in experiment.tasks]
    tasks = [
        {"name": task.name, "status": state, "job_id": job_id, "folder": str(task)} for task, state, job_id in jobs
    ]
    return {"experiment": experiment.id, "tasks": tasks}


def check_ended(note: Path, does: str) -> None:
    """Check that no job of an earlier command is at work, or waits to be; its note is removed where all have ended.

    Args:
        note: file that holds the experiment's id, if there was one.
        does: what its jobs do, for the message.

    Raises:
        CptError: one is.
    """
    if not note.exists():
        return
    experiment = note.read_text()
    try:
        tasks = status(experiment)["tasks"]
    except CptError:  # its records were removed
        tasks = []
    if alive := [task["name"] for task in tasks if task["status"] in ALIVE]:
        raise CptError(
            f"experiment {experiment} {does} ({', '.join(alive)}): wait for it (nemo-cpt status {experiment}), or end "
            f"it first (nemo-cpt cancel {experiment})"
        )
    note.unlink(missing_ok=True)


def logs(experiment_id: str | None, lines: int) -> str:
    """Return the last lines of the logs of an experiment's tasks, each headed by its path."""
    from nemo_cpt.executors.nemo_run_patches import log_tail

    found = experiments.experiment(experiment_id)
    if not found.over_ssh:
        return "\n".join(log_tail(str(task), lines) for task in found.tasks)
    printed = []
    with _opened(found.id) as experiment:
        for job in experiment.jobs:
            experiment.logs(job.id)  # which fetches them
            printed.append(log_tail(job.executor.job_dir, lines))
    return "\n".join(printed)


def cancel(experiment_id: str | None) -> dict[str, Any]:
    """Cancel an experiment's tasks; local ones by ending their processes, which NeMo-Run cannot from outside.

    Returns:
        The experiment's id and those of its tasks that were cancelled; `killed` names the local ones that did not save
        in time, `ended` has the state of each that had ended before.

    Raises:
        CptError: there is no such experiment; a scheduler refused to cancel a task, and the others were.
    """
    chosen = experiments.experiment(experiment_id)
    result: dict[str, Any] = {"experiment": chosen.id, "tasks": [], "killed": [], "ended": {}}
    local = [task for task in chosen.tasks if chosen.executor(task) == "local"]
    for task in local:
        if list(processes_of(str(task))):
            result["tasks"].append(task.name)
            result["killed"] += [] if _end_processes(str(task)) else [task.name]
        else:
            result["ended"][task.name] = chosen.job(task)[0]
    refused = []
    # As `status` does: without NeMo-Run where the disk knows all.
    if len(local) < len(chosen.tasks):
        with _opened(chosen.id) as experiment:
            states = {task["name"]: task["status"] for task in status(chosen.id)["tasks"]}
            for job in experiment.jobs:
                if job.handle.startswith("local"):
                    continue
                # In any case: of a chain an earlier job may be left, and to cancel what has ended does nothing.
                try:
                    experiment.cancel(job.id)
                except CptError as error:
                    refused.append(error.message)
                    continue
                if (state := states.get(job.id, "UNKNOWN")) in _ENDED:
                    result["ended"][job.id] = state
                else:
                    result["tasks"].append(job.id)
    if refused:
        done = f"; cancelled: {', '.join(result['tasks'])}" if result["tasks"] else ""
        raise CptError(f"{chosen.id}: {'; '.join(refused)}{done}")
    return result


@contextlib.contextmanager
def _opened(experiment_id: str | None) -> Iterator[Any]:
    """An experiment of NeMo-Run's, the latest if no id is given."""
    import nemo_run as run

    from nemo_cpt.executors import nemo_run_patches

    nemo_run_patches.apply()
    yield run.Experiment.from_id(experiments.experiment(experiment_id).id)


def _end_processes(job_dir: str) -> bool:
    """Stop a job through its supervisor, the one process that no other of the job's started, so that it may save.

    Returns:
        Whether it ended by itself; a job that takes longer than its plan allows (`seconds_to_save`) is killed.

    Raises:
        CptError: the job is another user's.
    """
    every = set(processes_of(job_dir))
    parents = _parents()
    # The supervisor passes the signal on and waits; the workers told directly would end as if they had crashed.
    supervisors = [pid for pid in every if parents.get(pid) not in every]
    patience = max(map(seconds_to_save, supervisors), default=0)
    job, deadline, in_time = _with_descendants(every), time.monotonic() + patience, True
    for pid in supervisors:
        _signal(pid, signal.SIGTERM)
    if job:
        print(f"told to stop; it has {patience} s to save, then it is killed", file=sys.stderr, flush=True)
    # With what they started: a checkpoint's writer may outlive its parent.
    while job := _with_descendants(job):
        if time.monotonic() > deadline:
            in_time = False
            for pid in job:
                _signal(pid, signal.SIGKILL)
        time.sleep(0.2)
    return in_time


def _with_descendants(pids: set[int]) -> set[int]:
    """Those of the processes that have not ended, and what they started and has not."""
    parents = _parents()
    found = pids & parents.keys()
    # Generation by generation, until no more are found.
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _parents() -> dict[int, int]:
    """Each process's parent; without zombies, which hold nothing any more and stay until their parent asks."""
    every = psutil.process_iter(["ppid", "status"])
    return {each.pid: each.info["ppid"] for each in every if each.info["status"] != psutil.STATUS_ZOMBIE}


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended since it was listed
    except PermissionError:
        raise CptError(f"the job's process {pid} is another user's: cancel the experiment as that user") from None
