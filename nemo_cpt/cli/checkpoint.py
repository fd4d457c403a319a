"""Commands of `nemo-cpt`: checkpoint."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.tables import print_pairs
from nemo_cpt.signals import STOPPED_DOWNLOAD, ctrl_c_ends

SHOWN = 5  # tensors that differ
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
_Ignore = Annotated[
    list[str], typer.Option("--ignore-field", help="Accept this config.json field although it is unknown; repeatable.")
]


@app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json, safetensors, tokenizer.")],
    dest: Annotated[Path, typer.Argument(help="NeMo checkpoint to make.")],
    ignore_field: _Ignore = [],  # noqa: B006  typer copies it
    as_json: _Json = False,
) -> None:
    """Turn a Hugging Face model into a NeMo checkpoint, tensor by tensor."""
    from nemo_cpt.checkpoint import import_hf

    with _progress("Importing") as progress:
        report = import_hf(source, dest, ignore_fields=ignore_field, progress=progress)
    _print(report.as_dict(), as_json)


@app.command("export")
def export_command(
    source: Annotated[Path, typer.Argument(help="NeMo checkpoint, or a run: its newest whole checkpoint.")],
    dest: Annotated[Path, typer.Argument(help="Hugging Face folder to make.")],
    base: Annotated[
        Path | None, typer.Option(help="The base model: Hugging Face folder or imported checkpoint.")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write a LoRA run's adapter for peft, unmerged.")] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the base's.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            "--template",
            help="llama3, chatml, mistral, alpaca-ja, -en, -zh, tokenizer, or a Jinja file; none: the base's files "
            "as they are; default: what the run was tuned on.",
        ),
    ] = None,
    ignore_field: _Ignore = [],  # noqa: B006
    as_json: _Json = False,
) -> None:
    """Turn a NeMo checkpoint into a Hugging Face folder; adapters are merged, or written for peft."""
    from nemo_cpt.checkpoint import export_hf

    source = _of_run(source)
    with _progress("Exporting") as progress:
        report = export_hf(
            source, dest, base, adapter=adapter, dtype=dtype, chat_template=chat_template, ignore_fields=ignore_field,
            progress=progress,
        )  # fmt: skip
    _print(report.as_dict(), as_json)


@app.command("merge")
def merge_command(
    source: Annotated[Path, typer.Argument(help="LoRA or DoRA run's checkpoint, or the run: its newest whole one.")],
    dest: Annotated[Path, typer.Argument(help="NeMo checkpoint to make.")],
    base: Annotated[
        Path | None, typer.Option(help="The base of the adapters; default: the one that the run recorded.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the base's.")] = None,
    ignore_field: _Ignore = [],  # noqa: B006
    as_json: _Json = False,
) -> None:
    """Merge a run's adapters into its base: a NeMo checkpoint that another training starts from."""
    from nemo_cpt.checkpoint import merge

    with _progress("Merging") as progress:
        report = merge(_of_run(source), dest, base, dtype=dtype, ignore_fields=ignore_field, progress=progress)
    _print(report.as_dict(), as_json)


@app.command("grow")
def grow_command(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder, or NeMo checkpoint, or a run: its newest one.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", "-t", help="Folder of its grown tokenizer.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, of the same kind.")],
    base: Annotated[
        Path | None, typer.Option(help="LoRA run: the base of the adapters; default: the one that it recorded.")
    ] = None,
    initialisation: Annotated[
        str,
        typer.Option(
            help="Of the new rows: mean of the old tokens' rows, noise (the mean and some), zero, or focus: rows of "
            "tokens that --corpus uses alike."
        ),
    ] = "mean",
    corpus: Annotated[
        list[str] | None, typer.Option(help="Texts of the language that was added, for focus; repeatable.")
    ] = None,
    json_key: Annotated[str, typer.Option(help="Field of --corpus that holds the text.")] = "text",
    ignore_field: _Ignore = [],  # noqa: B006
    as_json: _Json = False,
) -> None:
    """Give a model rows for the tokens by which its tokenizer grew; all else keeps its bits."""
    from nemo_cpt.checkpoint import grow_model

    with _progress("Growing") as progress:
        report = grow_model(
            _of_run(source), output, tokenizer, base=base, initialisation=initialisation, corpus=corpus,
            json_key=json_key, ignore_fields=ignore_field, progress=progress,
        )  # fmt: skip
    _print(report.as_dict(), as_json)


