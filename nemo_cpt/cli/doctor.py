"""Command of `nemo-cpt`: what would stop a job, and the same looked at before each launch."""

import json as jsonlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.launch import EXIT_RED, PANEL, Json
from nemo_cpt.cli.recipe_arguments import Executor, Pairs, RecipeCommand, RecipeIfAny, from_file

if TYPE_CHECKING:
    from nemo_cpt.doctor import Finding

# The worst first, as they are printed.
MARKS = {"error": ("✘", "red"), "warning": ("!", "yellow"), "ok": ("✔", "green"), "skipped": ("–", "dim")}


@app.command(rich_help_panel=PANEL, cls=RecipeCommand)
def doctor(
    recipe: RecipeIfAny = None,
    overrides: Pairs = None,
    executor: Executor = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Join so many processes of this machine.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that do so, each with MASTER_* and NODE_RANK set.")] = 1,
    hub: Annotated[str | None, typer.Option(help="Ask the hub for access to OWNER/NAME.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="What is green as well, a line each, on a terminal too.")
    ] = False,
    json: Json = False,
) -> None:
    """Look at what would stop a job: versions, driver, GPUs, memory, network, base, data, disk, access, Slurm.

    Ends with 0 where nothing is red, with 3 where something is, with 2 where the command itself is wrong.
    """
    from nemo_cpt import catalog
    from nemo_cpt.doctor import CHECKS, JOB_CHECKS, Examination, examine, worst
    from nemo_cpt.launching.description import describe

    job = None
    if recipe is not None:
        recipe, pairs, executor = from_file(recipe, overrides, executor)
        function, arguments, fields, options = catalog.split(recipe, pairs)
        job = describe(function, arguments, fields, executor, options)
    # A recipe's checks only where one is named: the tuple once, or not at all.
    findings = examine(CHECKS + JOB_CHECKS * (job is not None), Examination(job, ranks, nodes, hub))
    if json:
        verdict = {"verdict": worst(findings), "recipe": job.recipe if job else None}
        print(jsonlib.dumps(verdict | {"checks": [each.as_dict() for each in findings]}, ensure_ascii=False))
    else:
        print_findings(findings, every)
    # 3, not 2: the command itself was right.
    if worst(findings) == "error":
        raise typer.Exit(EXIT_RED)


def print_findings(findings: Sequence["Finding"], every: bool = False) -> None:
    """Reds and yellows first. On a terminal all others are one line; elsewhere each is a tab-separated one.

    Args:
        findings: what was found.
        every: a line each on a terminal, too.
    """
    # Stable: findings of one state stay in the examination's order, from the machine to the job.
    findings = sorted(findings, key=lambda each: list(MARKS).index(each.state))
    if not sys.stdout.isatty():
        print("\n".join("\t".join((each.state, each.name, each.found, each.cure)).rstrip() for each in findings))
        print(f"verdict\t{_verdict(findings)}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 1))
    for each in findings if every else [each for each in findings if each.state in ("error", "warning")]:
        mark, colour = MARKS[each.state]
        found = Text(each.found, style="dim" if each.state == "skipped" else "")
        found.append(f"\n→ {each.cure}" if each.cure else "", style=colour)
        table.add_row(Text(mark, style=colour), Text(each.name, style="bold" if each.cure else ""), found)
    console = Console()
    console.print(table)
    if not every:
        for state, words in (("ok", "green"), ("skipped", "not looked at")):
            mark, colour = MARKS[state]
            if names := [each.name for each in findings if each.state == state]:
                console.print(Text(f" {mark} {len(names)} {words} (--all): {', '.join(names)}", style=colour))
    console.print(Text(_verdict(findings), style="bold"))


def _verdict(findings: Sequence["Finding"]) -> str:
    counts = {state: sum(each.state == state for each in findings) for state in MARKS}
    return f"{counts['error']} red, {counts['warning']} yellow, {counts['ok']} green, {counts['skipped']} not looked at"
