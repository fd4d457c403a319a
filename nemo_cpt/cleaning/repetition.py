"""How much of a text repeats itself."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nemo_cpt.cleaning.document import Words
from nemo_cpt.corpus.hashing import repeated_ngrams, symbols


class NGrams(NamedTuple):
    """The n-grams of a text.

    Attributes:
        size: n.
        total: All of them.
        distinct: Different ones.
        repeated: Different ones that occur more than once.
        top: How often the most frequent one occurs.
    """

    size: int
    total: int
    distinct: int
    repeated: int
    top: int


def character_ngrams(codes: Any, longest: int) -> Iterator[NGrams]:
    """Count a text's n-grams of characters for n from 2 to `longest`."""
    for n, _, numbers in repeated_ngrams(symbols(codes), longest):
        sizes = np.diff(_group_edges(np.sort(numbers)))
        total = max(len(codes) - n + 1, 0)
        again = len(numbers) - len(sizes)
        top = int(sizes.max()) if len(sizes) else min(total, 1)
        yield NGrams(n, total, total - again, int(np.count_nonzero(sizes > 1)), top)


class WordNGrams(NamedTuple):
    """The n-grams of a text's words, by the characters of these words.

    Attributes:
        size: n.
        top: Share of the characters in all occurrences of the most frequent n-gram; 0 where none occurs twice.
        repeated: Share of the characters in n-grams that have occurred before; no character counts twice.
    """

    size: int
    top: float
    repeated: float


def word_ngrams(words: Words, longest: int) -> Iterator[WordNGrams]:
    """Measure a text's n-grams of words for n from 2 to `longest`."""
    lengths = words.lengths
    ends = np.concatenate(([0], np.cumsum(lengths)))
    characters = max(int(ends[-1]), 1)
    for n, places, numbers in repeated_ngrams(symbols(words.hashes), longest):
        if len(places) < 2:  # most texts, from some n on
            yield WordNGrams(n, 0.0, 0.0)
            continue
        # Stable: within an n-gram's group its places stay in their order, and the first is the one that is allowed.
        order = np.argsort(numbers, kind="stable")
        places, edges = places[order], _group_edges(numbers[order])
        sizes, firsts = np.diff(edges), edges[:-1]
        if sizes.max() < 2:
            yield WordNGrams(n, 0.0, 0.0)
            continue
        # Of several that are as frequent, the one with most characters.
        most = places[firsts[sizes == sizes.max()]]
        top = int(sizes.max()) * int((ends[most + n] - ends[most]).max())
        again = np.delete(places, firsts)
        # How many of the repetitions cover each word: those begun before it, less those that have ended.
        open_at = np.bincount(again, minlength=len(lengths) + 1) - np.bincount(again + n, minlength=len(lengths) + 1)
        repeated = int(lengths[np.cumsum(open_at)[: len(lengths)] > 0].sum())
        # Overlapping occurrences ("la la la la") would make the first more than the whole.
        yield WordNGrams(n, min(top / characters, 1.0), repeated / characters)


def _group_edges(ordered: Any) -> Any:
    """Return where groups of equal neighbours begin, and the end."""
    if not len(ordered):
        return np.zeros(1, np.int64)
    return np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1, [len(ordered)]))


def duplicate_shares(parts: Sequence[str]) -> tuple[float, float]:
    """Return the share of parts (lines, sentences) that repeat an earlier one, and the share of characters in them."""
    counts = Counter(parts)
    if len(counts) == len(parts):
        return 0.0, 0.0
    again = sum(len(part) * (count - 1) for part, count in counts.items() if count > 1)
    return (len(parts) - len(counts)) / len(parts), again / max(sum(map(len, parts)), 1)
