"""Any tokenizer's folder: `prepare` reads it as transformers does, or refuses it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nemo_cpt.corpus.tokenization.encoder_choice import first_difference, probes_of
from nemo_cpt.corpus.tokenization.tokenizer import FastEncoder, Tokenizer, load_tokenizer
from nemo_cpt.errors import CptError
from tests.support import tokenizer_folders


def by_transformers(folder: Path) -> Any:
    """AutoTokenizer's tokenizer for a folder, None where it loads none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False) or None
    except Exception:  # every class has its own
        return None


def ids_of(loaded: Any, text: str) -> list[int] | None:
    """The ids that a model would be given, None where transformers fails on the text."""
    try:
        if loaded.is_fast:
            return loaded(text, add_special_tokens=False)["input_ids"]
        return loaded.convert_tokens_to_ids(loaded.tokenize(text))
    except Exception:  # the bare one of tokenizers
        return None


@given(tokenizer_folders.folders(), st.lists(tokenizer_folders.texts(), min_size=1, max_size=6))
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_ids_are_transformers_or_refused(
    tmp_path_factory: pytest.TempPathFactory, files: Any, texts: list[str]
) -> None:
    folder = tokenizer_folders.write(files, tmp_path_factory.mktemp("fuzz") / "tokenizer")
    theirs = by_transformers(folder)
    try:
        ours = load_tokenizer(folder)
    except CptError:
        event("refused" if theirs else "refused by both")
        return
    if theirs is None:
        event("transformers cannot load it")
        return
    event("read plainly" if ours.reading is None else "read by transformers")
    assert ours.vocabulary_size == len(theirs)
    assert ours.highest == max(theirs.get_vocab().values())
    for kind in ("eos", "bos", "pad"):
        described = getattr(ours, kind)
        number = getattr(theirs, f"{kind}_token_id")
        assert described == (None if number is None else (getattr(theirs, f"{kind}_token"), number))
    assert {t.content for t in theirs.added_tokens_decoder.values() if t.special} <= ours.special.keys()
    encoders = [ours.reference_encoder(), *fast_encoders(ours)]
    for text in texts:
        if (expected := ids_of(theirs, text)) is not None:
            for encoder in encoders:
                assert encoder.encode([text])[0].tolist() == expected, f"{text!r} {encoder.name}"


def fast_encoders(tokenizer: Tokenizer) -> list[FastEncoder]:
    """fastokens for a tokenizer, if it gives the reference's ids for the probes."""
    probes = probes_of(tokenizer)
    try:
        encoder = FastEncoder(tokenizer.definition, tokenizer.split_special_tokens)
        different = first_difference(encoder.encode(probes), tokenizer.reference_encoder().encode(probes))
    except BaseException:  # a Rust panic is no Exception
        return []
    return [] if different is not None else [encoder]
