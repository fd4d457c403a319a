"""Commands of `nemo-cpt`: evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.inference import key_of_variable
from nemo_cpt.cli.tables import print_json, print_note, print_table


@app.command("evaluate")
def evaluate_command(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face folder, NeMo checkpoint, run folder, or an endpoint's address.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the report; run again, an evaluation goes on there.")
    ] = Path("evaluation"),
    against: Annotated[str | None, typer.Option(help="The model to compare with, of the same forms.")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="A run's folder: all of its checkpoints.")] = None,
    loss: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: a Megatron prefix, or a file; of texts or of conversations.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            "--chat-template",
            help="Of a file's conversations, as in `prepare`; default: the model's own.",
        ),
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="[NAME=]FILE, or ja, zh-tw, ko, en: what ships.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="lm-evaluation-harness' tasks, or ja, zh-tw, en-forgetting.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Address of a judge, an OpenAI-compatible endpoint.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Variable that holds the judge's key.")] = None,
    wrapper: Annotated[list[str] | None, typer.Option(help="How texts are asked: none, system, chat.")] = None,
    language: Annotated[str | None, typer.Option(help="That replies should be in, where prompts do not say.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 256,
    limit: Annotated[int | None, typer.Option(help="Of each set, the first so many.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    base: Annotated[Path | None, typer.Option(help="LoRA: the base; default: the one that the run recorded.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cpu; default: the GPU where there is one.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable that holds an endpoint's key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure a model and what changed: losses, reply language, answers, benchmarks; a table, report.html, a plot.

    Without --loss, --prompts, --tasks and --judge: the sets that the run validated on, and the shipped questions.
    """
    from nemo_cpt.evaluation import evaluate, report

    # Said ahead of an hour's work that nobody asked for by name.
    if limit is None and not (loss or prompts or tasks or judge or quiet):
        print_note(
            "measuring every default set whole; --limit 20 takes 20 of each, --loss, --prompts and --tasks choose sets"
        )
    found = evaluate(
        model, output, against=against, checkpoints_of=checkpoints, losses=loss or (), template=template,
        prompts=prompts or (), tasks=tasks or (), judge=judge, wrappers=wrapper or (), language=language,
        max_tokens=max_tokens, limit=limit, seed=seed, base=base, device=device, api_key=key_of_variable(api_key_env),
        judge_key=key_of_variable(judge_key_env), say=print_note, quiet=quiet,
    )  # fmt: skip
    # Written before anything is printed: a reader of stdout that has gone must not cost the report.
    paths = report.write(found, output)
    for warning in found.warnings:
        print_note(f"note: {warning}")
    if as_json:
        print_json(report.as_dict(found))
    else:
        print_table(report.COLUMNS, map(report.cells, found.rows))
    print_note(f"written: {', '.join(map(str, paths))}")
