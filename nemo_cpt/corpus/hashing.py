"""Numbers for characters, for words and for what runs over several of them, computed for all places at once.

All are of 64 bits, the same on every machine. Two different n-grams get the same number about once in 10^19 pairs.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

_ODD = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: the bits of a product with it are well mixed
_BASE = 0xD6E8FEB86659FD93  # odd, so that it has an inverse modulo 2^64
_SHIFT = np.uint64(32)


def symbols(values: Any) -> Any:
    """Return a well mixed number for each of the values (code points, hashes of words)."""
    mixed = values.astype(np.uint64) * np.uint64(_ODD)
    return (mixed ^ (mixed >> _SHIFT)) * np.uint64(_ODD)


def window_hashes(mixed: Any, size: int) -> Any:
    """Return a number for each run of `size` symbols, as `segment_hashes` does; none where there are fewer."""
    count = max(len(mixed) - size + 1, 0)
    found, done = np.zeros(count, np.uint64), 0
    # By doubling: whatever the size, a few passes, and no power of the base for each place of a long text.
    runs, length = mixed, 1
    while done < size:
        if size & length:
            found += runs[done : done + count] * _power(done)
            done += length
        runs = runs[:-length] + runs[length:] * _power(length)
        length *= 2
    return _finished(found)


def segment_hashes(mixed: Any, starts: Any, ends: Any) -> Any:
    """Return a number for each stretch of symbols, from `starts` up to before `ends`."""
    powers, inverses = _powers(len(mixed))
    # A polynomial's sums up to each place; their difference is the stretch's, and the inverse power moves it to 0.
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(mixed * powers[: len(mixed)], dtype=np.uint64)))
    return _finished((sums[ends] - sums[starts]) * inverses[starts])


def _finished(found: Any) -> Any:
    return (found ^ (found >> _SHIFT)) * np.uint64(_ODD)


def _power(exponent: int) -> Any:
    return np.uint64(pow(_BASE, exponent, 1 << 64))


def _powers(count: int) -> tuple[Any, Any]:
    # Of a few lengths only, since each is kept.
    powers, inverses = _powers_up_to(1 << max(count.bit_length(), 12))
    return powers, inverses


@cache
def _powers_up_to(count: int) -> tuple[Any, Any]:
    bases = (np.uint64(_BASE), np.uint64(pow(_BASE, -1, 1 << 64)))
    powers, inverses = (np.cumprod(np.full(count, base, np.uint64), dtype=np.uint64) for base in bases)
    return powers, inverses


def repeated_ngrams(mixed: Any, longest: int) -> Iterator[tuple[int, Any, Any]]:
    """Yield, for n from 2 to `longest`, where n-grams stand that may occur more than once, and their numbers.

    All those that do occur more than once are among them, and hardly another.

    Args:
        mixed: Symbols, as `symbols` gives them.
        longest: The largest n.
    """
    places, numbers = np.arange(len(mixed)), mixed
    for n in range(2, longest + 1):
        # An n-gram that occurs twice begins with one of n - 1 that does: the others are not looked at again.
        inside = np.searchsorted(places, len(mixed) - n + 1)
        places, numbers = places[:inside], numbers[:inside]
        if len(places) < 2:
            yield n, places[:0], numbers[:0]
            continue
        numbers = (numbers ^ (numbers >> _SHIFT)) * np.uint64(_ODD) + mixed[places + (n - 1)]
        # Counted in a table by some of their bits: whoever is alone at its place is alone in the text.
        # At most 32 MB: in a text of many millions of characters more places are shared, and sorted in vain.
        bits = min(max(len(numbers), 1).bit_length() + 2, 22)
        buckets = ((numbers * np.uint64(_BASE)) >> np.uint64(64 - bits)).view(np.int64)
        shared = np.bincount(buckets, minlength=1 << bits)[buckets] > 1
        places, numbers = places[shared], numbers[shared]
        yield n, places, numbers
