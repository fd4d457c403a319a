"""Commands of `nemo-cpt`: corpora, from the network to Megatron datasets."""

import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.conversations import inspect_conversations, prepare_conversations
from nemo_cpt.cli.launch import only_json_on_stdout
from nemo_cpt.cli.recipe_arguments import Executor
from nemo_cpt.cli.tables import note_long_texts, print_json, print_plain, print_report
from nemo_cpt.errors import CptError
from nemo_cpt.output import size_of, span
from nemo_cpt.signals import STOPPED_DOWNLOAD, ctrl_c_ends

if TYPE_CHECKING:
    from nemo_cpt.corpus import PrepareReport
    from nemo_cpt.corpus.dataset.inspection import Inspection
    from nemo_cpt.corpus.preparing.estimate import Estimate
    from nemo_cpt.launching.in_tasks import Submitted

PANEL = "Corpora"
# Options of `prepare` that mean nothing for conversations, and the other way round: they are refused, by `_refuse`.
OF_TEXTS = (
    "json_key",
    "append_eod",
    "eod_token",
    "prepend_bos",
    "split_special_tokens",
    "keep_empty_documents",
    "verify",
)
OF_TASKS = ("executor", "tasks", "detach", "dry_run")
OF_CONVERSATIONS = ("form", "system", "train_on", "seq_length", "too_long")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Key = Annotated[str, typer.Option(help="The field that holds the text.")]
OnError = Annotated[str, typer.Option(help="stop at a line that gives no text, or skip it.")]
MaxSkipped = Annotated[float | None, typer.Option(help="Share that --on-error skip may leave out; 0.01 by default.")]
Tasks = Annotated[int | None, typer.Option(help="Make it in so many parts, by as many tasks on --executor.")]
Detach = Annotated[bool, typer.Option("--detach", help="With --tasks: return once they are submitted.")]
Workers = Annotated[int | None, typer.Option(help="Processes; all CPUs by default.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
SeqLength = Annotated[int, typer.Option(help="Conversations: of a training's sequences, for the report.")]
TooLong = Annotated[str, typer.Option(help="Conversations: drop or cut longer ones, for the report.")]
Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders, globs (JSON lines or arrays, also gzip or zstd; Parquet, CSV, .txt, .md) or hf:NAME."
    ),
]


