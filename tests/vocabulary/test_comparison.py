"""Tokenizers side by side."""

import json
from pathlib import Path

import pytest

from nemo_cpt.errors import CptError
from nemo_cpt.vocabulary import compare
from tests.vocabulary.conftest import CORPUS, small_base, texts

CORPORA = {language: str(CORPUS / f"{language}.jsonl") for language in ("ja", "en")}


def test_the_figures_are_those_of_the_library(base: Path, grown: Path) -> None:
    from tokenizers import Tokenizer

    comparison = compare([str(base), str(grown)], CORPORA)
    assert [(each.tokenizer, each.corpus) for each in comparison.measured] == [
        (str(folder), language) for folder in (base, grown) for language in CORPORA
    ]
    for line in comparison.measured:
        backend = Tokenizer.from_file(f"{line.tokenizer}/tokenizer.json")
        ids = [backend.encode(text, add_special_tokens=False).ids for text in texts(line.corpus)]
        assert line.tokens == sum(map(len, ids))
        assert line.used == len({number for each in ids for number in each})
        assert line.round_trip_failures == 0
        assert line.characters_per_token == sum(map(len, texts(line.corpus))) / line.tokens
    assert comparison.shared == comparison.vocabulary_sizes[str(base)]
    assert comparison.odd[str(base)] > 0
    json.dumps(comparison.as_dict())


def test_what_does_not_come_back_is_counted(tmp_path: Path) -> None:
    from tests.support.tokenizers import write_config

    folder = small_base(tmp_path / "lower")
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}))
    write_config(folder)
    (line,) = compare([str(folder)], {"en": CORPORA["en"]}).measured
    assert line.round_trip_failures == line.documents


def test_a_picture(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    compare([str(base)], CORPORA).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CptError, match="cannot be written"):
        compare([str(base)], CORPORA).plot(tmp_path / "plot.nothing")


def test_what_cannot_be_compared(base: Path) -> None:
    with pytest.raises(CptError, match="named twice"):
        compare([str(base), str(base)], CORPORA)
    with pytest.raises(CptError, match="name a corpus"):
        compare([str(base)], {})


def test_the_commands(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from nemo_cpt.cli import app, vocabulary  # noqa: F401  registers its commands

    grown = tmp_path / "grown"
    arguments = ["tokenizer", "grow", str(base), CORPORA["ja"], "-o", str(grown), "--tokens", "50", "--min-count", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "fewer tokens" in done.stdout
    arguments = ["tokenizer", "compare", str(base), str(grown), "--corpus", f"ja={CORPORA['ja']}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert f"{grown}\tja\t" in done.stdout
    assert isinstance(CliRunner().invoke(app, [*arguments[:-1], "ja"]).exception, CptError)
