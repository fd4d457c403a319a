"""What a grown tokenizer buys, by hand."""

import json
from pathlib import Path

import pytest

from nemo_cpt.checkpoint import import_hf
from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from nemo_cpt.errors import CptError
from nemo_cpt.vocabulary import worth
from tests.vocabulary.conftest import CORPUS, small_base, texts

JA = str(CORPUS / "ja.jsonl")
MODEL = {"tokens": 1e9, "parameters": 10_000_000, "hidden_size": 100}


def _tokens(folder: Path) -> int:
    """Of a training: with the token at each document's end, which no growth saves."""
    return len(load_tokenizer(str(folder)).reference_encoder().encode(texts("ja"))[0]) + len(texts("ja"))


@pytest.mark.parametrize("tied", [True, False])
def test_the_figures(tied: bool, base: Path, grown: Path) -> None:
    found = worth(str(base), str(grown), JA, tied=tied, **MODEL)
    before, after = _tokens(base), _tokens(grown)
    rows = load_tokenizer(str(grown)).vocabulary_size - load_tokenizer(str(base)).vocabulary_size
    assert found.tokens == round(1e9 * after / before)
    assert found.tokens_saved == pytest.approx(1 - after / before, abs=1e-4)
    assert found.new_parameters == rows * 100 * (1 if tied else 2)
    computed = 10_000_000 - (0 if tied else 703 * 100)
    assert found.dearer_token == pytest.approx(rows * 100 / computed, rel=1e-3)
    spent = found.tokens * (computed + rows * 100) + found.break_even_tokens * (computed + rows * 100)
    assert spent == pytest.approx(1e9 * computed, rel=1e-3)
    assert found.training_gib == pytest.approx(found.new_parameters * 18 / 2**30, abs=0.01)


def test_rows_that_a_short_training_hardly_sees(base: Path, grown: Path) -> None:
    shares = [worth(str(base), str(grown), JA, tied=True, **MODEL | {"tokens": each}).seldom for each in (1e3, 1e12)]
    assert shares[0] == 1.0
    assert shares[1] < 0.5  # tokens that are only parts of others do not stand in the text


def test_spare_rows_of_the_model_cost_nothing(base: Path, grown: Path) -> None:
    sizes = [load_tokenizer(str(each)).vocabulary_size for each in (base, grown)]
    spare = worth(str(base), str(grown), JA, tied=False, model_rows=sizes[0] + 200, **MODEL)
    assert (spare.new_tokens, spare.new_rows) == (sizes[1] - sizes[0], sizes[1] - sizes[0] - 200)
    enough = worth(str(base), str(grown), JA, tied=False, model_rows=sizes[1] + 1, **MODEL)
    assert (enough.new_rows, enough.new_parameters, enough.dearer_token, enough.training_gib) == (0, 0, 0, 0)
    assert enough.compute_saved == enough.tokens_saved


def test_what_cannot_be_said(base: Path, grown: Path, tmp_path: Path) -> None:
    other = small_base(tmp_path / "other", r"\p{L}+|[^\p{L}]")
    for first, second, changes, message in (
        (other, grown, {}, "did not grow"),
        (base, base, {}, "has no token that"),
        (base, grown, {"tokens": 0}, "tokens is 0"),
    ):
        with pytest.raises(CptError, match=message):
            worth(str(first), str(second), JA, tied=True, **MODEL | changes)


def test_the_command(base: Path, grown: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nemo_cpt.cli import app, vocabulary  # noqa: F401  registers its commands
    from tests.checkpoint.test_growing import make

    model = make("llama31", tmp_path / "hf", base)
    arguments = ["tokenizer", "worth", str(model), str(grown), JA, "--tokens", "1e9"]
    assert "break-even" in CliRunner().invoke(app, arguments).stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["new_parameters"] == 2 * 48 * found["new_rows"]
    import_hf(model, tmp_path / "nemo")
    arguments[2] = str(tmp_path / "nemo")
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout) == found
    arguments[4] = str(CORPUS / "en.jsonl")
    said = CliRunner().invoke(app, arguments).stdout
    assert "none: on such text nothing is saved" in said
    assert "% more in all" in said
