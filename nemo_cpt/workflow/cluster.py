"""A workflow on an executor: a job a step, each behind those that it needs, through NeMo-Run's Experiment.

A training is three jobs: one that notes its beginning and clears its way, the recipe's own on its own executor, and one
that notes what it has made. The size of the command's executor, nodes and GPUs, is that of trainings: every other job
is one process, and holds no GPU that it does not use.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError
from nemo_cpt.launching.description import place
from nemo_cpt.launching.executor import make_executor
from nemo_cpt.launching.jobs import check_detaches, give_time_to_save
from nemo_cpt.launching.results import checkpoint_folder
from nemo_cpt.workflow import recipes
from nemo_cpt.workflow.dry_run import dry_run, refuse_red
from nemo_cpt.workflow.files import load
from nemo_cpt.workflow.kinds import EXECUTOR, OWN, TASKS
from nemo_cpt.workflow.page import write_up
from nemo_cpt.workflow.running import Runner
from nemo_cpt.workflow.showing import Shown
from nemo_cpt.workflow.standing import Chosen, standing
from nemo_cpt.workflow.state import DONE, SUBMITTED, State
from nemo_cpt.workflow.steps import Step

BEGIN, WHOLE, END = "begin", "whole", "end"


def submit(file: Path, chosen: Chosen, executor: str, options: Sequence[str], detach: bool = False) -> dict[str, Any]:
    """Submit the steps that are not done, and wait for them unless detached.

    Args:
        file: the workflow's.
        chosen: what of it.
        executor: its name, or FILE.py:FUNCTION; trainings that name their own take that.
        options: `key=value` of the executor.
        detach: return once they are submitted.

    Returns:
        The experiment's id, and the jobs' by their tasks' names.

    Raises:
        CptError: something of it cannot work; the jobs would not see the workflow's files; a step failed.
    """
    workflow = load(file)
    if not place(executor, options).same_files:
        raise CptError(f"jobs on {executor} see other files than this machine: run the workflow on a machine there")
    state = State(workflow)
    with contextlib.chdir(workflow.folder), state.held():
        state.check_not_submitted()
        found = dry_run(workflow, chosen, plan=False, executor=executor, options=options)
        refuse_red(found)
        again, tasks = chosen.again(workflow), dict[str, str]()
        steps = [each.step for each in found.standings if not (each.done or each.earlier)]
        if forever := [step.name for step in steps if step.kind.forever]:
            raise CptError(f"{forever[0]} would hold its job for ever: leave it away with --until, or run it here")
        if shared := [step.name for step in steps if step.kind.in_tasks and TASKS in step.parameters]:
            raise CptError(
                f"{shared[0]} submits {TASKS} of its own, for which its job would wait: run the workflow where jobs "
                f"are submitted, without --executor, or leave its {TASKS} away"
            )
        here = Runner(workflow, state, False, Shown(workflow.name, 1, print))
        for each in found.standings:
            if each.earlier:  # no job is needed to rename a folder
                with state.held(each.step.name):
                    here.put_back(each.step, *each.earlier)
        if not steps:
            return {"experiment": None, "jobs": {}}
        # Before the experiment: the first executor mends NeMo-Run's, whose end is looked up when it begins.
        trains = any(_trains_there(step) for step in workflow.steps.values())
        jobs = {
            step.name: list(_tasks(file.absolute(), step, step.name in again, executor, options, trains))
            for step in steps
        }
        for _, _, where in chain.from_iterable(jobs.values()) if detach else ():
            check_detaches(where)
        import nemo_run as run

        with run.Experiment(f"workflow-{workflow.name}", enable_goodbye_message=False) as experiment:
            # Before anything is submitted: a launcher that is killed meanwhile leaves jobs.
            (state.folder / SUBMITTED).write_text(experiment._id)
            for name, parts in jobs.items():
                behind = [tasks[each] for each in workflow.needs[name] if each in tasks]
                for title, task, where in parts:
                    behind = [experiment.add(task, executor=where, name=title, dependencies=behind, tail_logs=False)]
                (tasks[name],) = behind  # the last of its jobs, which those of the steps behind it wait for
            experiment.run(detach=detach)
        return {"experiment": experiment._id, "jobs": {job.id: job.handle for job in experiment.jobs}}


def _trains_there(step: Step) -> bool:
    """Whether a step trains on GPUs by the command's executor and options alone: where its jobs go there are some."""
    if not step.kind.recipe or EXECUTOR in step.parameters:
        return False
    recipe, arguments, _, own = recipes.split(step.name, step.parameters, step.folder)
    return not own and bool(recipe.gpus(arguments))


