"""A look at a finished dataset: its size, its documents' lengths, some of its text, and whether it is sound."""

import os
import random
from dataclasses import dataclass, field
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.dataset.index import BLOCK, Index, document_lengths, max_token_id, read_index, read_tokens
from nemo_cpt.corpus.dataset.manifest import manifest_path, read_manifest
from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer, load_tokenizer
from nemo_cpt.errors import CptError

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Inspection:
    """What a dataset is.

    Attributes:
        prefix: Megatron's prefix.
        dtype: Type of the tokens on disk.
        documents: Number of documents, empty ones included.
        tokens: Number of tokens.
        nbytes: Size of the `.bin`.
        percentiles: Document length in tokens by percentile.
        histogram: [shortest, longest, documents, tokens] of each bin of lengths; the bins double.
        empty: Documents without tokens.
        highest: The largest token id.
        vocabulary_size: Of the tokenizer given, or of the one that the manifest names; None without either.
        end: The token that ends most of the documents looked at, as [id, text], and the share of them that it ends.
        samples: Beginnings of documents: `document`, `tokens`, `text` (None without a tokenizer).
        manifest: The manifest, empty where there is none.
        warnings: Sentences for people.
    """

    prefix: str
    dtype: str
    documents: int
    tokens: int
    nbytes: int
    percentiles: dict[int, int]
    histogram: list[list[int]]
    empty: int
    highest: int
    vocabulary_size: int | None
    end: dict[str, Any]
    samples: list[dict[str, Any]]
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)  # a session shows what is returned
    warnings: list[str] = field(default_factory=list)


@checked
def inspect(
    prefix: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    samples: int = 3,
    seed: int = 0,
) -> Inspection:
    """Read a dataset whole and describe it.

    Args:
        prefix: `ds/ja_text_document`, or `prepare`'s output prefix `ds/ja`.
        tokenizer: Folder or hub name of the tokenizer to decode with and to check the vocabulary against.
        samples: Documents to decode.
        seed: Which ones.

    Raises:
        CptError: A file is missing, truncated or corrupt, or has ids beyond the tokenizer's vocabulary; `samples` is
            negative.
    """
    if samples < 0:
        raise CptError(f"samples is {samples}; it is a number of documents, 0 for none.")
    index = read_index(prefix)
    # Before anything is decoded: a corrupt pointer would show as nonsense text, and be taken for a wrong tokenizer.
    check_index(index)
    manifest = read_manifest(prefix) if manifest_path(prefix).exists() else {}
    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    # The tokenizer that was given goes first: who names one wants to know whether the dataset fits it.
    size = loaded.vocabulary_size if loaded else manifest.get("tokenizer", {}).get("vocabulary_size")
    highest = max_token_id(prefix)
    if size is not None and highest >= size:
        raise CptError(
            f"{index.prefix}.bin has the token id {highest}, but {loaded.name if loaded else 'its manifest'} has a "
            "vocabulary "
            f"of {size}: it was made with another tokenizer, or is corrupt."
        )
    lengths = document_lengths(index)
    chosen = random.Random(seed).sample(range(index.documents), min(samples, index.documents))
    return Inspection(
        prefix=index.prefix,
        dtype=index.dtype,
        documents=index.documents,
        tokens=index.tokens,
        nbytes=index.tokens * index.itemsize,
        percentiles=percentiles(lengths),
        histogram=_histogram(lengths),
        empty=int((lengths == 0).sum()),
        highest=highest,
        vocabulary_size=size,
        end=_common_end(index, loaded, seed),
        samples=[_sample(index, number, loaded) for number in chosen],
        manifest=manifest,
        warnings=_warnings(manifest, loaded),
    )


def check_index(index: Index) -> None:
    """Check that pointers and boundaries follow from the lengths, entry by entry.

    Raises:
        CptError: They do not: the `.idx` is corrupt.
    """
    import numpy as np

    expected = 0
    for begin in range(0, len(index.lengths), BLOCK):
        lengths = index.lengths[begin : begin + BLOCK].astype(np.int64)
        starts = expected + np.concatenate(([0], np.cumsum(lengths)[:-1])) * index.itemsize
        wrong = np.flatnonzero((starts != index.pointers[begin : begin + BLOCK]) | (lengths < 0))
        if len(wrong):
            number = begin + int(wrong[0])
            raise CptError(f"{index.prefix}.idx is corrupt: sequence {number} does not begin where the last one ends.")
        expected = int(starts[-1] + lengths[-1] * index.itemsize)
    for begin in range(0, index.documents, BLOCK):
        # One more than a block: the step from each block to the next is checked too.
        boundaries = index.document_indices[begin : begin + BLOCK + 1]
        if (np.diff(boundaries) < 0).any() or index.document_indices[0] != 0:
            raise CptError(f"{index.prefix}.idx is corrupt: its document boundaries do not ascend from 0.")


def percentiles(lengths: Any) -> dict[int, int]:
    """Return the value at each of `PERCENTILES`, none for no values."""
    import numpy as np

    if len(lengths) == 0:
        return {}
    # "nearest": a length that some document has, not one interpolated between two.
    return {percentile: int(np.percentile(lengths, percentile, method="nearest")) for percentile in PERCENTILES}


def _histogram(lengths: Any) -> list[list[int]]:
    import numpy as np

    bins = []
    # Empty documents share the first bin with those of one token; the report counts them separately.
    low, high = 0, 2
    while low <= lengths.max(initial=0):
        chosen = lengths[(lengths >= low) & (lengths < high)]
        bins.append([low, high - 1, len(chosen), int(chosen.sum(dtype=np.int64))])
        low, high = high, high * 2
    first = next((i for i, entry in enumerate(bins) if entry[2]), 0)
    return bins[first:]


def _common_end(index: Index, tokenizer: Tokenizer | None, seed: int) -> dict[str, Any]:
    """Return the token that ends most of up to 1,000 documents: the end-of-document token, if there is one."""
    chosen = random.Random(seed).sample(range(index.documents), min(1000, index.documents))
    ends = [int(tokens[-1]) for tokens in (read_tokens(index, number) for number in chosen) if len(tokens)]
    if not ends:
        return {}
    common = max(set(ends), key=ends.count)
    text = decode(tokenizer, [common]) if tokenizer else None
    return {"id": common, "text": text, "share": ends.count(common) / len(ends)}


def _sample(index: Index, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    tokens = read_tokens(index, number)
    text = decode(tokenizer, tokens[:SAMPLE_TOKENS].tolist()) if tokenizer else None
    return {"document": number, "tokens": len(tokens), "text": text, "ids": tokens[:8].tolist()}


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of token ids, special tokens included."""
    # Not the fast encoder, which only encodes; and special tokens are shown, since they are what one looks for here.
    return tokenizer.reference_encoder().decode(ids)


def _warnings(manifest: dict[str, Any], tokenizer: Tokenizer | None) -> list[str]:
    made_with = manifest.get("tokenizer", {})
    if tokenizer and made_with and made_with["sha256"] != tokenizer.sha256:
        return [
            f"The dataset was made with {made_with['name']}, whose vocabulary files differ from {tokenizer.name}'s."
        ]
    return []
