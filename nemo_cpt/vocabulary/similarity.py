"""Which of its old tokens a grown vocabulary's new ones are used like, by the company that they keep in a corpus.

After FOCUS (Dobler and de Melo, arXiv 2305.14481): a new row is a sum of old ones, weighted by the sparsemax of their
cosine similarities. FOCUS takes these from fastText, trained on the corpus as the new tokenizer cuts it; here they are
of counts, positive pointwise mutual information whose largest singular directions are kept (Levy et al., TACL 2015),
which needs no other library and gives the same numbers each time. They know nothing of a token's spelling, so a token
that the sample seldom holds gets no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nemo_cpt.corpus.reading.sources import Inputs
from nemo_cpt.errors import CptError
from nemo_cpt.vocabulary.byte_level import ByteLevelBPE
from nemo_cpt.vocabulary.samples import draw

SAMPLE_BYTES = 32 * 2**20
MIN_SEEN = 20  # times in the sample; of what is seen less the neighbours are chance
CANDIDATES = 8192  # old tokens, the most frequent ones, of which the weights are
CONTEXTS = 2048  # tokens, the most frequent ones, whose company is counted
DIMENSIONS = 256
_WINDOW = 5  # tokens to either side; the farther ones count less
_SMOOTHING = 0.75  # of the contexts' frequencies, as word2vec's
_BATCH = 256
_AT_ONCE = 2**20  # pairs


@dataclass(frozen=True)
class Likeness:
    """The old tokens that a new one is used like.

    Attributes:
        ids: of old tokens.
        weights: of each, above 0; their sum is 1.
    """

    ids: np.ndarray
    weights: np.ndarray


def similar_tokens(
    old: ByteLevelBPE, new: ByteLevelBPE, inputs: Inputs, json_key: str = "text", sample_bytes: int = SAMPLE_BYTES
) -> dict[int, Likeness]:
    """Weigh old tokens for each new token that a corpus holds often enough.

    Memory: the counts, [old and new tokens, `CONTEXTS`] in fp32, and the sample.

    Args:
        old: the tokenizer.
        new: the same, grown.
        inputs: texts of the language that was added, as `prepare` takes them.
        json_key: the field that holds the text.
        sample_bytes: of the corpus at most; documents are drawn by the hash of their text.

    Returns:
        By new id; without those that are seen fewer than `MIN_SEEN` times.

    Raises:
        CptError: the corpus is missing or unreadable, or holds too few of the old tokens or of the new ones.
    """
    stream = _stream(new, draw(inputs, json_key, sample_bytes, hold_out=False).texts)
    counts = np.bincount(stream[stream >= 0], minlength=new.size)
    # By frequency: candidates and contexts are the first of them. Stable, so that equals stand by their ids each time.
    frequent = np.argsort(-counts, kind="stable")
    seen = frequent[counts[frequent] >= MIN_SEEN]
    wanted, candidates = np.sort(seen[seen >= old.size]), seen[seen < old.size][:CANDIDATES]
    if not len(wanted) or len(candidates) < 2:
        raise CptError(
            f"{inputs} holds {len(wanted):,} of the {new.size - old.size:,} new tokens {MIN_SEEN} times or more, and "
            f"{len(candidates):,} of the old ones: that is too little to tell which are alike. Give more text of the "
            "language that was added, or another initialisation"
        )
    vectors = _vectors(_company(stream, np.concatenate([candidates, wanted]), frequent[:CONTEXTS], new.size))
    known, asked = vectors[: len(candidates)], vectors[len(candidates) :]
    found: dict[int, Likeness] = {}
    for start in range(0, len(wanted), _BATCH):
        # Sparse: of some thousand candidates a few have a weight, the others 0.
        for number, row in enumerate(sparsemax(asked[start : start + _BATCH] @ known.T), start):
            (places,) = np.nonzero(row)
            found[int(wanted[number])] = Likeness(candidates[places], row[places])
    return found


def sparsemax(scores: np.ndarray) -> np.ndarray:
    """Rows of scores [rows, n] projected onto the simplex (Martins and Astudillo, arXiv 1602.02068): most become 0."""
    descending = -np.sort(-scores.astype(np.float64), axis=1)
    excess = descending.cumsum(axis=1) - 1
    # How many of the largest stay above 0: those for which it is still true.
    support = (descending * np.arange(1, scores.shape[1] + 1) > excess).sum(axis=1)
    threshold = excess[np.arange(len(scores)), support - 1] / support
    return np.maximum(scores - threshold[:, None], 0).astype(np.float32)


def _stream(tokenizer: ByteLevelBPE, texts: Sequence[str]) -> np.ndarray:
    """The texts' ids one behind the other, with -1 between texts, as wide as the window."""
    backend, gap = tokenizer.backend(), np.full(_WINDOW, -1, np.int32)

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)
                yield gap

    return np.concatenate(list(pieces()))


def _company(stream: np.ndarray, rows: np.ndarray, contexts: np.ndarray, size: int) -> np.ndarray:
    """How often each of `rows` has each of `contexts` beside it, the nearer the more: [rows, contexts] in fp32."""
    row_of, column_of = (np.full(size + 1, -1, np.int64) for _ in range(2))  # the last one is the gap's, -1
    row_of[rows], column_of[contexts] = np.arange(len(rows)), np.arange(len(contexts))
    company = np.zeros((len(rows), len(contexts)), np.float32)
    flat = company.reshape(-1)
    for distance in range(1, _WINDOW + 1):
        weight = np.float32(1 / distance)
        for start in range(0, len(stream) - distance, _AT_ONCE):
            end = min(start + _AT_ONCE, len(stream) - distance)
            left, right = stream[start:end], stream[start + distance : end + distance]
            for one, other in ((left, right), (right, left)):
                row, column = row_of[one], column_of[other]
                known = (row >= 0) & (column >= 0)
                np.add.at(flat, row[known] * len(contexts) + column[known], weight)
    return company


def _vectors(company: np.ndarray) -> np.ndarray:
    """Unit vectors of tokens by their company, which is overwritten; zeros for a token that has none."""
    of_row = company.sum(axis=1, dtype=np.float64)
    of_column = company.sum(axis=0, dtype=np.float64) ** _SMOOTHING
    share = of_column / of_column.sum()
    gram = np.zeros((company.shape[1],) * 2)
    for start in range(0, len(company), _BATCH):
        block = company[start : start + _BATCH]
        expected = np.maximum(of_row[start : start + _BATCH, None] * share, np.finfo(np.float32).tiny)
        # Positive pointwise mutual information: the logarithm of a ratio below 1 is taken for 0.
        np.log(np.maximum(block / expected, 1), out=block, casting="same_kind")
        gram += block.T @ block
    values, directions = np.linalg.eigh(gram)  # from the smallest on
    largest = slice(-1, -1 - DIMENSIONS, -1)
    # The gram matrix has the squares of the singular values; vectors are U times their roots.
    scale = np.maximum(values[largest], np.finfo(np.float32).eps * values[-1]) ** -0.25
    vectors = company @ (directions[:, largest] * scale).astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
