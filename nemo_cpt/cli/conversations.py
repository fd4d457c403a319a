"""Commands of `nemo-cpt`: conversations, made, prepared and looked at."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.tables import note_long_texts, print_json, print_report

if TYPE_CHECKING:
    from nemo_cpt.conversations.inspection import ConversationInspection, Fitting
    from nemo_cpt.conversations.preparation import ConversationReport

TRAINED = "⟦", "⟧"  # around what is trained on, where there are no colours


def prepare_conversations(inputs: Sequence[str], output: str, tokenizer: str, json: bool, **options: Any) -> None:
    """Prepare conversations and print the report."""
    from nemo_cpt.conversations import prepare

    report = prepare(inputs, output, tokenizer, **options)
    if json:
        return print_json(asdict(report))
    rows = {"set": f"{report.prefix} ({report.status})"} | _counts(report) | {"encoder": report.encoder}
    rows["tokenizer"] = f"{report.tokenizer['sha256'][:16]}, {report.tokenizer['vocabulary_size']:,} ids"
    if report.compared:
        rows["compared"] = f"{report.compared:,} passages are what the reference tokenizer gives"
    if report.rates:
        rows["speed"] = (
            f"{report.rates['conversations_per_second']:,.0f} conversations/s, "
            f"{report.rates['megabytes_per_second']:,.1f} MB/s, {report.seconds:,.1f} s in all"
        )
    print_report(rows, report.warnings)


def inspect_conversations(prefix: str, tokenizer: str | None, samples: int, json: bool, **options: Any) -> None:
    """Describe a set of conversations: counts first, then the first conversations with what is trained on."""
    from nemo_cpt.conversations import inspect_conversations as run

    report = run(prefix, tokenizer, samples, **options)
    if json:
        return print_json(asdict(report))
    rows = {"set": report.prefix} | _counts(report)
    rows["lengths"] = ", ".join(f"{value:,} (p{percentile})" for percentile, value in report.percentiles.items())
    print_report(rows, report.warnings)
    for sample in report.samples:
        print(f"\nconversation {sample['conversation']}: {sample['tokens']:,} tokens, {sample['trained']:,} trained on")
        _print_pieces(sample["pieces"])


def _counts(report: "ConversationReport | ConversationInspection") -> dict[str, str]:
    """Return what both reports say of a set."""
    forms = ", ".join(f"{count:,} in the form {form}" for form, count in report.forms.items())
    stop = report.template["stop"]
    share = 100 * report.trained / max(report.tokens, 1)
    rows = {
        "conversations": f"{report.conversations:,} ({forms})",
        "tokens": f"{report.tokens:,}",
        "trained on": f"{report.trained:,} tokens ({share:.1f} %) of {report.answers:,} answers",
        "template": f"{report.template['name']}, answers end with {stop[0]} ({stop[1]})",
        "in sequences": _fitting(report.fitting),
    }
    if report.skipped:
        rows["skipped"] = ", ".join(f"{reason} {count:,}" for reason, count in report.skipped.items())
    return rows


def _fitting(fitting: "Fitting") -> str:
    cut = fitting.too_long - fitting.left_out
    return (
        f"of {fitting.seq_length:,}: {fitting.sequences:,} an epoch, {100 * fitting.filled:.1f} % filled; "
        f"{fitting.too_long:,} conversations too long ({fitting.left_out:,} left out, {cut:,} cut)"
    )


def _print_pieces(pieces: list[list[Any]]) -> None:
    """Print what is trained on in colour and the rest dim on a terminal, between brackets elsewhere."""
    # Colours would be lost in a file, and what is trained on with them.
    if not sys.stdout.isatty():
        return print("".join(f"{TRAINED[0]}{text}{TRAINED[1]}" if trained else f"{text}" for text, trained in pieces))
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for piece, trained in pieces:
        text.append(str(piece), "bold green" if trained else "dim")
    Console().print(text)


@app.command(rich_help_panel="Corpora")
def synthesize(
    inputs: Annotated[
        list[str] | None, typer.Argument(help="The corpus: files, folders, globs, hf:NAME; none for slots alone.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for train.jsonl and validation.jsonl.")] = Path(
        "chats"
    ),
    train: Annotated[int, typer.Option(help="Questions to train on.")] = 150,
    validation: Annotated[int, typer.Option(help="Questions to validate on.")] = 50,
    kinds: Annotated[str, typer.Option(help="What rules make.")] = "title,continuation,cloze,summary",
    slots: Annotated[Path | None, typer.Option(help="JSON file with templates and their slots' values.")] = None,
    language: Annotated[str | None, typer.Option(help="ja, en or zh; each document's own by default.")] = None,
    json_key: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="What is chosen.")] = 0,
    endpoint: Annotated[str | None, typer.Option(help="Base address of an OpenAI-compatible server.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="The licence of the model's outputs.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Questions to ask the model for about a passage.")] = 3,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make questions with answers from a corpus: by rules, from templates with slots, or with a model."""
    from nemo_cpt.synthesis import synthesize as run

    note_long_texts(inputs or [])
    report = run(
        inputs or None,
        output,
        train=train,
        validation=validation,
        # One word on the command line: title,cloze.
        kinds=kinds.split(","),
        slots=slots,
        language=language,
        json_key=json_key,
        seed=seed,
        endpoint=endpoint,
        model=model,
        licence=licence,
        pairs=pairs,
        concurrency=concurrency,
        overwrite=overwrite,
    )
    if json:
        return print_json(asdict(report))
    rows: dict[str, Any] = {f"{report.folder}/{name}.jsonl": f"{n:,} questions" for name, n in report.questions.items()}
    rows["kinds"] = ", ".join(f"{kind} {count:,}" for kind, count in report.kinds.items())
    if report.rejected:
        rows["left out"] = ", ".join(f"{reason} {count:,}" for reason, count in report.rejected.items())
    rows["made by"] = ", ".join(report.generator.values())
    rows["status"] = report.status
    print_report(rows, report.warnings)
