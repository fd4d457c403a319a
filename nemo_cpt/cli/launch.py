"""Commands of `nemo-cpt`: recipes, and the jobs that run them."""

import contextlib
import json as jsonlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.recipe_arguments import Executor, Pairs, Recipe, RecipeCommand, RecipeIfAny, from_file
from nemo_cpt.cli.tables import print_pairs, print_table
from nemo_cpt.errors import CptError
from nemo_cpt.output import say_that_nemo_loads

if TYPE_CHECKING:
    from nemo_cpt.catalog import Function

PANEL = "Recipes and jobs"
EXIT_RED = 3  # of what looks at a job, and finds that it could not run
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Experiment = Annotated[str | None, typer.Argument(help="The experiment's id, as run prints it; by default the latest.")]


@app.command("recipes", rich_help_panel=PANEL)
def recipes_command(
    recipe: RecipeIfAny = None,
    base: Annotated[
        Path | None, typer.Option(help="Which are made for it: a Hugging Face folder, a NeMo base, or a run.")
    ] = None,
    json: Json = False,
) -> None:
    """List the recipes, or one recipe's parameters; with --base those that are made for a model."""
    from nemo_cpt import catalog

    if base is not None:
        if recipe:
            raise CptError(f"--base compares every recipe with {base}: leave {recipe} away")
        return _print_recipes_for(base, json)
    found = [catalog.recipe(recipe)] if recipe else list(catalog.recipes().values())
    if json:
        print(jsonlib.dumps({each.name: _as_dict(each) for each in found}, indent=2))
    elif recipe:
        _print_parameters(found[0])
    else:
        rows = [(each.name, str(each.gpus({}) or "CPU"), _required(each), each.summary) for each in found]
        print_table(("recipe", "GPUs", "needs", "what"), rows)


@app.command(rich_help_panel=PANEL, cls=RecipeCommand)
def show(
    recipe: Recipe,
    overrides: Pairs = None,
    config: Annotated[bool, typer.Option("--config", help="A configuration file for run instead.")] = False,
    executor: Executor = None,
) -> None:
    """Print the resolved config of a recipe as YAML; with --config the file that run takes.

    The resolved config has every field; building it imports NeMo. The configuration file has what is given, and each
    other parameter as a comment.
    """
    from nemo_cpt import catalog
    from nemo_cpt.catalog.build import build_recipe
    from nemo_cpt.launching.config_file import written

    # A built recipe knows no executor; the configuration file names one.
    if executor and not config:
        raise CptError("--executor is for --config: the resolved config is the recipe's alone")
    recipe, pairs, executor = from_file(recipe, overrides, executor)
    if config:
        return print(written(catalog.recipe(recipe), pairs, executor), end="")
    function, arguments, fields, _ = catalog.split(recipe, pairs)
    say_that_nemo_loads()
    partial = build_recipe(function.name, arguments, fields)
    from nemo_run.core.serialization.yaml import YamlSerializer

    from nemo_cpt.executors import nemo_run_patches

    nemo_run_patches.write_what_fields_hold()
    print(YamlSerializer().serialize(partial))


@app.command(rich_help_panel=PANEL)
def copy(
    recipe: Recipe,
    file: Annotated[Path, typer.Argument(help="Where to write it: a script (.py), or a configuration file (.yaml).")],
) -> None:
    """Copy a recipe into a script to edit and run, or into a configuration file (.yaml)."""
    from nemo_cpt import catalog
    from nemo_cpt.launching.config_file import ENDINGS, written
    from nemo_cpt.launching.scripts import write_new, write_script

    found = catalog.recipe(recipe)
    # The ending says what is wanted, as everywhere.
    if file.suffix in ENDINGS:
        write_new(written(found, []), file)
        print(f"wrote {file}; edit it, then: nemo-cpt run {file}")
    elif file.suffix == ".py":
        write_script(found, file)
        print(f"wrote {file}; edit it, then: python {file}")
    else:
        raise CptError(f"{file}: give a name that ends in .py, for a script, or in {' or '.join(ENDINGS)}")


