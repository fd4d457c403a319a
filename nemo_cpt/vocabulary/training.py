"""A tokenizer of one's own: byte-level BPE or Unigram, learnt from weighted corpora by Hugging Face's library."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.atomic_folders import check_place, new_folder
from nemo_cpt.corpus.reading.chunks import stamps_of
from nemo_cpt.corpus.reading.sources import Inputs
from nemo_cpt.corpus.tokenization.tokenizer_files import CONFIG, DEFINITION
from nemo_cpt.errors import CptError
from nemo_cpt.made import Making
from nemo_cpt.records import AsDict, restored
from nemo_cpt.rounding import rounded_up
from nemo_cpt.vocabulary.byte_level import byte_of_character
from nemo_cpt.vocabulary.growing import MULTIPLE_OF, count_tokens
from nemo_cpt.vocabulary.learning import learn
from nemo_cpt.vocabulary.samples import Sample, draw

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
CHAT = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # of the template llama3
RESERVED = 8  # tokens without a use, for which a trained model has rows when one is needed
SAMPLE_BYTES = 128 * 2**20
KINDS = ("bpe", "unigram")
_NEVER = -1e6  # a special token's score: its name in a text that is to be taken for text is spelled in other tokens


@dataclass(frozen=True)
class TrainReport(AsDict):
    """What training a tokenizer did.

    Attributes:
        output: the folder that was made.
        kind: one of `KINDS`.
        vocabulary_size: ids in all.
        special: the special tokens, which have the first ids.
        learnt_from: bytes of each corpus, as its share in the learning was.
        characters_per_token: on documents of each corpus that were held out.
        round_trip_failures: of these documents, those that do not come back.
        seconds: wall time.
        status: `written`, or `unchanged` where the same was there already.
    """

    output: str
    kind: str
    vocabulary_size: int
    special: tuple[str, ...]
    learnt_from: dict[str, int]
    characters_per_token: dict[str, float]
    round_trip_failures: int
    seconds: float
    status: str = "written"


@checked
def train(
    corpora: Inputs | Mapping[str, float],
    output: str | Path,
    vocabulary_size: int = 32_000,
    *,
    kind: str = "bpe",
    special: Sequence[str] = (),
    json_key: str = "text",
    multiple_of: int = MULTIPLE_OF,
    sample_bytes: float = SAMPLE_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> TrainReport:
    """Train a byte-level tokenizer.

    The special tokens are in the model's vocabulary, at the first ids: the beginning, the end, padding, those of the
    chat template llama3, `special`, and some in reserve. The same corpora give the same tokenizer, in whatever order
    and however many files they lie in.

    Args:
        corpora: inputs as `prepare` takes them; as a mapping, each with its weight in what is learnt from.
        output: the folder to make; one that this very training made is left as it is.
        vocabulary_size: ids in all, rounded up to `multiple_of`.
        kind: "bpe", or "unigram" (Kudo, arXiv 1804.10959): tokens by their probability, over bytes too, so that every
            text comes back. fastokens does not know it, and it cannot be grown.
        special: further special tokens.
        json_key: the field that holds the text.
        multiple_of: what the vocabulary's size shall be a multiple of, 128 times the tensor-parallel size.
        sample_bytes: of text that is learnt from at most; documents are drawn by the hash of their text.
        say: called with a line about each stage.

    Raises:
        CptError: a corpus is missing, unreadable, or too small for so many tokens; a weight or a size is impossible;
            there is no such kind; a special token is named twice, or is a part of the corpora's words; `output` holds
            something else. Nothing is left there then.
    """
    start = time.monotonic()
    check_options(corpora, vocabulary_size, kind, special, multiple_of, sample_bytes)
    output, tokens, size = Path(output), _special(special), rounded_up(vocabulary_size, multiple_of)
    check_place(output)
    options = {"vocabulary_size": size, "kind": kind, "special": list(special), "json_key": json_key}
    weights = list(corpora.values()) if isinstance(corpora, Mapping) else None
    making = Making(
        "tokenizer train",
        {"corpora": stamps_of(list(corpora) if isinstance(corpora, Mapping) else corpora)},
        options | {"sample_bytes": sample_bytes, "weights": weights},
    )
    if found := making.done(output):
        return restored(TrainReport, found, output=str(output), status="unchanged")
    if isinstance(corpora, Mapping):
        samples = _weighted(corpora, json_key, sample_bytes)
    else:
        samples = {"text": draw(corpora, json_key, sample_bytes)}
    for name, sample in samples.items():
        say(f"{name}: {len(sample.texts):,} of {sample.seen:,} documents, {sample.nbytes / 1e6:,.1f} MB")
    most = sum(sample.nbytes for sample in samples.values()) + len(tokens) + 256
    if size > most:  # the library would take memory for all of them first, and its process with it
        raise CptError(
            f"the corpora give fewer than {most:,} tokens, not {size:,}: give more text, or a smaller vocabulary_size "
            "(--vocabulary-size)"
        )
    backend = _train([text for sample in samples.values() for text in sample.texts], tokens, size, kind)
    # The library stops early without a word, and the model is made for the size that was asked for.
    if backend.get_vocab_size() < size:
        raise CptError(
            f"the corpora give {backend.get_vocab_size():,} tokens, not {size:,}: give more text, or a smaller "
            "vocabulary_size (--vocabulary-size)"
        )
    _check_apart(backend, tokens)
    held_out = {name: sample.held_out for name, sample in samples.items() if sample.held_out}
    report = TrainReport(
        output=str(output),
        kind=kind,
        vocabulary_size=size,
        special=tuple(tokens),
        learnt_from={name: sample.nbytes for name, sample in samples.items()},
        characters_per_token={
            name: round(sum(map(len, texts)) / count_tokens(backend, texts), 4) for name, texts in held_out.items()
        },
        round_trip_failures=sum(_changed(backend, text) for texts in held_out.values() for text in texts),
        seconds=round(time.monotonic() - start, 1),
    )
    with new_folder(output) as folder:
        _write(backend, folder)
        making.note(folder, report.as_dict())
    return report


def _special(further: Sequence[str]) -> list[str]:
    """All special tokens, in the order of their ids."""
    return [BOS, EOS, PAD, *CHAT, *further, *(f"<|reserved_special_token_{number}|>" for number in range(RESERVED))]


def check_options(
    corpora: Inputs | Mapping[str, float],
    vocabulary_size: int,
    kind: str,
    special: Sequence[str],
    multiple_of: int,
    sample_bytes: float,
) -> None:
    """Check the options of `train` that need no text.

    Raises:
        CptError: one is impossible.
    """
    if kind not in KINDS:
        raise CptError(f"kind is {kind!r}; it can be {', '.join(KINDS)}")
    weights = corpora if isinstance(corpora, Mapping) else {}
    if wrong := {name: weight for name, weight in weights.items() if not 0 < weight < float("inf")}:
        raise CptError(f"the weight of {next(iter(wrong))} is {next(iter(wrong.values()))}; it must be above 0")
    for name, value in (("multiple_of", multiple_of), ("sample_bytes", sample_bytes)):
        if value < 1:
            raise CptError(f"{name} is {value}; it must be 1 or more")
    tokens = _special(special)
    if not all(token.strip() for token in special):
        raise CptError(f"the special tokens {list(special)} hold one without a text: leave it away")
    if twice := [token for token in tokens if tokens.count(token) > 1]:
        raise CptError(f"the special token {twice[0]} is there twice")
    if one_byte := [token for token in special if token in byte_of_character()]:
        raise CptError(f"the special token {one_byte[0]!r} is that of a byte, too: give it a longer name")
    if rounded_up(vocabulary_size, multiple_of) <= len(tokens) + 256:
        raise CptError(
            f"a vocabulary of {vocabulary_size:,} has no room for tokens beside 256 bytes and "
            f"{len(tokens)} special ones: give a larger vocabulary_size (--vocabulary-size)"
        )


def _weighted(corpora: Mapping[str, float], json_key: str, limit: float) -> dict[str, Sample]:
    """Draw of each corpus so much that the bytes are as the weights."""
    if not corpora:
        raise CptError("there is no corpus to learn from")
    total = sum(corpora.values())
    samples = {name: draw(name, json_key, int(limit * weight / total)) for name, weight in corpora.items()}
    # The corpus that has the least text for its weight sets the scale; the others are cut to it.
    unit = min(samples[name].nbytes / weight for name, weight in corpora.items())
    for name, weight in corpora.items():
        samples[name].cut(unit * weight)
    return samples


def _train(texts: Sequence[str], special: Sequence[str], size: int, kind: str) -> Any:
    from tokenizers import Tokenizer, processors

    content = orjson.loads(learn(texts, special, size, kind))
    if kind == "unigram":
        pieces = settled(content["model"]["vocab"][len(special) :])
        content["model"]["vocab"] = [*((token, _NEVER) for token in special), *pieces]
    tokenizer = Tokenizer.from_str(orjson.dumps(content).decode())
    begin = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, special.index(BOS))])
    # As Llama-3 does: BOS before a text and nothing behind it, where a model is to go on.
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


def settled(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Unigram's tokens with their scores, without what chance put there.

    The library sums in another order each time, which shows in the last digits and in the order of equals, and draws
    the order of the bytes that it adds below all others.
    """
    lowest = min((score for token, score in pieces if len(token) > 1), default=float("-inf"))
    # No longer token is below the lowest of them: only bytes are lifted.
    scores = [(token, round(max(score, lowest), 6)) for token, score in pieces]
    return sorted(scores, key=lambda each: (-each[1], each[0]))


def _check_apart(backend: Any, special: Sequence[str]) -> None:
    """Refuse a special token that BPE merges others into, too: every text that holds this one would have its id.

    Raises:
        CptError: there is one.
    """
    merges = orjson.loads(backend.to_str())["model"].get("merges") or ()  # Unigram has none
    merged = {"".join(pair) for pair in merges}
    if both := [token for token in special if token in merged]:
        raise CptError(
            f"the special token {both[0]!r} is a part of the corpora's words, too: give it a name that no word holds, "
            f"such as '<|{both[0]}|>'"
        )


def _write(backend: Any, folder: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    (folder / DEFINITION).write_text(backend.to_str(pretty=False), "utf-8")
    (folder / CONFIG).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))


def _changed(backend: Any, text: str) -> bool:
    ids = backend.encode(text, add_special_tokens=False).ids
    return bool(backend.decode(ids, skip_special_tokens=False) != text)
