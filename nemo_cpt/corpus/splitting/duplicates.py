"""Exact and near duplicates of a few held-out documents, looked for in many.

NumPy is imported where it is needed: `nemo_cpt.corpus` offers `split`, and is imported by what splits nothing.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from nemo_cpt.errors import CptError

SHINGLE = 5  # characters, so that it also works for languages written without spaces
PERMUTATIONS, BANDS, SEED = 128, 32, 42
# A pair is found with a probability of 1 - (1 - s^4)^32 where it is similar by s: 99 % at 0.6, 87 % here, 23 % at 0.3.
LEAST_SIMILARITY = 0.5
_BATCH = 1 << 16  # characters whose 5-grams are numbered at once


def check_similarity(name: str, similarity: float) -> None:
    """Check a similarity from which documents are near duplicates.

    Args:
        name: Of the option.
        similarity: Jaccard similarity of character 5-grams.

    Raises:
        CptError: It is none, or one of which too many pairs would be missed.
    """
    if not LEAST_SIMILARITY <= similarity <= 1:
        raise CptError(
            f"{name} is {similarity}; it must lie between {LEAST_SIMILARITY} and 1: of less similar documents "
            "most would not be found, and kept without a word."
        )


def fingerprint(text: str) -> int:
    """Return a 64-bit hash of a text that ignores width, case and spacing; a fixed function, whatever the machine."""
    import xxhash

    # Part of the promise that a held-out document stays held out: a change here moves documents between the sets.
    plain = "".join(compatible(text).split()).lower()
    return xxhash.xxh3_64_intdigest(plain.encode("utf-8", "surrogatepass"))


def compatible(text: str) -> str:
    """Return what `unicodedata.normalize("NFKC", text)` does, of Japanese in a quarter of the time."""
    if unicodedata.is_normalized("NFKC", text):
        return text
    parts, done = list[str](), 0
    for run in _unstable().finditer(text):
        start, end = max(run.start() - 1, 0), run.end()  # with the character before, which the run may join
        parts += text[done:start], unicodedata.normalize("NFKC", text[start:end])
        done = end
    return "".join((*parts, text[done:]))


@cache
def _unstable() -> re.Pattern[str]:
    """What finds runs of characters that NFKC changes, moves, or joins to what stands before them.

    Before any other character a text can be cut, and its pieces normalized by themselves.
    """
    decompositions = (unicodedata.decomposition(chr(code)).split() for code in range(0x10000))
    joining = {int(parts[1], 16) for parts in decompositions if len(parts) == 2 and not parts[0].startswith("<")}
    joining.update(range(0x1161, 0x1176), range(0x11A8, 0x11C3))  # Hangul's vowels and finals, which join by a rule
    changed = (code for code in range(0x10000) if unicodedata.normalize("NFKC", chr(code)) != chr(code))
    moved = (code for code in range(0x10000) if unicodedata.combining(chr(code)))
    # Those beyond U+FFFF all: with ranges of them the expression would take ten times as long.
    codes = "".join(f"\\u{code:04x}" for code in sorted(joining.union(changed, moved)))
    return re.compile(f"[{codes}\U00010000-\U0010ffff]+")


def plain_codes(text: str) -> Any:
    """Return a text's code points without case and spacing, uint32."""
    import numpy as np

    return np.frombuffer("".join(text.split()).lower().encode("utf-32-le", "surrogatepass"), np.uint32)


