"""Exact and near duplicates within a corpus, told by a sketch of each document: what repeats an earlier one is dropped.

A document's sketch is a row of numbers on disk, so that the corpus may be larger than the memory, and so that sketches
of parts of a corpus can be laid behind one another and compared as one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.cleaning.rule import Limits
from nemo_cpt.corpus.splitting.duplicates import BANDS, PERMUTATIONS, band_keys, check_similarity, sketches

ROW = np.dtype([("fingerprint", np.uint64), ("nbytes", np.uint64), ("minhash", np.uint32, PERMUTATIONS)])
_PAIRS = 1 << 14  # whose MinHashes are compared at once
_EQUAL = 2.0  # the similarity of equal documents: above that of those whose MinHashes are equal


@dataclass(frozen=True)
class Duplicates(Limits):
    """Which documents of a corpus are one too many.

    Attributes:
        exact: Drop documents equal to an earlier one up to width, case and spacing.
        near: Jaccard similarity of character 5-grams from which a document is a duplicate of an earlier one, estimated
            by MinHash (rensa, 128 permutations in 32 bands); None keeps near duplicates. FineWeb: 0.75, Swallow: 0.8.
    """

    exact: bool = True
    near: float | None = 0.8

    def __post_init__(self) -> None:
        """Check the similarity.

        Raises:
            CptError: As `check_similarity`.
        """
        super().__post_init__()
        if self.near is not None:
            check_similarity("near", self.near)


@dataclass(frozen=True)
class Duplicate:
    """A document that repeats an earlier one.

    Attributes:
        document: Its number.
        of: That of the document that it repeats, or that repeats in turn: one that is kept.
        similarity: To the most similar earlier one, estimated; 1 for an exact duplicate.
        exact: Whether it is equal up to width, case and spacing.
    """

    document: int
    of: int
    similarity: float
    exact: bool


def sketch(plains: Sequence[Any], nbytes: Sequence[int]) -> Any:
    """Return a row for each text.

    Args:
        plains: The texts' code points without width, case and spacing, uint32.
        nbytes: Bytes of their documents, which the row keeps.
    """
    import xxhash

    rows: Any = np.zeros(len(plains), ROW)
    rows["minhash"] = sketches(plains)
    rows["fingerprint"] = [xxhash.xxh3_64_intdigest(codes) for codes in plains]
    rows["nbytes"] = nbytes
    return rows


def find_duplicates(path: Path, wanted: Duplicates) -> list[Duplicate]:
    """Find the documents that repeat an earlier one, from a file of `ROW`s; in the documents' order.

    Memory: some 60 bytes a document; the sketches stay on disk.
    """
    if not path.stat().st_size:
        return []
    rows: Any = np.memmap(path, ROW, "r")
    exact_pairs = _exact_pairs(rows) if wanted.exact else ()
    near_pairs = _near_pairs(rows, wanted.near) if wanted.near is not None else ()
    nearest = dict[int, tuple[float, int]]()  # by document, how similar the most similar earlier one is, and which
    for first, second, similarity in chain(exact_pairs, near_pairs):
        # Of equally similar ones the earliest, whatever the order in which bands found them.
        if (known := nearest.get(second)) is None or (similarity, -first) > (known[0], -known[1]):
            nearest[second] = (similarity, first)
    return [
        Duplicate(document, _kept_twin(document, nearest), min(similarity, 1.0), similarity == _EQUAL)
        for document, (similarity, _) in sorted(nearest.items())
    ]


def _kept_twin(document: int, nearest: dict[int, tuple[float, int]]) -> int:
    """Return the document that one repeats, or that repeats in turn, up to one that repeats none."""
    # Each step leads to an earlier document, so that it ends.
    while document in nearest:
        document = nearest[document][1]
    return document


def _exact_pairs(rows: Any) -> Iterator[tuple[int, int, float]]:
    """Yield each document that has an earlier one's fingerprint, with the first that has it."""
    for first, second in _neighbours(np.array(rows["fingerprint"]), first_only=True):
        yield from ((int(a), int(b), _EQUAL) for a, b in zip(first, second, strict=True))


def _near_pairs(rows: Any, similarity: float) -> Iterator[tuple[int, int, float]]:
    """Yield pairs that are similar enough, the earlier one first."""
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        keys = band_keys(rows["minhash"][:, band * width : (band + 1) * width])
        for first, second in _neighbours(keys, first_only=False):
            agreed = (rows["minhash"][first] == rows["minhash"][second]).mean(axis=1)
            similar = agreed >= similarity
            found = zip(first[similar], second[similar], agreed[similar], strict=True)
            yield from ((int(a), int(b), float(share)) for a, b, share in found)


def _neighbours(keys: Any, first_only: bool) -> Iterator[tuple[Any, Any]]:
    """Yield, a batch at a time, the pairs of an equal key: each with the first that has it, and the one before it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    begins = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    # For each place, where its group begins.
    group = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))
    # A group of n equal keys has n(n-1)/2 pairs, millions of one boilerplate page: two for each member find its chain.
    partners = [group[again]] if first_only else [group[again], again - 1]
    pairs = np.unique(np.stack((np.concatenate(partners), np.tile(again, len(partners)))), axis=1)
    for start in range(0, pairs.shape[1], _PAIRS):
        first, second = pairs[:, start : start + _PAIRS]
        yield order[first], order[second]
