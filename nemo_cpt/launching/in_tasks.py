"""`prepare` by many tasks: planned here, made on an executor, joined behind them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.plan import remove_parts
from nemo_cpt.corpus.preparing import parts
from nemo_cpt.corpus.preparing.estimate import Estimate, estimate
from nemo_cpt.corpus.preparing.preparation import PrepareReport
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.reading.sources import Inputs
from nemo_cpt.launching.arrays import Array, check_executor, run_array

TASK, JOIN = (f"{parts.__name__}:{name}" for name in ("prepare_part", "join"))


@dataclass(frozen=True)
class Submitted:
    """What a scheduler has been given.

    Attributes:
        experiment: The experiment's id; empty where nothing was left to do.
        prefix: Full prefix of the dataset that it will make.
        tasks: The tasks that the inputs were cut for.
        missing: Those that are still to be done.
    """

    experiment: str
    prefix: str
    tasks: int
    missing: int


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
        executor: What `slurm` or `local` returns.
        tasks: How many; fewer where the inputs cannot be cut into as many.
        detach: Return once the tasks, and the job that joins their parts, are submitted.
        overwrite: Replace an existing dataset, and parts of another job.
        options: Further options of `prepare`, by name.

    Raises:
        CptError: As `prepare`; the executor cannot run arrays; a task failed, with the end of its log.
    """
    check_executor(executor, detach)
    options["workers"] = _workers(options.get("workers"), executor, tasks)
    plan, loaded = parts.make_plan(inputs, output_prefix, tokenizer, tasks, overwrite, **options)
    whole = parts.whole(plan, loaded)
    if whole.is_there(overwrite):
        remove_parts(plan.folder)
        return whole.report(parts.settings_of(plan), "unchanged", {})
    missing = parts.take_up(plan, loaded)
    name = f"prepare-{Path(output_prefix).name}"
    array = Array(name, plan.folder, TASK, JOIN, missing, lambda: parts.missing(plan, loaded))
    experiment = ""
    if missing or not _is_local(executor):
        experiment = run_array(array, executor, detach)
    if detach:
        return Submitted(experiment, whole.prefix, len(plan.shares), len(missing))
    # Slurm's last job has joined them: then this reports.
    return parts.join(plan.folder)


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
    check_executor(executor)
    workers = _workers(options.get("workers"), executor, tasks)
    plan, loaded = parts.make_plan(inputs, output_prefix, tokenizer, tasks, **options)
    return estimate(plan, loaded, workers or _cpus_per_task(executor))


def _workers(given: int | None, executor: Any, tasks: int) -> int | None:
    """Processes of a task: on this machine they share its CPUs; on Slurm each has those that it was given."""
    if given is not None or tasks < 1 or not _is_local(executor):
        return given
    return max(count_processes(None) // tasks, 1)


def _cpus_per_task(executor: Any) -> int:
    asked = executor.additional_parameters.get("cpus_per_task") or executor.cpus_per_task
    return int(asked or 1)


def _is_local(executor: Any) -> bool:
    import nemo_run as run

    return isinstance(executor, run.LocalExecutor)
