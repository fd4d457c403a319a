"""Commands of `nemo-cpt`: tokenizers, trained, grown and compared."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.corpus import Inputs, Json, Key
from nemo_cpt.cli.tables import note_long_texts, print_json, print_report, print_table
from nemo_cpt.errors import CptError

Multiple = Annotated[
    int, typer.Option(help="The vocabulary becomes a multiple of this: 128 times the tensor-parallel size.")
]
tokenizer_app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(
    tokenizer_app,
    name="tokenizer",
    rich_help_panel="Corpora",
    help="Train a tokenizer, grow a model's, compare several.",
)


@tokenizer_app.command("train")
def train_command(
    inputs: Inputs,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    vocabulary_size: Annotated[int, typer.Option(help="Ids in all; rounded up, see --multiple-of.")] = 32_000,
    kind: Annotated[str, typer.Option(help="bpe or unigram, both over bytes.")] = "bpe",
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Of each input in its turn, in what is learnt from."),
    ] = None,
    special: Annotated[list[str] | None, typer.Option(help="A further special token; repeatable.")] = None,
    json_key: Key = "text",
    multiple_of: Multiple = 128,
    sample_mb: Annotated[int, typer.Option(min=1, help="Megabytes of text that are learnt from at most.")] = 128,
    json: Json = False,
) -> None:
    """Train a tokenizer, byte-level BPE or Unigram, for a model from scratch."""
    from nemo_cpt.vocabulary import train

    # Weights are kept by input: of one named twice a weight would be lost.
    if weight and (len(weight) != len(inputs) or len(set(inputs)) < len(inputs)):
        raise CptError(
            f"{len(weight)} weights for {len(set(inputs))} inputs: give one --weight for each input, or none"
        )
    note_long_texts(inputs)
    report = train(
        dict(zip(inputs, weight, strict=True)) if weight else inputs,
        output,
        vocabulary_size,
        kind=kind,
        special=special or [],
        json_key=json_key,
        multiple_of=multiple_of,
        sample_bytes=sample_mb * 2**20,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if json:
        return print_json(report.as_dict())
    rows: dict[str, object] = {
        "tokenizer": f"{report.output} ({report.status})",
        "vocabulary": f"{report.vocabulary_size:,} ids{_rounded(vocabulary_size, report.vocabulary_size)}, "
        f"{len(report.special)} special ones first",
    }
    for name, rate in report.characters_per_token.items():
        rows[name] = f"{rate:.3f} characters a token on held-out documents"
    print_report(rows, [])


@tokenizer_app.command("grow")
def grow_command(
    tokenizer: Annotated[str, typer.Argument(help="The tokenizer to grow: folder or hub name.")],
    inputs: Inputs,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    tokens: Annotated[int | None, typer.Option(help="How many new tokens; rounded up, see --multiple-of.")] = None,
    until: Annotated[
        float | None, typer.Option(help="Instead: characters a token on held-out documents at which to stop.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Texts whose tokens must stay, in the same scripts, such as Chinese; repeatable."),
    ] = None,
    json_key: Key = "text",
    max_characters: Annotated[int, typer.Option(help="Of a new token.")] = 8,
    min_count: Annotated[int, typer.Option(help="How often a new token's parts stand side by side.")] = 5,
    multiple_of: Multiple = 128,
    json: Json = False,
) -> None:
    """Grow a model's tokenizer by tokens of another language; ids, special tokens and other languages stay."""
    from nemo_cpt.vocabulary import grow

    note_long_texts(inputs)
    report = grow(
        tokenizer,
        inputs,
        output,
        tokens=tokens,
        until=until,
        keep=keep or [],
        json_key=json_key,
        max_characters=max_characters,
        min_count=min_count,
        multiple_of=multiple_of,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if json:
        return print_json(report.as_dict())
    rows: dict[str, object] = {
        "tokenizer": f"{report.output} ({report.status})",
        "new tokens": f"{report.tokens:,}{_rounded(tokens, report.tokens)} of {', '.join(report.scripts)}; the rarest "
        f"was seen {report.least_count:,} times",
        "vocabulary": f"{report.vocabulary_size:,} ids; the new ones begin at {report.first_id:,}",
        "learnt from": f"{report.documents:,} documents, {report.share:.0%} of the corpus",
    }
    if report.characters_per_token_before and report.characters_per_token and report.tokens_saved is not None:
        gain = report.characters_per_token / report.characters_per_token_before - 1
        rows["held-out documents"] = (
            f"{report.held_out:,}: {report.characters_per_token_before:.3f} characters a token before, "
            f"{report.characters_per_token:.3f} now ({gain:+.1%}); {report.tokens_saved:.1%} fewer tokens"
        )
    print_report(rows, [])


@tokenizer_app.command("compare")
def compare_command(
    tokenizers: Annotated[list[str], typer.Argument(help="Folders or hub names.")],
    corpus: Annotated[list[str], typer.Option("--corpus", help="LABEL=INPUT, such as ja=ja.jsonl; repeatable.")],
    json_key: Key = "text",
    plot: Annotated[Path | None, typer.Option(help="Draw characters a token: a .png, .svg or .pdf file.")] = None,
    json: Json = False,
) -> None:
    """Compare tokenizers on texts: what a token holds, what of the vocabulary is used, what does not come back."""
    from nemo_cpt.vocabulary import compare

    comparison = compare(tokenizers, _labelled(corpus), json_key=json_key)
    if plot:
        comparison.plot(plot)
    if json:
        return print_json(comparison.as_dict())
    columns = ("tokenizer", "corpus", "characters a token", "bytes a token", "vocabulary used", "lost", "MB/s")
    print_table(
        columns,
        [
            (
                each.tokenizer,
                each.corpus,
                f"{each.characters_per_token:.3f}",
                f"{each.bytes_per_token:.3f}",
                f"{each.used:,} ({each.used_share:.1%})",
                f"{each.round_trip_failures:,} of {each.documents:,}",
                f"{each.nbytes / 1e6 / max(each.seconds, 1e-9):.1f}",
            )
            for each in comparison.measured
        ],
    )
    rows: dict[str, object] = {"ids with the same token in all": f"{comparison.shared:,}"}
    for name, size in comparison.vocabulary_sizes.items():
        longest = " ".join(map(repr, comparison.longest[name]))
        rows[name] = f"{size:,} ids; {comparison.odd[name]:,} used tokens are no whole characters; longest: {longest}"
    print_report(rows, [])


@tokenizer_app.command("worth")
def worth_command(
    base: Annotated[
        Path, typer.Argument(help="The model with the tokenizer that grew: Hugging Face folder or NeMo checkpoint.")
    ],
    grown: Annotated[str, typer.Argument(help="Folder of the grown tokenizer.")],
    inputs: Inputs,
    tokens: Annotated[float, typer.Option(help="Of the training, with the model's tokenizer; 1e9 is a billion.")],
    json_key: Key = "text",
    json: Json = False,
) -> None:
    """Say what a grown tokenizer saves in a training on such text, and what it costs."""
    from math import prod

    from nemo_cpt.checkpoint.architecture import read_architecture, read_carried
    from nemo_cpt.checkpoint.base import base_files, nemo_folder
    from nemo_cpt.checkpoint.layout import slots
    from nemo_cpt.vocabulary import worth

    if (base / "weights").is_dir():
        files = base_files(nemo_folder(base), None)
        arch = read_carried(files)
    else:
        files, arch = base, read_architecture(base)
    found = worth(
        str(files),
        grown,
        inputs,
        tokens=tokens,
        # Counted by the tensors' shapes: config.json is enough, weights need not be here.
        parameters=sum(prod(slot.shape) for slot in slots(arch)),
        hidden_size=arch.hidden_size,
        tied=arch.tie_word_embeddings,
        model_rows=arch.vocab_size,
        json_key=json_key,
    )
    if json:
        return print_json(found.as_dict())
    rows: dict[str, object] = {
        "tokens": f"{found.tokens:,}, not {found.tokens_before:,} ({found.tokens_saved:.1%} fewer, in serving too)",
        "rows": f"{found.new_rows:,} new ones for {found.new_tokens:,} tokens, {found.new_parameters / 1e6:,.1f} M "
        "parameters",
        "memory": f"{found.training_gib:,.3g} GiB more in training, in all; {found.serving_gib:,.3g} GiB in serving",
        "operations": f"{abs(found.compute_saved):.1%} {'fewer' if found.compute_saved >= 0 else 'more'} in all; "
        f"{found.dearer_token:.2%} more for each token",
        "break-even": f"what is saved would train on {found.break_even_tokens:,} tokens more: it pays in this training "
        "if the new rows are learnt within these; in serving, from the first text"
        if found.break_even_tokens
        else "none: on such text nothing is saved that the new rows could be learnt with",
        "seldom seen": f"{found.seldom:.1%} of the new tokens are seen fewer than 1,000 times; fewer tokens would do",
        "not known": "how much the model loses until it has learnt the rows: compare bits per byte of a short run",
    }
    print_report(rows, [])


def _rounded(asked: int | None, given: int) -> str:
    """What to say of a number that is not the one that was asked for."""
    return f" ({asked:,} rounded up, --multiple-of)" if asked not in (None, given) else ""


def _labelled(corpora: list[str]) -> dict[str, list[str]]:
    """Inputs by label, of which several may have the same."""
    found: dict[str, list[str]] = {}
    for each in corpora:
        label, equals, path = each.partition("=")
        if not (label and equals and path):
            raise CptError(f"--corpus {each}: write LABEL=INPUT, such as ja=ja.jsonl")
        found.setdefault(label, []).append(path)
    return found
