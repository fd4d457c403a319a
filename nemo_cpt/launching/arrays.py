"""Arrays of tasks that share a folder, and a job behind them: on Slurm's nodes, or as processes of this machine."""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.plan import EXPERIMENT
from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.launching import jobs

TASK_MODULE = "nemo_cpt.executors.array_task"
_DETACHED_HERE = "--detach is for a scheduler's jobs: those on this machine end with what started them"
STOP_SECONDS = 60  # ahead of a task's time limit: to leave a checkpoint takes seconds


@dataclass(frozen=True)
class Array:
    """What is to be run.

    Attributes:
        name: Of the experiment.
        folder: What the tasks share, on a file system that all of them see.
        task: `module:function`, called with the folder and a task's number.
        join: `module:function`, called with the folder once every task has ended well.
        numbers: Of the tasks that are to run; none where the join alone is left.
        missing: Returns the numbers of those that are not done.
    """

    name: str
    folder: Path
    task: str
    join: str
    numbers: Sequence[int]
    missing: Callable[[], list[int]]


def check_named(name: str, detach: bool = False) -> None:
    """Check as `check_executor` what can be said of an executor by its name alone, before NeMo-Run is imported.

    Raises:
        CptError: It cannot run arrays.
    """
    if name == "local" and detach:
        raise CptError(_DETACHED_HERE)
    if name not in ("local", "slurm") and not name.partition(":")[0].endswith(".py"):
        raise CptError(_shares_no_files(name))


def check_executor(executor: Any, detach: bool = False) -> None:
    """Check that an executor can run arrays.

    Raises:
        CptError: Its machines do not share this one's files, or its options are for jobs of another shape.
    """
    import nemo_run as run

    from nemo_cpt.executors.slurm_job import SlurmJob

    if isinstance(executor, run.LocalExecutor):
        if executor.nodes > 1:
            raise CptError("--tasks with local(nodes=...): processes of this machine alone; leave nodes away")
        if detach:
            raise CptError(_DETACHED_HERE)
        return
    if not isinstance(executor, SlurmJob):
        raise CptError(_shares_no_files(type(executor).__name__))
    if not isinstance(executor.tunnel, run.LocalTunnel):
        raise CptError(
            "--tasks with slurm(tunnel=ssh(...)): the inputs are read here; run the command on the login node"
        )
    # A task is one process: more of them would each make the whole part.
    if executor.nodes > 1 or executor.ntasks_per_node > 1 or executor.chain > 1 or executor.array:
        raise CptError(
            "--tasks makes an array of jobs of one process each: leave executor.nodes, tasks_per_node, chain and array "
            "away (executor.cpus_per_task says how many CPUs each of them has)"
        )


def _shares_no_files(name: str) -> str:
    return (
        f"--tasks with {name}: its machines are not known to share this one's files. Take --executor slurm or local, "
        "or run without --tasks"
    )


def run_array(array: Array, executor: Any, detach: bool = False) -> str:
    """Run an array's tasks and, once all of them have ended well, what joins their parts; return the experiment's id.

    On Slurm this is one array job and one that depends on it; on this machine a process for each task.

    Args:
        array: What to run.
        executor: NeMo-Run's, of `slurm` or `local`.
        detach: Return once it is submitted.

    Raises:
        CptError: The executor cannot run it, an earlier command's tasks are still at work, or a task failed; with its
            log's last lines.
    """
    import nemo_run as run
    from nemo_run.core.frontend.console.api import CONSOLE

    from nemo_cpt.executors.slurm_job import SlurmJob

    check_executor(executor, detach)
    jobs.check_ended(array.folder / EXPERIMENT, "is making these parts")
    logs = Path()
    title = re.sub(r"[^\w.-]", "-", array.name)  # of a folder, and in scripts
    try:
        with run.Experiment(title, executor=executor, enable_goodbye_message=False) as experiment:
            logs = Path(experiment._exp_dir)
            # Before anything is submitted: a second command must find out that these are at work.
            (array.folder / EXPERIMENT).write_text(experiment._id)
            (_add_to_slurm if isinstance(executor, SlurmJob) else _add_processes)(experiment, array, executor)
            experiment.run(detach=detach)
    # Told to stop: it is no task's failure, whose log would have to be shown.
    except StoppedEarlyError:
        raise
    except CptError as error:
        raise CptError(_what_failed(array, logs, error)) from error
    finally:
        # Where stdout is no terminal, rich ends the tasks' box in the middle of a line.
        if not CONSOLE.is_terminal:
            CONSOLE.line()
    return str(experiment._id)


def _add_to_slurm(experiment: Any, array: Array, executor: Any) -> None:
    before = []
    if array.numbers:
        tasks = executor.clone()
        tasks.array = as_ranges(array.numbers)
        if tasks.preempt_seconds is None:
            tasks.give_time_to_save(STOP_SECONDS)
        # One job of many tasks: Slurm starts and counts them, and the shell puts each one's number in.
        before = [experiment.add(_script(array.task, array.folder, "$SLURM_ARRAY_TASK_ID"), tasks, name="tasks")]
    join = executor.clone()
    if join.preempt_seconds is None:
        join.give_time_to_save(STOP_SECONDS)
    experiment.add(_script(array.join, array.folder), join, name="join", dependencies=before)


def _add_processes(experiment: Any, array: Array, executor: Any) -> None:
    for number in array.numbers:
        process = executor.clone()
        process.ntasks_per_node, process.launcher = 1, None
        experiment.add(_script(array.task, array.folder, str(number)), process, name=f"task-{number}")


def _script(function: str, folder: Path, number: str = "") -> Any:
    import nemo_run as run

    # NeMo-Run puts its own folder wherever a script has /nemo_run: to the shell, quotes around nothing are nothing.
    path = shlex.quote(str(folder)).replace("/nemo_run", "/''nemo_run")
    # exec: the signal that is to stop the task must reach it, and not a shell.
    return run.Script(inline=f"exec python -m {TASK_MODULE} {function} {path} {number}\n")


def as_ranges(numbers: Sequence[int]) -> str:
    """Return numbers as sbatch takes them: `0-3,7`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _what_failed(array: Array, logs: Path, error: CptError) -> str:
    """Say which tasks did not end well, with the end of each one's log; what the executor says where all did."""
    from nemo_cpt.executors.nemo_run_patches import last_lines

    try:
        failed = [number for number in array.missing() if number in array.numbers]
    except CptError:  # it would say what is wrong with an input; the logs do
        failed = []
    if not failed or not logs.is_dir():
        return error.message
    said = []
    for number in failed[:5]:
        log = _log_of(logs, number)
        said.append(f"task {number}: {last_lines(log) if log else 'it left no log, and may not have been started'}")
    more = f" (the first {len(said)} of them below)" if len(said) < len(failed) else ""
    heading = (
        f"{len(failed)} of {len(array.numbers)} tasks did not end well{more}; the same command runs these alone. The "
        f"logs are in {logs}"
    )
    return "\n".join([heading, *said])


def _log_of(logs: Path, number: int) -> Path | None:
    """The newest log of a task that is not empty: of the task itself, else of its job's script."""
    for pattern in (f"tasks/log-*_{number}.out", f"tasks/sbatch_*_{number}.out", f"task-{number}/**/combined.log"):
        found = [path for path in logs.glob(pattern) if path.stat().st_size]
        if found:
            return max(found, key=os.path.getmtime)
    return None