@app.command(rich_help_panel=PANEL)
def prepare(
    context: typer.Context,
    inputs: Inputs,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Prefix; _text_document or _conversations is appended.")
    ],
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="Folder or hub name.")],
    json_key: Key = "text",
    append_eod: Annotated[bool, typer.Option(help="End each document with the tokenizer's EOS.")] = True,
    eod_token: Annotated[str | None, typer.Option(help="End documents with this token instead.")] = None,
    prepend_bos: Annotated[bool, typer.Option(help="Begin each document with the tokenizer's BOS.")] = False,
    workers: Workers = None,
    on_error: OnError = "stop",
    max_skipped: MaxSkipped = None,
    split_special_tokens: Annotated[
        bool, typer.Option("--split-special-tokens", help="Encode special tokens' names in the text as text.")
    ] = False,
    keep_empty_documents: Annotated[
        bool, typer.Option("--keep-empty-documents", help="As Megatron-LM's script; NeMo's drops them.")
    ] = False,
    verify: Annotated[
        int | None,
        typer.Option(
            help="Compare so many documents, and some of each script, with transformers' tokenizer afterwards; "
            "by default only passages with the reference tokenizer on the way; 0 compares nothing."
        ),
    ] = None,
    fast: Annotated[bool, typer.Option(help="Use fastokens where it agrees with the reference.")] = True,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            "--chat-template",
            help="Conversations: llama3, chatml, mistral, alpaca-ja, -en, -zh, tokenizer (its own), or a Jinja file.",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option(help="Conversations: auto, messages, sharegpt, alpaca, or a pair of fields: query/answer.")
    ] = "auto",
    system: Annotated[str | None, typer.Option(help="Conversations: a system message for those without one.")] = None,
    train_on: Annotated[str, typer.Option(help="Conversations: assistant, last or all.")] = "assistant",
    seq_length: SeqLength = 4096,
    too_long: TooLong = "drop",
    executor: Executor = None,
    tasks: Tasks = None,
    detach: Detach = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --tasks: print the plan, and do nothing.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Tokenize text, or conversations with a template, for Megatron; a killed run resumes when it is started again.

    With --tasks N, N processes on an executor (executor.partition=cpu, ... among the inputs) make a part each, and a
    last job joins them; the same command again makes the parts that are missing.
    """
    inputs, of_executor = without_executors(inputs)
    note_long_texts(inputs)
    # The one sign of conversations: texts have none.
    if template is not None:
        _refuse(context, OF_TEXTS, "belongs to texts, and --template makes this a preparation of conversations")
        _refuse(context, OF_TASKS, "belongs to texts: conversations are prepared by one machine")
        chosen: dict[str, Any] = {"form": form, "system": system, "train_on": train_on, "seq_length": seq_length}
        chosen |= {"too_long": too_long, "workers": workers, "on_error": on_error, "max_skipped": max_skipped}
        chosen |= {"fast": fast, "overwrite": overwrite}
        return prepare_conversations(inputs, output, tokenizer, json, template=template, **chosen)
    _refuse(context, OF_CONVERSATIONS, "belongs to conversations: name their --template too")
    options: dict[str, Any] = {
        "json_key": json_key,
        "append_eod": append_eod,
        "eod_token": eod_token,
        "prepend_bos": prepend_bos,
        "workers": workers,
        "on_error": on_error,
        "max_skipped": max_skipped,
        "split_special_tokens": split_special_tokens,
        "keep_empty_documents": keep_empty_documents,
        "verify": verify,
        "fast": fast,
        "overwrite": overwrite,
    }
    if tasks is not None:
        return _prepare_in_tasks(
            inputs, output, tokenizer, executor or "local", of_executor, tasks, detach, dry_run, json, options
        )
    # Without --tasks nothing would use them.
    if executor or of_executor or detach or dry_run:
        raise CptError(
            "--executor, executor.X=..., --detach and --dry-run are for many tasks: say how many with --tasks"
        )
    from nemo_cpt.corpus import prepare as run

    print_prepared(run(inputs, output, tokenizer, **options), json)


def without_executors(inputs: list[str]) -> tuple[list[str], list[str]]:
    """Part the inputs from the `executor.key=value` among them, whose prefix they lose."""
    # Typer has one list of words without dashes: files and the executor's options come mixed.
    pairs = [each for each in inputs if each.startswith("executor.") and "=" in each]
    return [each for each in inputs if each not in pairs], [pair.removeprefix("executor.") for pair in pairs]


def _prepare_in_tasks(
    inputs: list[str],
    output: str,
    tokenizer: str,
    executor: str,
    of_executor: list[str],
    tasks: int,
    detach: bool,
    dry_run: bool,
    json: bool,
    options: dict[str, Any],
) -> None:
    from nemo_cpt.launching.in_tasks import Submitted, executor_named, plan_in_tasks, prepare_in_tasks

    with only_json_on_stdout(json):
        where = executor_named(executor, of_executor, detach)
        if dry_run:
            done: Any = plan_in_tasks(inputs, output, tokenizer, where, tasks, **options)
        else:
            done = prepare_in_tasks(inputs, output, tokenizer, where, tasks, detach=detach, **options)
    if dry_run:
        return _print_estimate(done, tasks, json)
    return print_submitted(done, json) if isinstance(done, Submitted) else print_prepared(done, json)


def print_submitted(submitted: "Submitted", json: bool) -> None:
    """Print what a scheduler has been given."""
    if json:
        return print_json(asdict(submitted))
    rows = {
        "submitted": f"{submitted.missing} of {submitted.tasks} tasks, and a job behind them that joins their parts",
        "experiment": f"{submitted.experiment}: nemo-cpt status|logs|cancel {submitted.experiment}",
        "output": f"{submitted.output}, once the last job has ended",
    }
    print_report(rows, [])


def _print_estimate(estimate: "Estimate", asked: int, json: bool) -> None:
    if json:
        return print_json(asdict(estimate))
    fewer = f" (the inputs cannot be cut into {asked})" if estimate.tasks < asked else ""
    rows = {
        "tasks": f"{estimate.tasks:,}{fewer}",
        "inputs": f"{size_of(estimate.stored)} on disk, about {size_of(estimate.text)} of text",
        "largest share": f"{size_of(estimate.largest)}, about {span(estimate.task_seconds)}",
        "all tasks": f"about {span(estimate.all_seconds)} of one task's time",
        "join": f"about {span(estimate.join_seconds)}",
        "dataset": f"about {estimate.tokens / 1e6:,.0f} M tokens, {size_of(estimate.dataset)}",
        "disk": f"{size_of(estimate.disk)} beside the inputs, until the parts are joined",
        "network": f"{size_of(estimate.network)} read and written in all",
        "submitted": "nothing: this is a dry run",
    }
    print_report(rows, [])


def print_prepared(report: "PrepareReport", json: bool) -> None:
    """Print what `prepare` did."""
    if json:
        return print_json(asdict(report))
    rows: dict[str, Any] = {
        "dataset": f"{report.prefix} ({report.status})",
        "documents": f"{report.documents:,}",
        "tokens": f"{report.tokens:,} ({report.dtype}), longest document {report.longest:,}",
        "encoder": report.encoder,
        "tokenizer": f"{report.tokenizer['sha256'][:16]}, {report.tokenizer['vocabulary_size']:,} ids",
        "document ends": _markers(report.markers),
    }
    if report.rates:
        rates = report.rates
        rows["speed"] = (
            f"{rates['documents_per_second']:,.0f} documents/s, {rates['megabytes_per_second']:,.1f} MB/s, "
            f"{rates['tokens_per_second'] / 1e6:,.2f} M tokens/s, {report.seconds:,.1f} s in all"
        )
    if report.skipped:
        rows["skipped"] = ", ".join(f"{reason} {count}" for reason, count in report.skipped.items())
    if report.empty:
        rows["empty texts"] = f"{report.empty:,}"
    if report.compared:
        rows["compared"] = f"{report.compared:,} passages are what the reference tokenizer gives"
    if report.verified:
        kinds = f"documents of {report.kinds:,} scripts and categories"
        rows["verified"] = f"{report.verified:,} documents, and {kinds}, are what transformers gives"
    print_report(rows, report.warnings)


def _refuse(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse options that were given and would do nothing."""
    for name in names:
        # A default is nobody's wish: what was typed alone is refused.
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise CptError(f"--{name.replace('_', '-')} {why}.")


