"""Which old tokens a new one is used like: by a corpus whose answer is known, the same each time."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from nemo_cpt.errors import CptError
from nemo_cpt.vocabulary import grow
from nemo_cpt.vocabulary.byte_level import ByteLevelBPE, read_byte_level
from nemo_cpt.vocabulary.similarity import Likeness, similar_tokens, sparsemax
from tests.vocabulary.conftest import CORPUS, small_base

NEW, LIKE, UNLIKE = "猫", "q", "z"  # the new one's company is the first's, and never the second's


def _corpus(path: Path) -> Path:
    """Texts in which two tokens stand among the same ones, and a third among others."""
    chance = random.Random(0)
    lines = []
    for _ in range(400):
        words = [*chance.choices("abcde", k=3), chance.choice((NEW, LIKE)), *chance.choices("abcde", k=3)]
        others = [*chance.choices("vwxy0", k=3), UNLIKE, *chance.choices("vwxy0", k=3)]
        lines += [json.dumps({"text": "".join(f"{word}." for word in each)}) for each in (words, others)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[ByteLevelBPE, ByteLevelBPE]:
    """A tokenizer, and the same grown by the new token and the parts of it."""
    folder = tmp_path_factory.mktemp("similar")
    base = small_base(folder / "base")
    (folder / "ja.jsonl").write_text(json.dumps({"text": f"{NEW}." * 50}))
    grow(str(base), str(folder / "ja.jsonl"), folder / "grown", tokens=2, multiple_of=1)
    return read_byte_level(str(base)), read_byte_level(str(folder / "grown"))


def test_a_new_token_is_like_those_in_whose_company_it_is(
    tokenizers: tuple[ByteLevelBPE, ByteLevelBPE], tmp_path: Path
) -> None:
    old, new = tokenizers
    found = similar_tokens(old, new, str(_corpus(tmp_path / "corpus.jsonl")))
    (new_id,) = new.backend().encode(NEW, add_special_tokens=False).ids
    assert found.keys() == {new_id}  # the part of it is in no text
    weights = dict(zip(found[new_id].ids.tolist(), found[new_id].weights.tolist(), strict=True))
    assert max(weights, key=lambda each: weights[each]) == old.ids[LIKE]
    assert old.ids[UNLIKE] not in weights
    assert max(weights) < old.size
    assert sum(weights.values()) == pytest.approx(1)


def test_it_is_the_same_each_time_and_in_any_order_of_the_texts(
    tokenizers: tuple[ByteLevelBPE, ByteLevelBPE], tmp_path: Path
) -> None:
    lines = _corpus(tmp_path / "one.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(f"{line.rstrip()}\n" for line in reversed(lines)))
    one, other = (similar_tokens(*tokenizers, str(tmp_path / name)) for name in ("one.jsonl", "other.jsonl"))
    assert _plain(one) == _plain(other)


def _plain(found: dict[int, Likeness]) -> dict[int, tuple[list[int], list[float]]]:
    return {number: (each.ids.tolist(), each.weights.tolist()) for number, each in found.items()}


def test_a_corpus_without_the_language_is_refused(tokenizers: tuple[ByteLevelBPE, ByteLevelBPE]) -> None:
    with pytest.raises(CptError, match=r"holds 0 of the 2 new tokens 20 times or more"):
        similar_tokens(*tokenizers, str(CORPUS / "en.jsonl"))


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    assert sparsemax(np.array([[1.0, 0.5, -1.0], [3.0, 0.0, 0.0], [0.2, 0.2, 0.2]])) == pytest.approx(
        np.array([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    )
    scores = np.random.default_rng(0).standard_normal((4, 30))
    found = sparsemax(scores)
    assert found.sum(axis=1) == pytest.approx(np.ones(4))
    for weights, row in zip(found, scores, strict=True):
        # The same distance below each score that is kept, and no other reaches it.
        gaps = (row - weights)[weights > 0]
        assert np.ptp(gaps) < 1e-6
        assert row[weights == 0].max() <= gaps.mean() + 1e-6
