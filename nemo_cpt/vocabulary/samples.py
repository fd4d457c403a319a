"""Texts that a tokenizer is learnt from or judged by: a share of a corpus that fits in memory, drawn by content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nemo_cpt.corpus.reading.chunks import Feed, texts_of
from nemo_cpt.corpus.reading.sources import Inputs, list_sources
from nemo_cpt.corpus.reading.tally import NO_SKIPPING, Tally
from nemo_cpt.errors import CptError

SAMPLE_BYTES = 256 * 2**20
HELD_OUT_DOCUMENTS = 2000
_ONE_IN = 50  # documents that are held out
_HASHES = 2**64
_CHUNK_BYTES = 2 << 20


@dataclass
class Sample:
    """A part of a corpus.

    Attributes:
        texts: to learn from.
        held_out: to judge by; none of `texts`.
        nbytes: of `texts`, in UTF-8.
        seen: documents of the corpus.
        seen_bytes: their bytes in UTF-8.
    """

    texts: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    nbytes: int = 0
    seen: int = 0
    seen_bytes: int = 0

    @property
    def share(self) -> float:
        """Of the corpus's bytes that are in the sample, the held-out ones aside."""
        return self.nbytes / self.seen_bytes if self.seen_bytes else 0.0


def documents(inputs: Inputs, json_key: str = "text") -> Iterator[str]:
    """The texts of a corpus in their order.

    Raises:
        CptError: there is no such input, or a line gives no text.
    """
    sources, tally = list_sources(inputs), Tally()
    for task in Feed(sources, json_key, _CHUNK_BYTES):
        found = texts_of(task, json_key)
        tally.add(task, found.reading, sources[task.source], NO_SKIPPING)
        yield from found.texts
    tally.check(sources, NO_SKIPPING.max_skipped)


def draw(inputs: Inputs, json_key: str = "text", limit: int = SAMPLE_BYTES, hold_out: bool = True) -> Sample:
    """Draw documents by the hash of their text, so that the order and the number of the inputs do not matter.

    Args:
        inputs: as `prepare` takes them.
        json_key: the field that holds the text.
        limit: bytes of the sample at most; of a larger corpus at least half as much is drawn.
        hold_out: set a fiftieth of the documents apart, `HELD_OUT_DOCUMENTS` at most, at least one where there are two.

    Raises:
        CptError: an input is missing or unreadable, or holds no text.
    """
    import xxhash

    sample, kept, held_out, bound = Sample(), list[tuple[int, str]](), dict[int, str](), _HASHES
    for text in documents(inputs, json_key):
        if not text or text.isspace():
            continue
        encoded = text.encode()
        # By the text's own hash a copy of a document falls on the same side: what is judged by was not learnt from.
        number, size = xxhash.xxh3_64_intdigest(encoded), len(encoded)
        sample.seen, sample.seen_bytes = sample.seen + 1, sample.seen_bytes + size
        if hold_out and number % _ONE_IN == 0:
            held_out[number] = text
            # At twice the number, so that they are not sorted for every document.
            if len(held_out) > 2 * HELD_OUT_DOCUMENTS:
                held_out = _first(held_out)
        elif number < bound:
            kept.append((number, text))
            sample.nbytes += size
            # Half of the hashes, and so about half of the documents, whenever they came: one pass, in bounded memory.
            while sample.nbytes > limit and bound > 1:
                bound //= 2
                kept = [each for each in kept if each[0] < bound]
                sample.nbytes = sum(len(each.encode()) for _, each in kept)
    if not kept:
        raise CptError(f"{inputs} holds no text to learn from")
    # By the hash, or the order of the files would show in what is learnt.
    kept.sort(key=lambda each: each[0])
    if hold_out and not held_out and len(kept) > 1:
        held_out = dict([kept.pop()])
    sample.texts, sample.held_out = [text for _, text in kept], list(_first(held_out).values())
    return sample


def _first(held_out: dict[int, str]) -> dict[int, str]:
    return dict(sorted(held_out.items())[:HELD_OUT_DOCUMENTS])
