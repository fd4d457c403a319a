"""A text and what the rules measure of it."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from nemo_cpt.cleaning.characters import KINDS, LETTERS, Kind, folded, kinds
from nemo_cpt.corpus.hashing import segment_hashes, symbols

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_SENTENCE = re.compile(r"[^。．！？!?\n]+[。．！？!?]?")  # as Swallow cuts Japanese, line by line


class Document:
    """A text, with whatever is counted in it; each is counted when a rule first asks.

    Attributes:
        text: As the rules so far have left it.
        changes: How often something was done to it, by name: `masked email`, `removed lines`.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.changes = Counter[str]()

    def replace(self, text: str) -> None:
        """Go on with another text."""
        if text != self.text:
            # With it goes all that was counted of the old one, which is kept beside it in the same place.
            self.__dict__ = {"text": text, "changes": self.changes}

    @cached_property
    def codes(self) -> Any:
        """Its code points, uint32."""
        return np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), np.uint32)

    @cached_property
    def kinds(self) -> Any:
        """The `Kind` of each character, uint8."""
        return kinds()[self.codes]

    @cached_property
    def counts(self) -> list[int]:
        """Characters of each `Kind`."""
        return np.bincount(self.kinds, minlength=KINDS).tolist()

    def count(self, chosen: Iterable[Kind]) -> int:
        """Return how many characters are of some kinds."""
        return sum(self.counts[kind] for kind in chosen)

    @cached_property
    def letters(self) -> int:
        """Its letters, of any script."""
        return self.count(LETTERS)

    @cached_property
    def lines(self) -> list[str]:
        """Its lines, but for blank ones."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines part, however many of them."""
        return [part for part in _BLANK_LINES.split(self.text) if part and not part.isspace()]

    @cached_property
    def sentences(self) -> list[str]:
        """Its sentences by the full stops of East Asia; a line's end ends one too."""
        return _SENTENCE.findall(self.text)

    @cached_property
    def words(self) -> "Words":
        """What stands between spaces."""
        return Words(self.codes, self.kinds)

    @cached_property
    def plain(self) -> Any:
        """Its code points without width, case and spacing, uint32: what duplicates are told by."""
        plain = folded()[self.codes]
        return plain[plain != 0]


class Words:
    """What stands between spaces, as arrays with an element for each word.

    Attributes:
        lengths: Letters and digits in it.
        lettered: Whether it has a letter.
        hashes: A 64-bit number that is the same for the same word.
    """

    def __init__(self, codes: Any, kinds_of_codes: Any) -> None:
        gap = (kinds_of_codes == Kind.SPACE) | (kinds_of_codes == Kind.NEWLINE)
        starts, ends = stretches(gap)
        if not len(starts):
            self.lengths = self.lettered = self.hashes = np.zeros(0, np.int64)
            return
        letter = (kinds_of_codes >= Kind.HIRAGANA) & (kinds_of_codes <= Kind.LETTER)
        # Up to the next word's start: what lies between is space, and has neither letters nor digits.
        letters = np.add.reduceat(letter.astype(np.int64), starts)
        self.lengths = letters + np.add.reduceat((kinds_of_codes == Kind.DIGIT).astype(np.int64), starts)
        self.lettered = letters > 0
        self.hashes = segment_hashes(symbols(codes), starts, ends)


def stretches(gap: Any) -> tuple[Any, Any]:
    """Return where each stretch without a gap begins, and where the next gap does, of an array of booleans."""
    # With a gap at either end beginnings and ends take turns.
    edges = np.flatnonzero(np.diff(np.concatenate(([True], gap, [True]))))
    return edges[::2], edges[1::2]
