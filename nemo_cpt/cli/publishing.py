"""Commands of `nemo-cpt`: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.tables import print_json, print_note, print_pairs


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="What `nemo-cpt export` made: a model, or an adapter.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; made if need be.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; by default it is private.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="The base on the hub, OWNER/NAME[@REVISION]; default: the downloaded one.")
    ] = None,
    base_licence: Annotated[
        str | None,
        typer.Option("--license", "--licence", help="The base's licence, where neither its text nor its card says it."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Code of a language for the card; repeatable; default: the datasets'.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite a repository that something else was pushed to.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and the files, and send nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Publish an export on the Hugging Face hub, with a model card written from its run; private unless told."""
    from nemo_cpt.publishing import push

    report = push(
        folder, repo_id, public=public, base_model=base_model, base_licence=base_licence, languages=language or (),
        replace=replace, dry_run=dry_run, say=print_note,
    )  # fmt: skip
    for warning in report.warnings:
        print_note(f"warning: {warning}")
    if as_json:
        return print_json(report.as_dict())
    if dry_run:
        print(report.card)
    shown = {name: value for name, value in report.as_dict().items() if name not in ("card", "warnings")}
    print_pairs((name.replace("_", " "), ", ".join(value) or "none" if isinstance(value, tuple) else str(value))
                for name, value in shown.items())  # fmt: skip
