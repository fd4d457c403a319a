"""Texts that a tokenizer is learnt from or judged by: a share of a corpus that fits in memory, drawn by content."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from nemo_cpt.corpus.reading.chunks import Feed, texts_of
from nemo_cpt.corpus.reading.sources import Inputs, list_sources
from nemo_cpt.corpus.reading.tally import NO_SKIPPING, Tally
from nemo_cpt.errors import CptError

SAMPLE_BYTES = 256 * 2**20
HELD_OUT_DOCUMENTS = 2000
PART = 2**18  # characters; the library takes a hundred times the bytes of a text while it cuts it into words
_BLANK_LINES = re.compile(r"\s*[\r\n]")
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
        seen: documents of the corpus; one that is longer than `PART` counts as its parts.
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

    def cut(self, limit: float) -> None:
        """Leave the first texts of so many bytes, of the last one its beginning; at least a character."""
        left, texts = int(limit), list[str]()
        for text in self.texts:
            encoded = text.encode()
            beginning = text if len(encoded) <= left else encoded[:left].decode(errors="ignore")
            if beginning or not texts:
                texts.append(beginning or text[0])
            left -= len(encoded)
            if left <= 0:
                break
        self.texts, self.nbytes = texts, sum(len(text.encode()) for text in texts)


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


def parts(text: str) -> Iterator[str]:
    """A text, in parts of some `PART` characters where it is longer, cut behind lines so that words stay whole."""
    start = 0
    while len(text) - start > PART:
        end = text.rfind("\n", start, start + PART) + 1 or start + PART
        # A run of blanks is one word up to its last line end.
        if more := _BLANK_LINES.match(text, end):
            end = more.end()
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def draw(inputs: Inputs, json_key: str = "text", limit: float = SAMPLE_BYTES, hold_out: bool = True) -> Sample:
    """Draw documents by the hash of their text, so that the order and the number of the inputs do not matter.

    A document that is longer than `PART` is drawn by its parts.

    Args:
        inputs: as `prepare` takes them.
        json_key: the field that holds the text.
        limit: bytes of the sample; of a larger corpus so much is drawn.
        hold_out: set a fiftieth of the documents apart, `HELD_OUT_DOCUMENTS` at most, at least one where there are two.

    Raises:
        CptError: an input is missing or unreadable, or holds no text.
    """
    import xxhash

    sample, held_out, bound, limit = Sample(), dict[int, str](), _HASHES, max(limit, 1)
    kept = list[tuple[int, str]]()  # a heap, the highest hash first
    for text in (part for document in documents(inputs, json_key) for part in parts(document)):
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
            heapq.heappush(kept, (-number, text))
            sample.nbytes += size
            # The lowest hashes, whenever they came, of which the last one reaches the limit: it is cut at the end.
            while sample.nbytes > limit and sample.nbytes - (highest := len(kept[0][1].encode())) >= limit:
                sample.nbytes -= highest
                bound = -heapq.heappop(kept)[0]
    if not kept and held_out:  # of one document, or of a few, chance may have set all apart
        kept = [(-(number := min(held_out)), held_out.pop(number))]
        sample.nbytes = len(kept[0][1].encode())
    if not kept:
        raise CptError(f"{inputs} holds no text to learn from")
    # By the hash, or the order of the files would show in what is learnt.
    kept.sort(key=lambda each: -each[0])
    if hold_out and not held_out and len(kept) > 1:
        held_out = dict([kept.pop()])
        sample.nbytes -= sum(len(text.encode()) for text in held_out.values())
    sample.texts, sample.held_out = [text for _, text in kept], list(_first(held_out).values())
    if sample.nbytes > limit:
        sample.cut(limit)
    return sample


def _first(held_out: dict[int, str]) -> dict[int, str]:
    return dict(sorted(held_out.items())[:HELD_OUT_DOCUMENTS])
