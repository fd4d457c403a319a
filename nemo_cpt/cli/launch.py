"""Commands of `nemo-cpt`: recipes, and the jobs that run them."""

import contextlib
import json as jsonlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.recipe_arguments import Executor, Pairs, Recipe, RecipeCommand, RecipeIfAny
from nemo_cpt.cli.tables import print_table

if TYPE_CHECKING:
    from nemo_cpt.catalog import Function

PANEL = "Recipes and jobs"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Experiment = Annotated[str | None, typer.Argument(help="The experiment's id, as run prints it; by default the latest.")]


@app.command("recipes", rich_help_panel=PANEL)
def recipes_command(
    recipe: RecipeIfAny = None,
    json: Json = False,
) -> None:
    """List the recipes, or one recipe's parameters."""
    from nemo_cpt import catalog

    found = [catalog.recipe(recipe)] if recipe else list(catalog.recipes().values())
    if json:
        print(jsonlib.dumps({each.name: _as_dict(each) for each in found}, indent=2))
    elif recipe:
        _print_parameters(found[0])
    else:
        rows = [(each.name, str(each.gpus({}) or "CPU"), _required(each), each.summary) for each in found]
        print_table(("recipe", "GPUs", "needs", "what"), rows)


@app.command(rich_help_panel=PANEL, cls=RecipeCommand)
def show(recipe: Recipe, overrides: Pairs = None) -> None:
    """Print the resolved config of a recipe as YAML."""
    from nemo_cpt import catalog
    from nemo_cpt.catalog.build import build_recipe

    function, arguments, fields, _ = catalog.split(recipe, overrides or [])
    partial = build_recipe(function.name, arguments, fields)
    from nemo_run.core.serialization.yaml import YamlSerializer

    print(YamlSerializer().serialize(partial))


@app.command(rich_help_panel=PANEL)
def copy(recipe: Recipe, file: Annotated[Path, typer.Argument(help="Where to write the script.")]) -> None:
    """Copy a recipe into a script to edit and run."""
    from nemo_cpt import catalog
    from nemo_cpt.launching.scripts import write_script

    write_script(catalog.recipe(recipe), file)
    print(f"wrote {file}; edit it, then: python {file}")


@app.command(rich_help_panel=PANEL, cls=RecipeCommand)
def run(
    recipe: Recipe,
    overrides: Pairs = None,
    executor: Executor = "local",
    detach: Annotated[bool, typer.Option("--detach", help="Return once the job is submitted.")] = False,
    dryrun: Annotated[bool, typer.Option("--dryrun", help="Print what would be submitted.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Build the recipe here first; imports NeMo.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Launch although the doctor finds it red.")] = False,
    json: Json = False,
) -> None:
    """Run a recipe on an executor; ends non-zero if the job fails.

    Parameters are checked at once, and so is what `nemo-cpt doctor` finds without importing anything: a job that could
    not start is refused. To plan a GPU recipe's memory, and how long it takes to save, a process imports NeMo the first
    time that the recipe is run with these arguments (20 s); what it read is remembered. Fields of the config
    (trainer.log_every_n_steps=5) are checked before submission to another machine, which imports NeMo; so does --check.
    """
    from nemo_cpt import catalog
    from nemo_cpt.catalog.build import build_recipe
    from nemo_cpt.doctor.preflight import preflight
    from nemo_cpt.launching import jobs
    from nemo_cpt.launching.description import describe
    from nemo_cpt.launching.executor import make_executor
    from nemo_cpt.launching.task import nothing_to_train

    # From here to `submit` each step costs more than the one before: what can be refused is refused early.
    function, arguments, fields, options = catalog.split(recipe, overrides or [])
    with _only_json_on_stdout(json):
        job = describe(function, arguments, fields, executor, options)
        # Not for a cluster's files, which this machine does not see.
        if job.place.same_files and (said := nothing_to_train(function.name, arguments, fields, job.place.here)):
            print(said if not json else jsonlib.dumps({"finished": said}), file=sys.__stdout__)
            return
        # A dry run is to show the script, whatever this machine lacks.
        preflight(job, force=force or dryrun, how_to_force="--force", speaker="nemo-cpt")
        if check or (fields and executor != "local"):
            build_recipe(function.name, arguments, fields)
        where = make_executor(executor, options, function.processes(arguments))
        # A CPU recipe saves in seconds: its plan would cost NeMo's import for nothing.
        if function.gpus(arguments):
            jobs.give_time_to_save(where, function, arguments, fields)
        result = jobs.submit(function, arguments, fields, where, detach, dryrun)
    if json:
        print(jsonlib.dumps(result))


