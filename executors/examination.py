"""The doctor's look at every recipe that NeMo-Run launches from Python, as `nemo-cpt run` has it.

It stands where NeMo-Run starts tasks, because that is what every way has in common: `run.run` with any executor or
none, `run.Experiment`, `nemo llm ...`. A function to call instead of `run.run` would be forgotten, and a callback of
the trainer comes too late: without a GPU the trainer is not even built.
"""

import ast
import contextlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.errors import CptError, exit_with_the_message
from nemo_cpt.executors import window
from nemo_cpt.executors.tracking import in_its_wandb_run

if TYPE_CHECKING:
    from nemo_cpt.doctor import Place

FORCE = "NEMO_CPT_FORCE"


@cache
def examine_before_launch() -> None:
    """Have NeMo-Run refuse what could not run, with the doctor's words; once a process."""
    import nemo_run
    from nemo_run import Script
    from nemo_run.run import api, job, task
    from nemo_run.run.experiment import Experiment

    add: Callable[..., str] = Experiment.add
    launch: Callable[..., Any] = Experiment.run
    show: Callable[..., None] = Experiment.dryrun
    run_here: Callable[..., None] = task.direct_run_fn
    start: Callable[..., None] = api.run

    @wraps(start)
    def start_by_name(
        fn_or_script: Any, executor: Any = None, plugins: Any = None, name: str = "", *args: Any, **kwargs: Any
    ) -> None:
        # NeMo-Run's own would be llm.pretrain's, the same for every run, in its lists as in Slurm's.
        start(fn_or_script, executor, plugins, name or name_of_run(fn_or_script), *args, **kwargs)

    @wraps(add)
    def check_and_add(experiment: Any, task: Any, executor: Any = None, *args: Any, **kwargs: Any) -> str:
        for each in executor if isinstance(executor, list) else [executor or experiment.executor]:
            check_executor(each)
            if isinstance(task, list):
                check_takes_groups(each)
        return add(experiment, task, executor, *args, **kwargs)

    @wraps(launch)
    def examine_and_launch(
        experiment: Any, sequential: bool = False, detach: bool = False, tail_logs: bool = False, direct: bool = False
    ) -> Any:
        # direct: `run_here` examines; launched or reconstructed: it runs already.
        if not (direct or experiment._launched or experiment._reconstruct):
            tasks = list(tasks_of(experiment, sequential))
            if not all(isinstance(each, Script) for each, *_ in tasks):  # for which a job executes no Python
                check_guarded()
            for each, executor, comes_first in tasks:
                examine_task(each, place_of(executor), comes_first)
        return launch(experiment, sequential, detach, tail_logs, direct)

    @wraps(show)
    def examine_and_show(
        experiment: Any, log: bool = True, exist_ok: bool = False, delete_exp_dir: bool = True
    ) -> None:
        # Without a log it is the beginning of a launch, which was examined.
        for each, executor, comes_first in tasks_of(experiment, False) if log else ():
            examine_task(each, place_of(executor), comes_first, dryrun=True)
        show(experiment, log, exist_ok, delete_exp_dir)

    @wraps(run_here)
    def examine_and_run_here(configured: Any, dryrun: bool = False) -> None:
        examine_task(configured, place_of(None))  # of a dry run too: NeMo-Run builds the recipe for it
        if dryrun:
            return run_here(configured, dryrun)
        with in_its_wandb_run(configured):
            run_here(configured, dryrun)

    nemo_run.run = api.run = start_by_name
    Experiment.add = check_and_add
    Experiment.run = examine_and_launch
    Experiment.dryrun = examine_and_show
    # Each of them imported the function by its name.
    for module in (api, job, task):
        module.direct_run_fn = examine_and_run_here


def name_of_run(task: Any) -> str:
    """A recipe's name= where an experiment may be called so, as shells' commands and clouds' clusters are; or ""."""
    name = getattr(getattr(task, "log", None), "name", None)
    return name if isinstance(name, str) and re.fullmatch(r"[a-zA-Z][\w.-]*", name, re.ASCII) else ""


def check_executor(executor: Any) -> None:
    """Raise CptError for what is no executor, of which NeMo-Run says an AssertionError without a word."""
    from nemo_run import Executor

    if not isinstance(executor, Executor):
        shown = f"{executor.__name__}, not called" if callable(executor) else repr(executor)
        raise CptError(f"the executor is {shown}: give what a function of nemo_cpt.executors returns, such as local()")


def check_takes_groups(executor: Any) -> None:
    """Raise CptError for an executor that makes no groups of tasks: NeMo-Run's AssertionError says nothing of them."""
    from nemo_run.run.job import JobGroup

    # By their exact classes, as NeMo-Run has it: what extends its Slurm starts one training a job.
    if type(executor) not in JobGroup.SUPPORTED_EXECUTORS:
        raise CptError(
            f"a list of tasks is one job of all of them, which {type(executor).__name__} does not make: add each by "
            "its own, experiment.add(task, executor=...); they run side by side, or with dependencies=[...] one behind "
            "the other"
        )


