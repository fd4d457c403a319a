"""A model's tokenizer, grown by tokens of another language: old ids and special ids stay, so does every other text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.atomic_folders import check_place, new_folder
from nemo_cpt.corpus.reading.chunks import stamps_of
from nemo_cpt.corpus.reading.sources import Inputs
from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from nemo_cpt.corpus.tokenization.tokenizer_files import ADDED, CONFIG, DEFINITION, SPECIAL_MAP, read_object
from nemo_cpt.errors import CptError
from nemo_cpt.made import Making, files_of, stamps
from nemo_cpt.records import AsDict, restored
from nemo_cpt.vocabulary.byte_level import RECORD, ByteLevelBPE, grew_from, read_byte_level
from nemo_cpt.vocabulary.merging import MAX_CHARACTERS, MIN_COUNT, Learner, Merge
from nemo_cpt.vocabulary.samples import SAMPLE_BYTES, documents, draw, parts
from nemo_cpt.vocabulary.words import Words, count_words, of_own_scripts, text_of, words_of

MULTIPLE_OF = 128  # ids: Megatron's embedding is a multiple of it for each tensor-parallel rank
UNTIL_AT_MOST = 65_536  # tokens that `until` may take
_CARRIED = (CONFIG, SPECIAL_MAP, ADDED, "chat_template.json", "LICENSE")
_CHECK_EVERY = 250  # merges between measurements on the held-out documents, with `until`
_AT_ONCE = 64  # texts
Say = Callable[[str], None]


@dataclass(frozen=True)
class GrowReport(AsDict):
    """What growing a tokenizer did, and what it buys.

    Attributes:
        base: what it grew from.
        output: the folder that was made.
        scripts: of the new tokens, the most frequent first.
        tokens: new ones; as many merges.
        vocabulary_size: ids in all.
        first_id: of the new tokens.
        least_count: how often the rarest new token was seen when it was learnt.
        documents: that were learnt from.
        share: of the corpus's bytes that were learnt from; the rest did not fit the sample.
        held_out: documents that it was measured on.
        characters_per_token_before: on the held-out documents, with the base's tokenizer.
        characters_per_token: the same, grown.
        tokens_saved: share of the held-out documents' tokens.
        seconds: wall time.
        status: `written`, or `unchanged` where the same was there already.
    """

    base: str
    output: str
    scripts: tuple[str, ...]
    tokens: int
    vocabulary_size: int
    first_id: int
    least_count: int
    documents: int
    share: float
    held_out: int
    characters_per_token_before: float | None
    characters_per_token: float | None
    tokens_saved: float | None
    seconds: float
    status: str = "written"


@checked
def grow(
    tokenizer: str,
    inputs: Inputs,
    output: str | Path,
    *,
    tokens: int | None = None,
    until: float | None = None,
    keep: Collection[str] = (),
    json_key: str = "text",
    max_characters: int = MAX_CHARACTERS,
    min_count: int = MIN_COUNT,
    multiple_of: int = MULTIPLE_OF,
    sample_bytes: float = SAMPLE_BYTES,
    say: Say = lambda line: None,
) -> GrowReport:
    """Grow a byte-level BPE tokenizer by tokens and merges that are learnt from a corpus.

    The new merges go behind the old ones and make tokens of the corpus's own scripts alone, so that a text without them
    is tokenized as before, token for token; texts of `keep` are so by construction. Ids and merges of the base stay
    what they were: datasets that it made stay valid. Tokens that the base only added (Llama-3's special ones) get an
    entry in the model's vocabulary, without which the library numbers them anew, silently, behind the new tokens.

    Args:
        tokenizer: the base's folder, or its name on the hub.
        inputs: texts in the language that is added; what `prepare` takes.
        output: the folder to make; one that this very growing made is left as it is.
        tokens: how many new tokens; the vocabulary's size is rounded up to `multiple_of` with further ones.
        until: instead of `tokens`, characters a token on held-out documents at which to stop.
        keep: inputs of texts whose tokens must not change although they are written in the corpus's scripts.
        json_key: the field that holds the text.
        max_characters: of a new token; pre-tokenizers take a Japanese clause for one word.
        min_count: of a pair, for which a token is made.
        multiple_of: what the vocabulary's size shall be a multiple of, 128 times the tensor-parallel size.
        sample_bytes: of the corpus that are learnt from, at most; documents are drawn by the hash of their text.
        say: called with a line about each stage.

    Raises:
        CptError: the tokenizer is no byte-level BPE; the corpus is unreadable, has no script but ASCII, or gives too
            few tokens; `until` is not reached; `output` holds something else. Nothing is left there then.
    """
    start = time.monotonic()
    check_options(tokens, until, max_characters, min_count, multiple_of, sample_bytes)
    output = Path(output)
    # First of all: what takes minutes is not to fail at its end.
    check_place(output)
    base = read_byte_level(tokenizer)
    options = {"tokens": tokens, "until": until, "json_key": json_key, "max_characters": max_characters}
    options |= {"min_count": min_count, "multiple_of": multiple_of, "sample_bytes": sample_bytes}
    read = {"tokenizer": stamps(files_of(Path(base.described.folder)))}
    making = Making("tokenizer grow", read | {"inputs": stamps_of(inputs), "keep": stamps_of(list(keep))}, options)
    if found := making.done(output):
        return restored(GrowReport, found, base=str(tokenizer), output=str(output), status="unchanged")
    sample = draw(inputs, json_key, sample_bytes)
    say(f"{len(sample.texts):,} of {sample.seen:,} documents are learnt from, {len(sample.held_out):,} are held out")
    backend = base.backend()
    counts = count_words(backend, sample.texts)
    words = of_own_scripts(counts, sum(map(len, sample.texts)), base.vocabulary)
    if not words.scripts:
        raise CptError(f"{inputs} has no letters beyond ASCII: there is nothing to learn that leaves English as it is")
    say(f"{len(words.counts):,} words of {', '.join(words.scripts)}")
    learner = Learner(base, words.counts, _words_to_keep(backend, keep, json_key), max_characters, min_count)
    if until is None:
        merges = _learn(learner, base.size, tokens or 0, multiple_of)
    else:
        merges = _learn_until(learner, base, until, sample.held_out, multiple_of)
    say(f"{len(merges):,} tokens are learnt")
    with new_folder(output) as folder:
        _write(base, grown_definition(base, merges), folder, _record(base, merges, words))
        # Measured as it was written, which is what users load.
        grown = read_byte_level(str(folder))
        before, after = (count_tokens(each.backend(), sample.held_out) for each in (base, grown))
        characters = sum(map(len, sample.held_out))
        report = GrowReport(
            base=str(tokenizer),
            output=str(output),
            scripts=words.scripts,
            tokens=len(merges),
            vocabulary_size=grown.size,
            first_id=base.size,
            least_count=min(merge.count for merge in merges),
            documents=len(sample.texts),
            share=round(sample.share, 4),
            held_out=len(sample.held_out),
            characters_per_token_before=round(characters / before, 4) if before else None,
            characters_per_token=round(characters / after, 4) if after else None,
            tokens_saved=round(1 - after / before, 4) if before else None,
            seconds=round(time.monotonic() - start, 1),
        )
        making.note(folder, report.as_dict())
    return report


def check_options(
    tokens: int | None, until: float | None, max_characters: int, min_count: int, multiple_of: int, sample_bytes: float
) -> None:
    """Check the options of `grow` that need no input.

    Raises:
        CptError: one is impossible.
    """
    if (tokens is None) == (until is None):
        raise CptError("say how far to grow: either tokens=12000 (--tokens) or until=1.6 (--until), characters a token")
    if tokens is not None and tokens < 1:
        raise CptError(f"tokens is {tokens}; it must be 1 or more")
    if until is not None and not 0 < until < float("inf"):
        raise CptError(f"until is {until}; it is a number of characters a token, above 0")
    least_one = {"multiple_of": multiple_of, "max_characters": max_characters, "min_count": min_count}
    for name, value in (least_one | {"sample_bytes": sample_bytes}).items():
        if value < 1:
            raise CptError(f"{name} is {value}; it must be 1 or more")


def _words_to_keep(backend: Any, keep: Collection[str], json_key: str) -> Iterator[Collection[str]]:
    """All the words of texts, the words of some texts at once."""
    texts = (part for text in documents(list(keep), json_key) for part in parts(text)) if keep else iter(())
    while some := list(islice(texts, _AT_ONCE)):
        yield {word for text in some for word in words_of(backend, text)}


def _learn(learner: Learner, size: int, tokens: int, multiple_of: int) -> list[Merge]:
    """Learn so many tokens, and those that fill the vocabulary up to a multiple."""
    wanted = tokens + -(size + tokens) % multiple_of  # what is missing to the next multiple
    merges = list(islice(learner, wanted))
    if len(merges) < wanted:
        raise CptError(
            f"the corpus gives {len(merges):,} of {wanted:,} tokens whose parts stand side by side often enough: give "
            "more text, fewer tokens (--tokens), or a smaller min_count (--min-count)"
        )
    return merges


def _learn_until(
    learner: Learner, base: ByteLevelBPE, until: float, held_out: Sequence[str], multiple_of: int
) -> list[Merge]:
    """Learn until the held-out documents have so many characters a token."""
    if not held_out:
        raise CptError("the corpus is one document, and none is left to measure on: give tokens= (--tokens) instead")
    characters, merges, measured_at, full = sum(map(len, held_out)), list[Merge](), 0, 0

    def rate_of(count: int) -> float:
        grown = ByteLevelBPE(base.described, grown_definition(base, merges[:count]))
        return characters / count_tokens(grown.backend(), held_out)

    rate = rate_of(0)
    if rate >= until:
        raise CptError(f"the base has {rate:.3f} characters a token already: give a larger until than {until:g}")
    for merge in islice(learner, UNTIL_AT_MOST):
        merges.append(merge)
        if (base.size + len(merges)) % multiple_of == 0:
            full = len(merges)
        # Each measurement encodes every held-out document: only sizes that may be the last are worth one.
        if full >= measured_at + _CHECK_EVERY:
            measured_at, rate = full, rate_of(full)
            if rate >= until:
                return merges
    if full > measured_at:  # the corpus gave no more before the next measurement
        measured_at, rate = full, rate_of(full)
        if rate >= until:
            return merges[:full]
    raise CptError(
        f"{measured_at:,} tokens give {rate:.3f} characters a token on held-out documents, not {until:g}, and of more "
        f"than {len(merges):,} none is learnt: give more text, a smaller until (--until) or multiple_of (--multiple-of)"
    )


def count_tokens(backend: Any, texts: Sequence[str]) -> int:
    """How many tokens texts have, without those around them."""
    return sum(
        len(each.ids)
        for batch in few_at_a_time(texts)
        for each in backend.encode_batch_fast(batch, add_special_tokens=False)
    )


def few_at_a_time(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in lists to encode: the library hears no Ctrl-C until it is through with one."""
    return (list(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE))


def grown_definition(base: ByteLevelBPE, merges: Sequence[Merge]) -> dict[str, Any]:
    """The tokenizer.json of a base with further merges, whose tokens have the ids behind the base's."""
    model = base.content["model"]
    new = {merge.token: base.size + number for number, merge in enumerate(merges)}
    # As the base has them: the library reads files of either form, and none that mixes them.
    as_text = isinstance(model["merges"][0], str)
    added = [" ".join(merge.pair) if as_text else list(merge.pair) for merge in merges]
    # Also tokens that were only added, or the library would number them behind the new ones (see `grow`).
    return base.content | {"model": model | {"vocab": base.ids | new, "merges": [*model["merges"], *added]}}


def _record(base: ByteLevelBPE, merges: Sequence[Merge], words: Words) -> dict[str, Any]:
    # Of a base that had grown itself, whose data stay valid as well.
    earlier = {"from": before} if (before := read_object(Path(base.described.folder, RECORD)).get("from")) else {}
    return {
        "from": {
            "name": base.described.name,
            "sha256": base.described.sha256,
            "vocabulary_size": base.size,
            "merges": len(base.merges),
            **earlier,
        },
        "tokens": len(merges),
        "scripts": list(words.scripts),
        "examples": [text_of(merge.token) for merge in merges[:20]],
    }


def _write(base: ByteLevelBPE, content: dict[str, Any], folder: Path, record: dict[str, Any]) -> None:
    """Fill the folder, and look at it as users will before it has its name."""
    for path in sorted(Path(base.described.folder).iterdir()):
        if path.name in _CARRIED or path.suffix == ".jinja":
            shutil.copyfile(path, folder / path.name)
    # Without a class transformers looks for the model's config.json, which is not here.
    if not (folder / CONFIG).exists():
        (folder / CONFIG).write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', "utf-8")
    (folder / DEFINITION).write_bytes(orjson.dumps(content))
    (folder / RECORD).write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))
    _check_written(base, folder)


def _check_written(base: ByteLevelBPE, folder: Path) -> None:
    """Refuse a tokenizer that would be loaded with other ids than those of its base."""
    described = load_tokenizer(str(folder))
    moved = [text for text, number in base.described.special.items() if described.special.get(text) != number]
    reason = grew_from(read_byte_level(str(folder)), base)
    if moved or reason or (described.eos, described.bos) != (base.described.eos, base.described.bos):
        raise CptError(
            f"{base.described.name} cannot be grown: loaded again, {reason or f'its special tokens {moved} are others'}"
        )
