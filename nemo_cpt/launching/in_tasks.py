"""`prepare` and `clean` by many tasks: planned here, made on an executor, joined behind them."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.arguments import checked
from nemo_cpt.cleaning.rules import Rules
from nemo_cpt.corpus.plan import Plan, remove_parts
from nemo_cpt.corpus.preparing import parts
from nemo_cpt.corpus.preparing.estimate import Estimate, estimate
from nemo_cpt.corpus.preparing.preparation import PrepareReport
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.reading.sources import PLAN, Inputs
from nemo_cpt.launching.arrays import Array, check_executor, check_named, run_array
from nemo_cpt.launching.executor import executor_maker
from nemo_cpt.output import say

if TYPE_CHECKING:
    from nemo_cpt.cleaning import CleaningReport

SEEN_SECONDS = 120


@dataclass(frozen=True)
class Submitted:
    """What a scheduler has been given.

    Attributes:
        experiment: The experiment's id; empty where nothing was left to do.
        output: The dataset's full prefix, or the cleaning's folder.
        tasks: The tasks that the inputs were cut for.
        missing: Those that are still to be done.
    """

    experiment: str
    output: str
    tasks: int
    missing: int


@checked
def prepare_in_tasks(
    inputs: Inputs,
    output_prefix: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    executor: Any,
    tasks: int,
    *,
    detach: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> PrepareReport | Submitted:
    """Tokenize a corpus with many tasks into the dataset that `prepare` alone would write, byte for byte.

    Each task makes a part, which a killed one goes on with; the same call again makes those that are missing.

    Args:
        inputs: As for `prepare`; every machine must see them under the same paths.
        output_prefix: As for `prepare`; on a file system that all machines share.
        tokenizer: As for `prepare`.
        executor: What `slurm` or `local` returns; a function that returns it, called once there is something to run; or
            None for processes of this machine.
        tasks: How many; fewer where the inputs cannot be cut into as many.
        detach: Return once the tasks, and the job that joins their parts, are submitted.
        overwrite: Replace an existing dataset, and parts of another job.
        options: Further options of `prepare`, by name.

    Raises:
        CptError: As `prepare`; the executor cannot run arrays; a task failed, with the end of its log.
    """
    if executor is not None and not callable(executor):
        check_executor(executor, detach)
    plan, loaded = parts.make_plan(inputs, output_prefix, tokenizer, tasks, overwrite, **options)
    whole = parts.whole(plan, loaded)
    if whole.is_there(parts.settings_of(plan).policy, overwrite):
        remove_parts(plan.folder)
        return whole.report(parts.settings_of(plan), "unchanged", {})
    executor = _made(executor, detach)
    # Once the executor is known; no part of what makes the job, which may go on with other workers.
    plan.settings["options"]["workers"] = _workers(options.get("workers"), executor, tasks)
    _say_if_fewer(plan, tasks)
    numbers = parts.take_up(plan, loaded)
    name = f"prepare-{Path(output_prefix).name}"
    array = _array(name, plan, parts.prepare_part, parts.join, numbers, lambda: parts.missing(plan, loaded))
    submitted = _carry_out(array, plan, executor, whole.prefix if detach else "")
    return submitted or _just_made(parts.join(plan.folder))


@checked
def clean_in_tasks(
    inputs: Inputs,
    output: str | os.PathLike[str],
    rules: Rules | str,
    executor: Any,
    tasks: int,
    *,
    detach: bool = False,
    **options: Any,
) -> "CleaningReport | Submitted":
    """Clean a corpus with many tasks into the files that `clean` alone would write, byte for byte.

    Each task takes a share of the documents through the rules; the job behind them finds duplicates over all.

    Args:
        inputs: As for `clean`; every machine must see them, and evaluation sets, under the same paths.
        output: As for `clean`; on a file system that all machines share.
        rules: As for `clean`.
        executor: What `slurm` or `local` returns; a function that returns it, called once there is something to run; or
            None for processes of this machine.
        tasks: How many; fewer where the inputs cannot be cut into as many.
        detach: Return once the tasks, and the job that joins their parts, are submitted.
        options: Further options of `clean`, by name.

    Raises:
        CptError: As `clean`; the executor cannot run arrays; a task failed, with the end of its log.
    """
    from nemo_cpt.cleaning import parts as cleaned

    if executor is not None and not callable(executor):
        check_executor(executor, detach)
    # What only makes an executor is not called yet: to import NeMo-Run for an output that is there takes seconds.
    plan = cleaned.make_plan(inputs, output, rules, tasks, **options)
    if (report := cleaned.existing(plan)) is not None:
        remove_parts(plan.folder)
        return report
    executor = _made(executor, detach)
    plan.settings["workers"] = _workers(options.get("workers"), executor, tasks)
    _say_if_fewer(plan, tasks)
    numbers = plan.take_up(lambda: cleaned.missing(plan))
    name = f"clean-{Path(output).name}"
    array = _array(name, plan, cleaned.clean_part, cleaned.join, numbers, lambda: cleaned.missing(plan))
    submitted = _carry_out(array, plan, executor, str(plan.folder.parent) if detach else "")
    return submitted or _just_made(cleaned.join(plan.folder))


def executor_named(name: str, options: Sequence[str], detach: bool = False) -> Callable[[], Any] | None:
    """Return what makes an executor by its name, or None for processes of this machine.

    So what asks for no executor, such as an output that is there already, does not wait for NeMo-Run's import.

    Raises:
        CptError: There is none of that name, an option is wrong, or it cannot run arrays.
    """
    make = executor_maker(name, options, processes=1)
    check_named(name, detach)
    return None if name == "local" and not options else make


def _made(executor: Any, detach: bool = False) -> Any:
    if executor is None:
        from nemo_cpt.executors import local

        executor = local()
    elif callable(executor):
        executor = executor()
    check_executor(executor, detach)
    return executor


def _say_if_fewer(plan: Plan, tasks: int) -> None:
    if (made := len(plan.shares)) < tasks:
        say(f"nemo-cpt: {made} tasks, not {tasks}: there are not as many lines, or files that can be cut", sys.stderr)


def _array(
    name: str,
    plan: Plan,
    task: Callable[..., Any],
    join: Callable[..., Any],
    numbers: list[int],
    missing: Callable[[], list[int]],
) -> Array:
    task_name, join_name = (f"{each.__module__}:{each.__name__}" for each in (task, join))
    return Array(name, plan.folder, task_name, join_name, numbers, missing)


def _carry_out(array: Array, plan: Plan, executor: Any, detached: str) -> Submitted | None:
    """Run an array; return what was submitted where nobody waits for the output, `detached`."""
    experiment = ""
    # On Slurm the join is a job too, also where it alone is left; here it is for the caller.
    if array.numbers or not _is_local(executor):
        experiment = run_array(array, executor, bool(detached))
        if not (detached or _is_local(executor)):
            _wait_to_see_the_join(plan.folder)
    return Submitted(experiment, detached, len(plan.shares), len(array.numbers)) if detached else None


def _just_made(report: Any) -> Any:
    """A report, also where a job has joined the parts and there is nothing left to do here."""
    return replace(report, status="written") if report.status == "unchanged" else report


def _wait_to_see_the_join(folder: Path) -> None:
    """Network file systems show what another machine did up to a minute late; the join removes the plan last."""
    deadline = time.monotonic() + SEEN_SECONDS
    while (folder / PLAN).exists() and time.monotonic() < deadline:
        time.sleep(0.5)


@checked
def plan_in_tasks(
    inputs: Inputs,
    output_prefix: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    executor: Any,
    tasks: int,
    **options: Any,
) -> Estimate:
    """Estimate what `prepare_in_tasks` would take with these arguments; nothing is written.

    Raises:
        CptError: As `prepare_in_tasks` before it begins; the inputs have no size.
    """
    plan, loaded = parts.make_plan(inputs, output_prefix, tokenizer, tasks, **options)
    if executor is not None:  # else nothing of it is to be asked for
        executor = _made(executor)
    workers = _workers(options.get("workers"), executor, tasks)
    return estimate(plan, loaded, workers or _cpus_per_task(executor))


def _workers(given: int | None, executor: Any, tasks: int) -> int | None:
    """Processes of a task: on this machine they share its CPUs; on Slurm each has those that it was given."""
    # tasks below 1 is refused later, with its own words.
    if given is not None or tasks < 1 or not _is_local(executor):
        return given
    return max(count_processes(None) // tasks, 1)


def _cpus_per_task(executor: Any) -> int:
    # Where `slurm(cpus_per_task=...)` puts it, like every directive; else NeMo-Run's own field.
    asked = executor.additional_parameters.get("cpus_per_task") or executor.cpus_per_task
    return int(asked or 1)


def _is_local(executor: Any) -> bool:
    if executor is None:
        return True
    import nemo_run as run

    return isinstance(executor, run.LocalExecutor)
