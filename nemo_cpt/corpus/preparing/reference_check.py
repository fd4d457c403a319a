"""Documents of a finished dataset compared with what transformers itself gives for their texts."""

import random
from collections.abc import Iterator
from pathlib import Path

from nemo_cpt.corpus.dataset.index import read_index, read_tokens
from nemo_cpt.corpus.dataset.manifest import read_manifest
from nemo_cpt.corpus.preparing.encode import Layout, lay_out
from nemo_cpt.corpus.reading.chunks import Feed, texts_of
from nemo_cpt.corpus.reading.sources import Source
from nemo_cpt.corpus.tokenization.characters import Lookout
from nemo_cpt.corpus.tokenization.tokenizer import (
    Encoder,
    Tokenizer,
    TransformersEncoder,
    describe_by_transformers,
    load_by_transformers,
)
from nemo_cpt.errors import CptError

SHORT = 64  # characters of a text that may have no tokens: blanks, controls, what a vocabulary without bytes lacks
READ_FROM_FILES = ("vocabulary_size", "eos", "bos", "pad", "special", "split_special_tokens")


def verify_documents(
    prefix: str, sources: list[Source], tokenizer: Tokenizer, layout: Layout, split_special_tokens: bool, count: int
) -> tuple[int, int]:
    """Encode documents again with transformers' own tokenizer and compare them with the dataset.

    Reads the inputs once more, to find the documents' texts: `count` random ones, and two for each kind of character in
    the whole corpus.

    Returns:
        How many random documents, and how many kinds of characters, were compared.

    Raises:
        CptError: A document differs, or transformers reads something else from the tokenizer's files.
    """
    folder = Path(tokenizer.folder)
    loaded = tokenizer.loaded or load_by_transformers(folder)
    _check_description(tokenizer, folder, loaded)
    encoder = TransformersEncoder(loaded, split_special_tokens)
    index = read_index(prefix)
    # Unseeded on purpose: each run of the check looks at other documents.
    wanted = set(random.sample(range(index.documents), min(count, index.documents)))
    # Every text, since this pass has the time; while encoding, only one in `EVERY` is looked through.
    compared, lookout = 0, Lookout(every=1)
    all_have_tokens = layout.keep_empty or read_manifest(prefix)["empty"] == 0
    for first, texts in _documents(sources, layout, encoder, all_have_tokens):
        chosen = {number for number in range(len(texts)) if first + number in wanted}
        for number in sorted(chosen | {number for _, number, _ in lookout.look(texts)}):
            expected, _ = lay_out(*encoder.encode([texts[number]]), layout)
            if first + number >= index.documents or read_tokens(index, first + number).tobytes() != expected:
                raise CptError(
                    f"Document {first + number} of {prefix} is not what {encoder.name} gives for its text, which "
                    f"begins {texts[number][:60]!r}. "
                    f"Write it again with the reference tokenizer: fast=False, overwrite=True (--no-fast --overwrite)."
                )
        compared += len(chosen)
    # Fewer texts than documents: the inputs are not those that the dataset was made of.
    if compared < len(wanted):
        raise CptError(
            f"{prefix} has documents whose texts are not in the inputs: {len(wanted) - compared} of {len(wanted)}."
        )
    return compared, len(lookout.found)


def _check_description(tokenizer: Tokenizer, folder: Path, loaded: object) -> None:
    theirs = describe_by_transformers(folder, loaded)
    for name in READ_FROM_FILES:
        if (ours := getattr(tokenizer, name)) != theirs.get(name):
            raise CptError(
                f"prepare took {ours!r} for the {name} of {tokenizer.name}, transformers takes {theirs.get(name)!r}: "
                "the dataset is not what transformers gives. Please report the tokenizer's files."
            )


def _documents(
    sources: list[Source], layout: Layout, encoder: Encoder, all_have_tokens: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield the texts of the dataset's documents, some at a time, with the number of the first."""
    first = 0
    for task in Feed(sources, layout.json_key, 2 << 20):
        texts = texts_of(task, layout.json_key).texts
        # Documents without tokens are not in the file, and would shift all numbers after them.
        if not all_have_tokens:
            texts = [text for text in texts if _surely_has_tokens(text) or len(encoder.encode([text])[0])]
        yield first, texts
        first += len(texts)


def _surely_has_tokens(text: str) -> bool:
    return len(text) > SHORT and not text.isspace()