@app.command(rich_help_panel=PANEL, cls=RecipeCommand)
def run(
    recipe: Recipe,
    overrides: Pairs = None,
    executor: Executor = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once a scheduler has the job.")] = False,
    dryrun: Annotated[
        bool, typer.Option("--dry-run", "--dryrun", help="Print what would be run where, and run nothing.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print the job's log, on a terminal too.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Build the recipe here first; imports NeMo.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Launch although the doctor finds it red.")] = False,
    json: Json = False,
) -> None:
    """Run a recipe on an executor; ends non-zero if the job fails.

    On a terminal a local job is shown as `nemo-cpt watch` does, and its log goes to a file, which the key l shows. A
    dry run ends with 3 where the job would be refused.

    Parameters are checked at once, and so is what `nemo-cpt doctor` finds without importing anything: a job that could
    not start is refused. To plan a GPU recipe's memory, and how long it takes to save, a process imports NeMo the first
    time that the recipe is run with these arguments (20 s); what it read is remembered. Fields of the config
    (trainer.log_every_n_steps=5) are checked before submission to another machine, which imports NeMo; so does --check.
    """
    from nemo_cpt import catalog
    from nemo_cpt.catalog.build import build_recipe
    from nemo_cpt.doctor.preflight import preflight
    from nemo_cpt.launching import dry_run, jobs
    from nemo_cpt.launching.description import describe, moves_its_folder
    from nemo_cpt.launching.executor import make_executor, own_executor, sized
    from nemo_cpt.launching.task import nothing_to_train
    from nemo_cpt.watching.launch_view import launch_view
    from nemo_cpt.watching.terminal import shows_views

    # From here to `submit` each step costs more than the one before: what can be refused is refused early.
    recipe, pairs, executor = from_file(recipe, overrides, executor)
    function, arguments, fields, options = catalog.split(recipe, pairs)
    with only_json_on_stdout(json):
        # Called once: it may do more than to return one.
        own = own_executor(executor, options)
        job = describe(function, arguments, fields, executor, options, own)
        # Not for a cluster's files, which this machine does not see.
        if job.place.same_files and (said := nothing_to_train(function.name, arguments, fields, job.place.here)):
            # sys.stdout leads to stderr in this block.
            print(said if not json else jsonlib.dumps({"finished": said}), file=sys.__stdout__)
            return
        # A dry run is to show the script, whatever this machine lacks.
        errors = preflight(job, force=force or dryrun, how_to_force="--force", speaker="nemo-cpt")
        if check or (fields and executor != "local"):
            build_recipe(function.name, arguments, fields)
        on_gpus = bool(function.gpus(arguments))
        processes = job.settings.gpus_per_node or 1
        where = (
            sized(own, processes, on_gpus)
            if own
            else make_executor(executor, options, processes, job.num_nodes, on_gpus)
        )
        if detach:
            jobs.check_detaches(where)
        # A CPU recipe saves in seconds: its plan would cost NeMo's import for nothing.
        if on_gpus:
            jobs.give_time_to_save(where, function, arguments, fields)
        if dryrun:
            result = dict(dry_run.rows(job, function, arguments, fields, options, where))
            result |= jobs.prepared(function, arguments, fields, where)
            refused = [] if force else [str(each) for each in errors]
        else:
            # A view needs the run's files, whose folder must be known and on this machine.
            plain = plain or json or detach or executor != "local" or moves_its_folder(fields)
            plain = plain or not shows_views(sys.stdout)
            with contextlib.nullcontext() if plain else launch_view(job.directory) as begun:
                result = jobs.submit(function, arguments, fields, where, detach, begun)
    if dryrun and not json:
        shown = result | {"submitted": "nothing: this is a dry run; --json shows what would be"}
        if refused:
            shown["submitted"] = (
                f"nothing, and without --dry-run it would be refused; errors, see above: {len(refused)}"
            )
        print_pairs(shown.items())
    if json:
        print(jsonlib.dumps(result | ({"refused": refused} if dryrun else {})))
    if dryrun and refused:
        raise typer.Exit(EXIT_RED)


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
    with only_json_on_stdout(json):
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
    # What was there is printed first; `follow` begins behind it.
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

    with only_json_on_stdout(json):
        cancelled = jobs.cancel(experiment)
    if json:
        return print(jsonlib.dumps(cancelled))
    if cancelled["tasks"]:
        print(f"cancelled {cancelled['experiment']}: {', '.join(cancelled['tasks'])}")
    for task, state in cancelled["ended"].items():
        print(f"{task} of {cancelled['experiment']} had ended already: {state or 'UNKNOWN'}")
    for task in cancelled["killed"]:
        print(f"{task} did not save in time and was killed: it goes on from its last checkpoint")


@contextlib.contextmanager
def only_json_on_stdout(json: bool) -> Iterator[None]:
    """With --json, let what is printed within, NeMo-Run's panels and the job's log, go to stderr."""
    # What scripts read from stdout is one object, whatever NeMo-Run prints.
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


def _print_recipes_for(base: Path, json: bool) -> None:
    from nemo_cpt.catalog.matching import recipes_for, takes_like_base
    from nemo_cpt.launching.results import checkpoint_folder

    folder = checkpoint_folder(base)
    found = recipes_for(folder)
    if json:
        return print(jsonlib.dumps({name: {"fits": not why, "why_not": why} for name, (_, why) in found.items()}))
    rows = [(name, str(each.gpus({}) or "CPU"), "no" if why else "yes", why or each.summary)
            for name, (each, why) in found.items()]  # fmt: skip
    print_table(("recipe", "GPUs", "fits", "what, or why not"), sorted(rows, key=lambda row: row[2] != "yes"))
    if hint := takes_like_base(folder):
        print(hint)


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
