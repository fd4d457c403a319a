"""Documents that hold a part of an evaluation set, which a model must not have learnt by heart."""

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from nemo_cpt.cleaning.characters import Kind, folded, kinds
from nemo_cpt.cleaning.document import Document, stretches
from nemo_cpt.cleaning.rule import Check, Rule
from nemo_cpt.corpus.hashing import segment_hashes, symbols, window_hashes
from nemo_cpt.corpus.reading.chunks import Feed, take_from
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.corpus.reading.tally import NO_SKIPPING, Tally
from nemo_cpt.errors import CptError

_CHUNK = 2 << 20
_TABLE_BITS = 24  # a table of 16 MiB that says of most n-grams at once that no evaluation set has them
_NO_SPACES = ("ja", "zh", "ko")


@dataclass(frozen=True)
class Contamination(Rule):
    """Drops documents that share an n-gram with an evaluation set.

    Thirteen words, as GPT-3 (Brown et al. 2020, https://arxiv.org/abs/2005.14165, appendix C) and what followed it;
    where words have no spaces, 26 characters, which are some thirteen words of Japanese. Width, case, marks and spaces
    do not count. Texts of a set that are shorter than an n-gram are looked for as a whole where they have half of one;
    still shorter ones are not: they occur in any corpus.

    Attributes:
        files: Evaluation sets: JSON lines, Parquet or any other input; of each line all its strings are looked for.
        words: n, for languages with spaces.
        characters: n, for those without.
        by_characters: Whether to take characters.
        max_ngrams: How many a document may share.
    """

    name: ClassVar[str] = "contamination"

    files: tuple[str, ...] = ()
    words: int = 13
    characters: int = 26
    by_characters: bool = False
    max_ngrams: int = 0

    @classmethod
    def of(cls, language: str, files: tuple[str, ...]) -> "Contamination":
        """Return the rule for a language."""
        return cls(files=files, by_characters=language in _NO_SPACES)

    def __post_init__(self) -> None:
        """Check the n.

        Raises:
            CptError: It is below 2.
        """
        super().__post_init__()
        if min(self.words, self.characters) < 2:
            size = min(self.words, self.characters)
            raise CptError(f"{self.name}: n-grams of {size} occur everywhere; take at least 2.")

    def load(self) -> None:
        """Read the evaluation sets.

        Raises:
            CptError: One cannot be read, or holds nothing that is long enough to be looked for.
        """
        if self.files and not self._index.numbers.size:
            raise CptError(f"{', '.join(self.files)}: no text is long enough to be looked for: decontaminate without.")

    @property
    def searched(self) -> dict[str, int]:
        """How many texts of the sets are looked for, and how many are too short for that."""
        return {"looked for": self._index.looked_for, "too short": self._index.too_short} if self.files else {}

    def apply(self, document: Document) -> Iterator[Check]:
        """Count the document's n-grams that an evaluation set has."""
        if self.files:
            yield Check("shared_ngrams", self._index.count(document), at_most=self.max_ngrams)

    @cached_property
    def _index(self) -> "Index":
        size = self.characters if self.by_characters else self.words
        return Index(_texts(self.files), size, self.by_characters)


class Index:
    """The n-grams of evaluation sets.

    Args:
        texts: Of the sets.
        size: n.
        by_characters: Whether of characters, else of words.

    Attributes:
        numbers: Sorted numbers of the n-grams, and of whole texts that are shorter.
        looked_for: Texts that are looked for.
        too_short: Texts that are not.
    """

    def __init__(self, texts: Iterable[str], size: int, by_characters: bool) -> None:
        self.by_characters = by_characters
        self.sizes, self.looked_for, self.too_short = {size}, 0, 0
        found = [np.zeros(0, np.uint64)]
        for text in texts:
            mixed = self._symbols(Document(text))
            if len(mixed) * 2 < size:
                self.too_short += 1
                continue
            # A shorter one is an n-gram of its own length: documents are then looked through for that length, too.
            length = min(len(mixed), size)
            self.sizes.add(length)
            self.looked_for += 1
            found.append(window_hashes(mixed, length))
        self.numbers = np.unique(np.concatenate(found))
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[self.numbers >> np.uint64(64 - _TABLE_BITS)] = True

    def count(self, document: Document) -> int:
        """Return how many different n-grams of a document a set has."""
        mixed, found = self._symbols(document), set[int]()
        for size in self.sizes:
            windows = window_hashes(mixed, size)
            # By their upper bits: nearly all windows are out after one look, and few are searched for.
            likely = windows[self._table[windows >> np.uint64(64 - _TABLE_BITS)]]
            if len(likely):
                # A number above all of them would be looked up behind the end.
                places = np.minimum(np.searchsorted(self.numbers, likely), len(self.numbers) - 1)
                found.update(likely[self.numbers[places] == likely].tolist())
        return len(found)

    def _symbols(self, document: Document) -> Any:
        """Return a number for each character or word, marks left out."""
        # Sets are as they were written, on a Mac in decomposed characters; documents as the rules have left them.
        if not unicodedata.is_normalized("NFC", document.text):
            document = Document(unicodedata.normalize("NFC", document.text))
        # Spaces are 0 here, and no text.
        codes = folded()[document.codes]
        text = _is_text(kinds()[codes])
        if self.by_characters:
            return symbols(codes[text])
        # Other marks vanish, so that "don't" is a word and "well-known" one too.
        gap = (codes == 0)[text | (codes == 0)]
        codes = codes[text | (codes == 0)]
        return symbols(segment_hashes(symbols(codes), *stretches(gap)))


def _is_text(kind: Any) -> Any:
    return (kind >= Kind.HIRAGANA) & (kind <= Kind.DIGIT)


def _texts(files: tuple[str, ...]) -> Iterator[str]:
    """Yield the strings of evaluation sets, wherever they stand in their lines."""
    # None is skipped: a line that is passed over would let through the documents that hold it.
    sources, tally = list_sources(files), Tally()
    for task in Feed(sources, None, _CHUNK):
        found = take_from(task, _as_it_is)
        tally.add(task, found.reading, sources[task.source], NO_SKIPPING)
        for value in found.texts:
            yield from _strings(value)


def _as_it_is(value: Any) -> Any:
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
