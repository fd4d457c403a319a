"""A tokenizer known by what it does: the ids of a few texts, which `prepare` keeps in the manifest of each dataset.

The files of one tokenizer differ between copies of it (padding, a chat template, another version of the format), and
tokenizers that have as many tokens each are still not the same one; the ids of ordinary text tell.
"""

from collections.abc import Mapping

from nemo_cpt.corpus.tokenization.encoder_choice import PROBES
from nemo_cpt.corpus.tokenization.tokenizer import Encoder

TEXTS = tuple(text for text in PROBES if text and len(text) < 200)  # short enough to be read in a manifest


def probe(encoder: Encoder) -> dict[str, str]:
    """Return the ids of each probe text, with blanks between them."""
    return _ids(list(TEXTS), encoder)


def first_difference(recorded: Mapping[str, str], encoder: Encoder) -> tuple[str, str, str] | None:
    """Return the first recorded text whose ids are others in `encoder`, with those recorded and those; else None."""
    found = _ids(list(recorded), encoder)
    return next(((text, ids, found[text]) for text, ids in recorded.items() if found[text] != ids), None)


def _ids(texts: list[str], encoder: Encoder) -> dict[str, str]:
    ids, starts = encoder.encode(texts)
    bounds = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    return {text: " ".join(map(str, ids[a:b].tolist())) for text, (a, b) in zip(texts, bounds, strict=True)}
