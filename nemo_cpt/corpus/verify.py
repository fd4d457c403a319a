"""Documents of a finished dataset compared with what the reference tokenizer gives for their texts."""

import random
from collections.abc import Iterator

from nemo_cpt.corpus.encode import Layout, lay_out
from nemo_cpt.corpus.feed import Feed, texts_of
from nemo_cpt.corpus.index import read_index, read_tokens
from nemo_cpt.corpus.sources import Source
from nemo_cpt.corpus.tokenizer import Encoder, Tokenizer, strict_encoder
from nemo_cpt.errors import CptError


def verify_documents(
    prefix: str, sources: list[Source], tokenizer: Tokenizer, layout: Layout, split_special_tokens: bool, count: int
) -> int:
    """Encode `count` random documents again with transformers' own tokenizer and compare them with the dataset.

    Reads the inputs once more to find the documents' texts; returns how many were compared.

    Raises:
        CptError: A document differs.
    """
    index = read_index(prefix)
    encoder = strict_encoder(tokenizer, split_special_tokens)
    wanted = set(random.sample(range(index.documents), min(count, index.documents)))
    last = max(wanted)
    compared = 0
    for document, text in _documents(sources, layout, encoder):
        if document in wanted:
            expected, _ = lay_out(*encoder.encode([text]), layout)
            if read_tokens(index, document).tobytes() != expected:
                raise CptError(
                    f"Document {document} of {prefix} is not what {encoder.name} gives for its text, which begins "
                    f"{text[:60]!r}. "
                    f"Write it again with the reference tokenizer: fast=False, overwrite=True (--no-fast --overwrite)."
                )
            compared += 1
        if document >= last:
            break
    if compared < len(wanted):
        raise CptError(
            f"{prefix} has documents whose texts are not in the inputs: {len(wanted) - compared} of {len(wanted)}."
        )
    return compared


def _documents(sources: list[Source], layout: Layout, encoder: Encoder) -> Iterator[tuple[int, str]]:
    """Yield the dataset's documents: number and text."""
    number = 0
    for task in Feed(sources, layout.json_key, 2 << 20):
        for text in texts_of(task, layout.json_key).texts:
            # Only blanks can vanish: some SentencePiece normalizers strip them
            if layout.keep_empty or not (text.isspace() or not text) or len(encoder.encode([text])[0]):
                yield number, text
                number += 1