def _light(step: Step, executor: str, options: Sequence[str], trains: bool) -> Any:
    """The executor of a job that trains nothing: one process, with one GPU at most."""
    import nemo_run as run

    uses = step.kind.on_gpu and step.parameters.get("device") != "cpu"
    where = make_executor(executor, options, 1, on_gpus=uses and trains)
    if array := getattr(where, "array", None):
        raise CptError(
            f"executor.array={array}: every task of it would do the whole of each step: leave it away; jobs one behind "
            "the other, for a training that is longer than the limit, are executor.chain at its step"
        )
    if isinstance(where, run.LocalExecutor):
        where.nodes = where.ntasks_per_node = 1
        where.launcher = None
    else:
        where.become_one_process(gpu=uses or step.kind is OWN)  # what the user's function uses nobody else knows
    return where


def _tasks(
    file: Path, step: Step, again: bool, executor: str, options: Sequence[str], trains: bool
) -> Iterator[tuple[str, Any, Any]]:
    """A step's jobs: name, task and executor."""
    import nemo_run as run

    def ours(part: str) -> Any:
        return run.Partial(run_part, file=str(file), step=step.name, part=part, again=again)

    light = partial(_light, step, executor, options, trains)
    if not step.kind.recipe:
        yield step.name, ours(WHOLE), light()
        return
    yield f"{step.name}-{BEGIN}", ours(BEGIN), light()
    recipe, arguments, fields, own = recipes.split(step.name, step.parameters, step.folder)
    named = str(step.parameters.get(EXECUTOR, executor))
    shared = options if named == executor else []
    processes, nodes, on_gpus = recipe.processes(arguments), recipe.nodes(arguments), bool(recipe.gpus(arguments))
    where = make_executor(named, [*shared, *own], processes, nodes, on_gpus)
    if on_gpus:
        give_time_to_save(where, recipe, arguments, fields)
    # As plain data: mixtures are made of it in the job.
    plain = {name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
             for name, value in arguments.items()}  # fmt: skip
    yield step.name, run.Partial(train, recipe=recipe.name, arguments=plain, fields=fields), where
    yield f"{step.name}-{END}", ours(END), light()


def train(recipe: str, arguments: dict[str, Any], fields: list[str]) -> None:
    """A training's own job: of a base that is a run, its newest whole checkpoint is looked for here.

    Args:
        recipe: as for `launching.task.run_recipe`.
        arguments: likewise.
        fields: likewise.
    """
    from nemo_cpt.launching.task import run_recipe

    if arguments.get("base") is not None:
        arguments = arguments | {"base": os.fspath(checkpoint_folder(Path(str(arguments["base"]))))}
    run_recipe(recipe, arguments, fields)


def run_part(file: str, step: str, part: str, again: bool) -> None:
    """A job of one step, or of the beginning or the end of a training; run in the job.

    Args:
        file: the workflow's.
        step: the step's name.
        part: `whole`, `begin` or `end`.
        again: it is to be made again.

    Raises:
        CptError: it failed.
        StoppedEarlyError: it was told to stop; started again, the job goes on.
    """
    workflow = load(file)
    chosen, state = workflow.step(step), State(workflow)
    runner = Runner(workflow, state, False, Shown(workflow.name, 1, print))
    try:
        if part == WHOLE:
            with runner.listening():
                runner.take(chosen, again)
        else:
            _note(runner, chosen, part, again)
    finally:
        write_up(state)


def _note(runner: Runner, step: Step, part: str, again: bool) -> None:
    """Note the beginning or the end of a training that is a job of its own."""
    with runner.state.held(step.name):
        record = runner.state.record(step)
        if part == BEGIN:
            found = standing(step, runner.state, again)
            if found.earlier:
                runner.put_back(step, *found.earlier)
            elif not found.done:
                runner.begin(found)
        # A training that was done already has not begun, and its record stands.
        elif record is not None and record.state != DONE:
            # The job that wrote the record has ended: only the file still tells when that was.
            begun = runner.state.path(step.name, "json").stat().st_mtime
            runner.end(step, record, 0, time.time() - begun)