def check_guarded() -> None:
    """Refuse a launch among a script's own lines, outside `if __name__ == "__main__":`.

    NeMo-Run's job executes the launcher's main module again, for what a task needs of it (0.11.1,
    `maybe_load_external_main`): it would launch a second job from within the first, which waits for it. On Slurm that
    one holds its GPUs meanwhile.

    Raises:
        CptError: it is one.
    """
    main = sys.modules["__main__"]
    frame = inspect.currentframe()
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals is vars(main)):
        frame = frame.f_back
    try:
        statements = ast.parse(inspect.getsource(main)).body
    except (TypeError, OSError, SyntaxError):  # an interactive session, of which a job executes nothing
        return
    line = frame.f_lineno if frame else 0
    for each in statements:
        # A package's `__main__.py`: of no package in the job, it ends there, and NeMo-Run goes on without it.
        if isinstance(each, ast.ImportFrom) and each.level:
            return
        guarded = isinstance(each, ast.If) and "__name__" in ast.unparse(each.test)
        if each.lineno <= line <= (each.end_lineno or 0) and not guarded:
            raise CptError(
                f'{main.__file__}, line {line}, launches a job outside `if __name__ == "__main__":`. The job runs this '
                "file again, for what it defines, and would launch another one from within: put the launch, and "
                "whatever else is to happen once, below that line"
            )


def tasks_of(experiment: Any, sequential: bool) -> Iterator[tuple[Any, Any, bool]]:
    """Yield the tasks of an experiment, each with its executor and whether it waits for no other."""
    for number, job in enumerate(experiment.jobs):
        # Only the first tasks find their inputs on the disk now.
        comes_first = not job.dependencies and not (sequential and number)
        if hasattr(job, "tasks"):  # a group
            executors = job.executors if isinstance(job.executors, list) else [job.executors] * len(job.tasks)
            yield from ((task, executor, comes_first) for task, executor in zip(job.tasks, executors, strict=False))
        else:
            yield job.task, job.executor, comes_first


def examine_task(task: Any, place: "Place", comes_first: bool = True, dryrun: bool = False) -> None:
    """Examine what trains; of a task that waits for others, files are not looked at, because they may make them.

    Of a task that trains nothing it is asked only whether its container can be started. A dry run is told what would
    refuse it, and goes on.

    Args:
        task: of NeMo-Run's.
        place: where it is to run.
        comes_first: it waits for no other.
        dryrun: it is not to start.

    Raises:
        CptError: something would stop it.
    """
    from nemo_cpt.doctor.built import job_of
    from nemo_cpt.doctor.containers import check_engine
    from nemo_cpt.doctor.mounts import with_files
    from nemo_cpt.doctor.preflight import preflight
    from nemo_cpt.training.fields import make_plain

    exit_with_the_message()
    make_plain(task)
    place = place if comes_first else replace(place, same_files=False, volumes=None)
    job = job_of(task, place)
    if job is not None:
        force = dryrun or bool(os.environ.get(FORCE))
        preflight(with_files(job), force=force, how_to_force=f"{FORCE}=1", speaker="nemo_cpt")
    elif place.image is not None and not dryrun:
        check_engine(place.image)


def place_of(executor: Any) -> "Place":
    """Where an executor of NeMo-Run's runs a job; None stands for this process."""
    from nemo_run import DockerExecutor, LocalExecutor, LocalTunnel

    from nemo_cpt.doctor import Place
    from nemo_cpt.executors.counts import asks_for_cores, asks_for_memory, cores_of_task
    from nemo_cpt.executors.slurm_job import SlurmJob

    if executor is None:
        return Place("this process", processes=_started_here())
    variables = {name: str(value) for name, value in executor.env_vars.items()}
    if isinstance(executor, LocalExecutor):
        return Place("local", nodes=executor.nodes, processes=executor.ntasks_per_node, environ=variables)
    if isinstance(executor, DockerExecutor):
        image = executor.container_image
        return Place(
            "docker",
            # The image's packages, and of this machine's files those that are mounted (`volumes`).
            same_packages=False,
            same_files=False,
            image=image,
            volumes=tuple(executor.volumes),
            nodes=1,
            processes=executor.ntasks_per_node,
            environ=variables,
        )
    if not isinstance(executor, SlurmJob) or not isinstance(executor.tunnel, LocalTunnel):
        elsewhere = Place(type(executor).__name__, here=False, same_packages=False, same_files=False, environ=variables)
        if isinstance(executor, SlurmJob):  # over SSH
            return replace(elsewhere, nodes=executor.nodes, processes=executor.tasks, tells_nodes=True)
        with contextlib.suppress(NotImplementedError):  # an executor of the user's own need not know
            # NeMo-Run's Slurm answers for torchrun, with a task's GPUs, also where srun starts a process for each.
            processes = max(executor.nproc_per_node(), getattr(executor, "ntasks_per_node", 1))
            return replace(elsewhere, nodes=executor.nnodes(), processes=processes)
        return elsewhere
    in_container = bool(executor.container_image)
    given = vars(executor) | (executor.additional_parameters or {})
    return Place(
        "slurm",
        here=False,
        same_packages=not in_container and executor.python_folder == str(Path(sys.executable).parent),
        same_files=not in_container,
        slurm=True,
        partition=executor.partition,
        nodes=executor.nodes,
        processes=executor.tasks,
        tells_nodes=True,
        limit_seconds=window.seconds_of(executor.time),
        preempt_seconds=executor.preempt_seconds,
        asks_for_cores=asks_for_cores(given),
        cores_of_task=cores_of_task(given),
        asks_for_memory=asks_for_memory(given),
        environ=variables,
    )


def _started_here() -> int | None:
    """Processes of this machine that torchrun started, this one among them; None where another launcher did."""
    if count := os.environ.get("LOCAL_WORLD_SIZE"):
        return int(count)
    return None if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID"} & os.environ.keys() else 1