def _markers(markers: dict[str, list[Any] | None]) -> str:
    eod, bos = (f"{value[0]} ({value[1]})" if (value := markers.get(name)) else "nothing" for name in ("eod", "bos"))
    return f"{eod}; begins with {bos}"


@app.command(rich_help_panel=PANEL)
def inspect(
    context: typer.Context,
    prefix: Annotated[str, typer.Argument(help="ds/ja_text_document or ds/ja; sft/ja_conversations or sft/ja.")],
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "-t", help="Decode with it, and check against it.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Documents to show, or conversations.")] = 3,
    seq_length: SeqLength = 4096,
    too_long: TooLong = "drop",
    json: Json = False,
) -> None:
    """Describe a dataset: documents, tokens, lengths, samples; diagnose a damaged one."""
    from nemo_cpt.conversations.dataset import is_conversations

    # By what is on the disk: a prefix alone does not say of which kind it is.
    if is_conversations(prefix):
        return inspect_conversations(prefix, tokenizer, samples, json, seq_length=seq_length, too_long=too_long)
    _refuse(context, ("seq_length", "too_long"), "belongs to conversations, and this is a dataset of texts")
    from nemo_cpt.corpus import inspect as run

    report = run(prefix, tokenizer, samples)
    if json:
        return print_json(asdict(report))
    vocabulary = (
        f"of {report.vocabulary_size:,}" if report.vocabulary_size else "of an unknown vocabulary (--tokenizer)"
    )
    rows = {
        "dataset": report.prefix,
        "documents": f"{report.documents:,}" + (f", {report.empty:,} of them empty" if report.empty else ""),
        "tokens": f"{report.tokens:,} ({report.dtype}, {report.nbytes / 1e6:,.1f} MB)",
        "largest id": f"{report.highest:,} {vocabulary}",
        "lengths": ", ".join(f"{value:,} (p{percentile})" for percentile, value in report.percentiles.items()),
        "last token": _end(report.end),
    }
    print_report(rows, report.warnings)
    _print_histogram(report)
    for sample in report.samples:
        text = f": {sample['text']!r}" if sample["text"] is not None else f": {sample['ids']} …"
        print(f"document {sample['document']}, {sample['tokens']:,} tokens{text}")