@app.command(rich_help_panel=PANEL)
def status(
    experiment: Annotated[str | None, typer.Argument(help="The experiment's id; by default all are listed.")] = None,
    json: Json = False,
) -> None:
    """List the experiments, the latest first, or show the state of one's tasks.

    The list is read from the disk: the state of a job of a scheduler's is asked for with its experiment's id.
    """
    from nemo_cpt.launching import experiments, jobs

    if experiment is None:
        found = [jobs.listed(each) | {"started": each.started} for each in experiments.experiments()]
        if json:
            return print(jsonlib.dumps({"experiments": found}))
        rows = [
            (each["experiment"], each["started"], task["name"], task["status"] or "-", task["job_id"] or "-")
            for each in found
            for task in each["tasks"]
        ]
        return print_table(("experiment", "started", "task", "status", "job"), rows)
    with _only_json_on_stdout(json):
        one = jobs.status(experiment)
    if json:
        return print(jsonlib.dumps(one))
    tasks = [(one["experiment"], task["name"], task["status"], task["job_id"], task["folder"]) for task in one["tasks"]]
    print_table(("experiment", "task", "status", "job", "folder"), tasks)


@app.command(rich_help_panel=PANEL)
def logs(
    experiment: Experiment = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines from the end.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends, or Ctrl-C.")] = False,
) -> None:
    """Print the end of the logs of an experiment's tasks, headed by their paths."""
    from nemo_cpt.launching import experiments, jobs

    print(jobs.logs(experiment, lines), flush=True)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for text in experiments.follow(experiments.experiment(experiment)):
                print(text, end="", flush=True)


@app.command(rich_help_panel=PANEL)
def cancel(experiment: Experiment = None, json: Json = False) -> None:
    """Stop an experiment's tasks that are queued or running.

    A local job saves first; it is killed if that takes longer than its plan allows, 10 minutes where there is none.
    """
    from nemo_cpt.launching import jobs

    with _only_json_on_stdout(json):
        cancelled = jobs.cancel(experiment)
    if json:
        return print(jsonlib.dumps(cancelled))
    print(f"cancelled {cancelled['experiment']}: {', '.join(cancelled['tasks'])}")
    for task in cancelled["killed"]:
        print(f"{task} did not save in time and was killed: it goes on from its last checkpoint")


@contextlib.contextmanager
def _only_json_on_stdout(json: bool) -> Iterator[None]:
    """With --json, let what is printed within, NeMo-Run's panels and the job's log, go to stderr."""
    # What scripts read from stdout is one object, whatever NeMo-Run prints.
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


def _required(function: "Function") -> str:
    return ", ".join(name for name, each in function.parameters.items() if each.default is None) or "-"


def _as_dict(function: "Function") -> dict[str, Any]:
    parameters = {
        name: {"type": each.annotation, "default": each.default, "help": each.help}
        for name, each in function.parameters.items()
    }
    return {"summary": function.summary, "gpus": function.gpus({}), "parameters": parameters}


def _print_parameters(function: "Function") -> None:
    print(f"{function.name}: {function.summary}\n")
    rows = [
        (each.name, each.annotation, each.default or "required", each.help) for each in function.parameters.values()
    ]
    print_table(("parameter", "type", "default", "what"), rows)