def sketches(plains: Sequence[Any]) -> Any:
    """Return the MinHashes of texts' character 5-grams: a row of 128 numbers for each (R-MinHash of the rensa library).

    Args:
        plains: The texts' code points, uint32.
    """
    import numpy as np
    from rensa import RMinHash

    from nemo_cpt.corpus.hashing import symbols, window_hashes

    if not plains:
        return np.zeros((0, PERMUTATIONS), np.uint32)
    # At least one shingle, the text itself: an empty sketch would resemble every other empty one.
    texts = [
        codes if len(codes) >= SHINGLE else np.append(codes, np.zeros(SHINGLE - len(codes), np.uint32))
        for codes in plains
    ]
    shingles, lengths = list[Any](), [len(codes) for codes in texts]
    # Several texts at once: of short ones each call would cost more than its work. Few, so that they stay in the cache.
    batch = np.cumsum(lengths) // _BATCH
    for first, last in pairwise([0, *(np.flatnonzero(np.diff(batch)) + 1).tolist(), len(texts)]):
        windows = window_hashes(symbols(np.concatenate(texts[first:last])), SHINGLE)
        ends = np.cumsum(lengths[first:last])[:-1]
        within = np.ones(len(windows), bool)
        within[(ends[:, None] - np.arange(1, SHINGLE)).ravel()] = False  # not from one text into the next
        shingles.append(windows[within])
    offsets = np.cumsum([0, *(length - SHINGLE + 1 for length in lengths)]).tolist()
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(shingles), offsets, PERMUTATIONS, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def band_keys(bands: Any) -> Any:
    """Return a number for each band of four MinHashes, the last axis: equal where they are, else hardly ever."""
    import numpy as np

    from nemo_cpt.corpus.hashing import symbols

    halves = np.ascontiguousarray(bands).view(np.uint64)
    return symbols(symbols(halves[..., 0]) + halves[..., 1])


class HeldOut:
    """Held-out documents: first all are added, then others are looked up among them.

    Args:
        similarity: Jaccard similarity of character 5-grams from which two documents are near duplicates.
    """

    def __init__(self, similarity: float) -> None:
        self.similarity = similarity
        self._prints = set[int]()
        self._rows: Any = []  # an array once it is complete
        self._sorted: Any = None  # the bands' keys,
        self._owners: Any = None  # and of each the number of its document

    def add(self, text_print: int, row: Any) -> bool:
        """Add a document by its sketch; return False if it, or one up to width, case and spacing, is there already."""
        if text_print in self._prints:
            return False
        self._prints.add(text_print)
        self._rows.append(row)
        return True

    def complete(self) -> None:
        """Sort what was added, for look-ups; processes that are forked from here on share it."""
        import numpy as np

        self._rows = np.array(self._rows, np.uint32).reshape(-1, PERMUTATIONS)
        keys = self._keys(self._rows)
        order = np.argsort(keys, kind="stable")
        self._sorted, self._owners = keys[order], (order // BANDS).astype(np.uint32)

    def duplicates(self, prints: Sequence[int], texts: Sequence[str]) -> list[str]:
        """Return `exact` or `near` for each text of which a held-out document is a duplicate, else an empty string.

        Args:
            prints: The texts' fingerprints.
            texts: The texts.
        """
        found = ["exact" if each in self._prints else "" for each in prints]
        # A sketch costs many times the fingerprint: none of those that are exact ones.
        others = [number for number, kind in enumerate(found) if not kind]
        for number in self._near(sketches([plain_codes(texts[number]) for number in others])):
            found[others[number]] = "near"
        return found

    def _near(self, rows: Any) -> list[int]:
        """Return the numbers of those sketches that are similar enough to a held-out document's."""
        import numpy as np

        alike, wanted = defaultdict[int, list[Any]](list), self._keys(rows)  # by number, documents with an equal band
        begins: Any = np.searchsorted(self._sorted, wanted)
        ends: Any = np.searchsorted(self._sorted, wanted, "right")
        for place in np.flatnonzero(begins < ends).tolist():
            alike[place // BANDS].append(self._owners[begins[place] : ends[place]])
        return [
            number
            for number, several in alike.items()
            if (self._rows[np.unique(np.concatenate(several))] == rows[number]).mean(axis=1).max() >= self.similarity
        ]

    @staticmethod
    def _keys(rows: Any) -> Any:
        return band_keys(rows.reshape(-1, PERMUTATIONS // BANDS))
