"""Exact and near duplicates of a few held-out documents, looked for in many."""

import unicodedata
from typing import Any

from nemo_cpt.errors import CptError

SHINGLE = 5  # characters, so that it also works for languages written without spaces
PERMUTATIONS, BANDS, SEED = 128, 32, 42
# A pair is found with a probability of 1 - (1 - s^4)^32 where it is similar by s: 99 % at 0.6, 87 % here, 23 % at 0.3.
LEAST_SIMILARITY = 0.5


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
    plain = "".join(unicodedata.normalize("NFKC", text).split()).lower()
    return xxhash.xxh3_64_intdigest(plain.encode("utf-8", "surrogatepass"))


def sketch(text: str) -> Any:
    """Return the MinHash of a text's character 5-grams (R-MinHash of the rensa library, 128 permutations)."""
    from rensa import RMinHash

    plain = "".join(text.split()).lower()
    minhash = RMinHash(PERMUTATIONS, SEED)
    # At least one shingle, the text itself: an empty sketch would resemble every other empty one.
    minhash.update({plain[i : i + SHINGLE] for i in range(max(len(plain) - SHINGLE + 1, 1))})
    return minhash


class HeldOut:
    """An index of held-out documents.

    Args:
        similarity: Jaccard similarity of character 5-grams from which two documents are near duplicates.
    """

    def __init__(self, similarity: float) -> None:
        from rensa import RMinHashDeduplicator

        self._prints: set[int] = set()
        self._sketches = RMinHashDeduplicator(similarity, PERMUTATIONS, True, BANDS, SEED)

    def add(self, text_print: int, minhash: Any) -> bool:
        """Add a document; return False if it, or one up to width, case and spacing, is there already."""
        if text_print in self._prints:
            return False
        self._prints.add(text_print)
        self._sketches.add(str(len(self._prints)), minhash)  # under a key that nobody asks for
        return True

    def duplicate(self, text: str) -> str:
        """Return `exact` or `near` where a held-out document is a duplicate of this text, else an empty string."""
        # First the exact ones: the sketch costs many times the fingerprint.
        if fingerprint(text) in self._prints:
            return "exact"
        return "near" if self._sketches.get_duplicates(sketch(text)) else ""