@app.command("init")
def init_command(
    dest: Annotated[Path, typer.Argument(help="NeMo checkpoint to make.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", "-t", help="Folder of the model's tokenizer.")],
    params: Annotated[str, typer.Option(help="124M, 350M or 1.3B; tiny, for a CPU.")] = "124M",
    shape: Annotated[str, typer.Option(help="Of the layers: llama or gpt2.")] = "llama",
    max_position_embeddings: Annotated[
        int | None, typer.Option(min=1, help="The longest sequence; default: 2048, of gpt2 1024.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 1234,
    as_json: _Json = False,
) -> None:
    """Write a model that knows nothing, for a training from scratch to start from."""
    from nemo_cpt.checkpoint import make_untrained

    with _progress("Writing") as progress:
        report = make_untrained(
            dest, tokenizer, params, shape=shape, max_position_embeddings=max_position_embeddings, seed=seed,
            progress=progress,
        )  # fmt: skip
    _print(report.as_dict(), as_json)


@app.command("verify")
def verify_command(
    nemo: Annotated[Path, typer.Argument(help="NeMo checkpoint, or a run: its newest whole checkpoint.")],
    hf: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    base: Annotated[Path | None, typer.Option(help="LoRA: the base; default: the one that the run recorded.")] = None,
    logits: Annotated[
        bool | None,
        typer.Option(
            "--logits/--no-logits", help="Compare logits; default: up to 2 billion parameters, of equal tensors."
        ),
    ] = None,
    ignore_field: _Ignore = [],  # noqa: B006
    as_json: _Json = False,
) -> None:
    """Compare a NeMo checkpoint with a Hugging Face model, bit by bit and by logits; exit code 1 if they differ."""
    from nemo_cpt.checkpoint import verify

    report = verify(_of_run(nemo), hf, base, logits=logits, ignore_fields=ignore_field)
    every = report.as_dict()
    # People are shown the first few, programs all of them.
    if not as_json:
        every["differences"] = _first(report.differences)
    _print(every, as_json)
    if not report.identical:
        # 1, not 2: the command did what it was asked, and the answer is no.
        raise typer.Exit(1)


@app.command("download")
def download_command(
    repo_id: Annotated[str, typer.Argument(help="Repository on the hub, such as meta-llama/Llama-3.1-8B.")],
    dest: Annotated[Path, typer.Argument(help="Folder to make.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    as_json: _Json = False,
) -> None:
    """Fetch a model from the Hugging Face hub, without the formats that nothing here uses; resumable."""
    from nemo_cpt.checkpoint import download

    # The hub's client waits for the files that are under way, of gigabytes each.
    with ctrl_c_ends(STOPPED_DOWNLOAD):
        report = download(repo_id, dest, revision)
    _print(report.as_dict(), as_json)


def _of_run(source: Path) -> Path:
    """A checkpoint, of a run its newest whole one, which is named: it may have changed since the last command."""
    # Within the function, as in every command: `--help` must not wait for what only one of them needs.
    from nemo_cpt.launching.results import checkpoint_folder

    found = checkpoint_folder(source)
    if found != source:
        print(f"the newest whole checkpoint of {source} is {found}", file=sys.stderr)
    return found


def _first(differences: Sequence[object]) -> str:
    """The first differences in words, and how many more there are: another model's are as many as its tensors."""
    more = [f"and {len(differences) - SHOWN} more (--json has all)"] if len(differences) > SHOWN else []
    return "; ".join([*map(str, differences[:SHOWN]), *more])


def _print(report: Mapping[str, Any], as_json: bool) -> None:
    # On stderr, so that stdout holds the report alone, also for a script.
    for warning in report.get("warnings", ()):
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(report))
        return
    print_pairs((name.replace("_", " "), shown(value)) for name, value in report.items() if name != "warnings")


def shown(value: object) -> str:
    """A field of a report as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    # "none" of what was not looked at, as logits with --no-logits, would be read as no difference.
    return "-" if value is None else str(value) or "none"


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line every few seconds elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield _line_printer(label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    # A label may hold a path with [brackets].
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line_printer(label: str, every: float = 5.0) -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"{label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)

    return show
