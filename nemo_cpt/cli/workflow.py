"""Commands of `nemo-cpt`: workflows, many steps as one file."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nemo_cpt.cli import app
from nemo_cpt.cli.tables import print_json, print_table

RUN = "run"
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class _FileFirst(TyperGroup):
    """A group whose `run` needs not be written: `nemo-cpt workflow FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
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
    force: Annotated[bool, typer.Option("--force", help="Train although the doctor finds it red.")] = False,
    json: Json = False,
) -> None:
    """Run the steps of a workflow that are not done; a killed or stopped one goes on.

    A step is done as long as what it reads, its parameters and what it made are the same, by content. Ends with 75
    where it was told to stop, and with 2 where a step cannot work.
    """
    from nemo_cpt.workflow import Chosen, load, run

    workflow, chosen = load(file), Chosen(until, redo or (), start_from, force)
    if dry_run:
        return _show(workflow, chosen, json)
    record = run(workflow, chosen, say=lambda line: print(line, file=sys.stderr if json else sys.stdout, flush=True))
    if json:
        print_json(record)


def _show(workflow: Any, chosen: Any, json: bool) -> None:
    from nemo_cpt.workflow.dry_run import COLUMNS, dry_run

    found = dry_run(workflow, chosen)
    if json:
        return print_json(found.as_dict())
    print_table(COLUMNS, found.rows())
    for line in found.lines():
        print(line)


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
