"""Commands of `nemo-cpt`: workflows, many steps as one file."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nemo_cpt.cli import app
from nemo_cpt.cli.launch import EXIT_RED
from nemo_cpt.cli.recipe_arguments import Executor
from nemo_cpt.cli.tables import print_json, print_table
from nemo_cpt.errors import CptError

RUN = "run"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class _FileFirst(TyperGroup):
    """A group whose `run` needs not be written: `nemo-cpt workflow FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # A file named `new` or `compare` is written ./new.
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


workflow_app = typer.Typer(
    cls=_FileFirst, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]}
)
app.add_typer(
    workflow_app,
    name="workflow",
    rich_help_panel="Recipes and jobs",
    help="Run a file of steps, from raw text to a served model: FILE, or new, compare.",
)


@workflow_app.command(RUN)
def run_command(
    file: Annotated[Path, typer.Argument(help="The workflow: a .yaml or a .py file.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print where each step stands and what it would take, and run nothing.")
    ] = False,
    until: Annotated[str | None, typer.Option(help="Run this step and what it needs, and no more.")] = None,
    redo: Annotated[list[str] | None, typer.Option(help="Make this step again; repeatable.")] = None,
    start_from: Annotated[
        str | None, typer.Option("--from", help="Make this step again, and all that need it.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="executor.key=value: the executor's options, of all steps.")
    ] = None,
    executor: Executor = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once the jobs are submitted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Train although the doctor finds it red.")] = False,
    json: Json = False,
) -> None:
    """Run the steps of a workflow that are not done; a killed or stopped one goes on.

    A step is done as long as what it reads, its parameters and what it made are the same, by content. Ends with 75
    where it was told to stop, and with 2 where a step cannot work; a dry run with 3 where a run would be refused. With
    --executor each step is a job, behind those that it needs.
    """
    from nemo_cpt.workflow import Chosen, load, run

    workflow, chosen = load(file), Chosen(until, redo or (), start_from, force)
    own = _own_options(options or [], executor)
    if dry_run:
        return _show(workflow, chosen, str(executor or "local"), own or [], json)
    # An empty list too: an executor may need no options.
    if own is not None:
        return _submit(file, chosen, str(executor), own, detach, json)
    if detach:
        raise CptError("--detach is for jobs on an --executor: the steps run in this process")
    record = run(workflow, chosen, say=lambda line: print(line, file=sys.stderr if json else sys.stdout, flush=True))
    if json:
        print_json(record)


def _own_options(pairs: list[str], executor: str | None) -> list[str] | None:
    """The executor's options, without `executor.`; None where the steps run here."""
    prefix = "executor."
    if unknown := [pair for pair in pairs if not pair.startswith(prefix)]:
        raise CptError(f"{unknown[0]}: a step's parameters stand in the file; here only {prefix}key=value")
    # "local" is where steps run anyhow, each in a process of its own.
    if executor in (None, "local"):
        if pairs:
            raise CptError(f"{pairs[0]} is for an --executor, and the steps run here")
        return None
    from nemo_cpt.launching.description import place

    found = [pair.removeprefix(prefix) for pair in pairs]
    place(str(executor), found)  # which refuses what is misspelt
    return found


def _submit(file: Path, chosen: Any, executor: str, options: list[str], detach: bool, json: bool) -> None:
    from nemo_cpt.workflow.cluster import submit

    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        found = submit(file, chosen, executor, options, detach)
    if json:
        print_json(found)
    elif found["experiment"]:
        print(f"experiment {found['experiment']}: nemo-cpt status|logs|cancel {found['experiment']}")
    else:
        print("every step is done")


def _show(workflow: Any, chosen: Any, executor: str, options: list[str], json: bool) -> None:
    from nemo_cpt.workflow.dry_run import COLUMNS, dry_run

    found = dry_run(workflow, chosen, executor=executor, options=options)
    if json:
        print_json(found.as_dict())
    else:
        print_table(COLUMNS, found.rows())
        print("\n".join(found.lines()))
    if found.refused:
        raise typer.Exit(EXIT_RED)


@workflow_app.command("new")
def new_command(
    kind: Annotated[str, typer.Argument(help="demo, japanese, single-gpu, domain-lora or from-scratch.")],
    file: Annotated[Path, typer.Argument(help="Where to write it: .yaml with comments, or .py.")],
) -> None:
    """Write a workflow to edit: the CPU demo, the recorded run, one GPU, a domain with LoRA, a model of one's own."""
    from nemo_cpt.workflow.files import write_kind

    write_kind(kind, file)
    print(f"wrote {file}; edit it, then: nemo-cpt workflow {file} --dry-run")


@workflow_app.command("compare")
def compare_command(
    one: Annotated[Path, typer.Argument(help="A record.json, its folder, or the workflow's file.")],
    other: Annotated[Path, typer.Argument(help="The one to compare with.")],
    json: Json = False,
) -> None:
    """Say what differs between two runs of a workflow: versions, parameters, inputs, results, times."""
    from nemo_cpt.workflow.comparison import COLUMNS, compare

    found = compare(one, other)
    if json:
        return print_json({"differences": [dict(zip(COLUMNS, row, strict=True)) for row in found]})
    if not found:
        return print("nothing differs")
    print_table(COLUMNS, found)
