"""Data made before a tokenizer grew are valid for the grown model, and not the other way round."""

import json
import shutil
from pathlib import Path

import pytest

from nemo_cpt.checkpoint import grow_model, import_hf
from nemo_cpt.compatibility import check_data, check_tokenizer, read_base
from nemo_cpt.corpus import prepare
from nemo_cpt.errors import CptError
from nemo_cpt.vocabulary import grow
from nemo_cpt.vocabulary.byte_level import FIRST_ROW, RECORD
from tests.checkpoint.test_growing import make
from tests.vocabulary.conftest import CORPUS, small_base

JA = str(CORPUS / "ja.jsonl")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the NeMo bases `old` and `new`, which grew from it, and a dataset of each one's tokenizer."""
    folder = tmp_path_factory.mktemp("work")
    tokenizer = small_base(folder / "tokenizer")
    import_hf(make("llama31", folder / "hf", tokenizer), folder / "old")
    grow(str(tokenizer), JA, folder / "grown", tokens=100, min_count=2)
    grow_model(folder / "old", folder / "new", folder / "grown")
    for name, made_with in (("old", "tokenizer"), ("new", "grown")):
        prepare(JA, folder / "ds" / name, folder / made_with, workers=1, quiet=True)
    return folder


def test_each_base_takes_its_own(work: Path) -> None:
    for name in ("old", "new"):
        assert check_data(read_base(work / name), [str(work / "ds" / name)]) == []


def test_older_data_are_valid_for_the_grown_model_and_said_to_be_wasteful(work: Path) -> None:
    (warning,) = check_data(read_base(work / "new"), [str(work / "ds" / "old")])
    assert "more tokens than they need" in warning


def test_data_of_every_tokenizer_before_are_valid_for_one_that_grew_twice(work: Path, tmp_path: Path) -> None:
    english = str(CORPUS / "en.jsonl")
    (tmp_path / "ru.jsonl").write_text(json.dumps({"text": "привет мир, " * 40}) + "\n")
    grow(str(work / "grown"), str(tmp_path / "ru.jsonl"), tmp_path / "twice", tokens=3, multiple_of=1, min_count=2)
    grow_model(work / "old", tmp_path / "new", tmp_path / "twice")
    # Where grown_rows_first begins: all of it is new to this model.
    assert json.loads((tmp_path / "new" / "hf" / RECORD).read_text())[FIRST_ROW] == read_base(work / "old").rows
    for name in ("old", "new"):
        (warning,) = check_data(read_base(tmp_path / "new"), [str(work / "ds" / name)])
        assert "more tokens than they need" in warning
    prepare(english, tmp_path / "ds", tmp_path / "twice", workers=1, quiet=True)
    assert check_data(read_base(tmp_path / "new"), [str(tmp_path / "ds")]) == []
    with pytest.raises(CptError, match="which is not the base's"):
        check_data(read_base(work / "new"), [str(tmp_path / "ds")])


def test_newer_data_are_refused_by_the_older_model(work: Path) -> None:
    with pytest.raises(CptError, match=r"which is not the base's \(.* tokens against"):
        check_data(read_base(work / "old"), [str(work / "ds" / "new")])
    with pytest.raises(CptError, match="is not that of the base"):
        check_tokenizer(read_base(work / "old"), str(work / "grown"))


def test_data_of_a_third_tokenizer_are_refused_by_both(work: Path, tmp_path: Path) -> None:
    """Of the size of the older one, so that only its ids tell."""
    other = tmp_path / "other"
    shutil.copytree(work / "tokenizer", other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    content["model"]["ignore_merges"] = False
    (other / "tokenizer.json").write_text(json.dumps(content))
    prepare(JA, tmp_path / "ds", other, workers=1, quiet=True)
    for base in ("old", "new"):
        with pytest.raises(CptError, match="which is not the base's"):
            check_data(read_base(work / base), [str(tmp_path / "ds")])