def _end(end: dict[str, Any]) -> str:
    if not end:
        return "none"
    text = f" {end['text']}" if end["text"] else ""
    return f"{end['id']}{text} ends {100 * end['share']:.0f} % of the documents"


def _print_histogram(report: "Inspection") -> None:
    """Show how many tokens lie in documents of which length: bars on a terminal, tab-separated lines elsewhere."""
    titles = ("tokens a document", "documents", "share of the tokens")
    rows = [
        (f"{low:,}-{high:,}", f"{documents:,}", f"{100 * tokens / max(report.tokens, 1):.1f} %")
        for low, high, documents, tokens in report.histogram
    ]
    if not sys.stdout.isatty():
        return print_plain([titles, *rows])
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    most = max((entry[3] for entry in report.histogram), default=0) or 1
    table = Table(*titles, "", box=None)
    for row, entry in zip(rows, report.histogram, strict=True):
        table.add_row(*row, Bar(most, 0, entry[3], width=40))
    Console().print(table)


@app.command(rich_help_panel=PANEL)
def split(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for train.jsonl and the held-out sets.")],
    validation: Annotated[str, typer.Option(help="Share of the documents, or the files that are the set.")] = "0.01",
    test: Annotated[str, typer.Option(help="Share of the documents, or the files that are the set.")] = "0",
    json_key: Key = "text",
    similarity: Annotated[float, typer.Option(help="Of 5-grams, from which documents are near duplicates.")] = 0.8,
    drop: Annotated[str, typer.Option(help="Duplicates of held-out documents to drop: none, exact or near.")] = "none",
    on_error: OnError = "stop",
    max_skipped: MaxSkipped = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Hold out validation and test documents by their hash; count duplicates between the sets."""
    from nemo_cpt.corpus import split as run

    note_long_texts(inputs)
    report = run(
        inputs,
        output,
        validation=_share_or_inputs(validation),
        test=_share_or_inputs(test),
        json_key=json_key,
        similarity=similarity,
        drop=drop,
        on_error=on_error,
        max_skipped=max_skipped,
        workers=workers,
        overwrite=overwrite,
    )
    if json:
        return print_json(asdict(report))
    rows = {name: f"{count:,} documents, {report.files.get(name, 'given')}" for name, count in report.documents.items()}
    rows["duplicates"] = f"{report.exact:,} exact, {report.near:,} near; {report.dropped:,} dropped"
    if report.repeated:
        rows["repeated"] = f"{report.repeated:,} held-out copies of others, of which a drawn set has one"
    rows["status"] = report.status
    print_report(rows, report.warnings)


def _share_or_inputs(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        # "10%" and "0,1" are meant for a share, and would be looked for as a file.
        if re.fullmatch(r"[\d.,]+\s*%?", value) and not Path(value).exists():
            raise CptError(f"{value} is no share: write it as 0.1, which is 10 %.") from None
        return value


@app.command(rich_help_panel=PANEL)
def fetch(
    corpus: Annotated[
        str | None,
        typer.Argument(
            help="A name, wikipedia:LANGUAGE@DATE, an https:// address, hf:NAME, or the file of a dump of Wikipedia; "
            "none lists the names."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("data"),
    workers: Annotated[int | None, typer.Option(help="Processes for a dump's text; all CPUs by default.")] = None,
    json: Json = False,
) -> None:
    """Download a corpus, of a dump of Wikipedia as text too; checksums are kept, interrupted downloads resumed."""
    from nemo_cpt.corpus.fetching.known_corpora import CORPORA

    if corpus is None:
        known = {name: asdict(entry) for name, entry in CORPORA.items()}
        return print_json(known) if json else print_report({name: entry.note for name, entry in CORPORA.items()}, [])
    from nemo_cpt.corpus import fetch as run

    # The hub's client waits for the files that are under way; whatever else is fetched ends at once by itself.
    of_the_hub = corpus.startswith("hf:")
    with ctrl_c_ends(STOPPED_DOWNLOAD) if of_the_hub else nullcontext():
        files = run(corpus, output, workers=workers)
    if json:
        return print_json({"files": [asdict(file) for file in files]})
    rows = {file.path: f"{file.size:,} bytes, {file.status} {file.sha256[:16]}" for file in files}
    for file in files:
        rows |= {kind: f"{count:,} pages" for kind, count in file.pages.items()}
    print_report(rows, [])
