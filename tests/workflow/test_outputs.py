"""What lies behind a path that a step names, and what belongs to it."""

import json
import os
from pathlib import Path

import pytest

from nemo_cpt.made import RECORD
from nemo_cpt.workflow import outputs

LARGE = 3 << 20


@pytest.mark.parametrize(
    ("read", "made", "is_so"),
    [
        ("text/ja/train.jsonl", "text/ja", True),
        ("text/ja", "text/ja/", True),
        ("./text/ja", "text/ja", True),
        ("data", "data/wiki", True),
        ("data/wiki/train_*.jsonl.gz", "data/wiki", True),
        ("ds/ja", "ds/ja_text_document", True),
        ("ds/ja_text_document", "ds/ja_text_document", True),
        ("sft/ja", "sft/ja_conversations", True),
        ("ds/ja", "ds/ja_validation_text_document", False),
        ("text/ja2", "text/ja", False),
        ("text", "texts", False),
        ("*.jsonl", "text/ja", False),
        ("hf:wikimedia/wikipedia", "hf", False),
    ],
)
def test_what_is_read_belongs_to_what_is_made(read: str, made: str, is_so: bool) -> None:
    assert outputs.related(read, made) is is_so


def test_places_are_compared_however_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "link").symlink_to("made")
    for read in (f"{tmp_path}/made/train.jsonl", "link/train.jsonl", "x/../made"):
        assert outputs.related(read, "made", tmp_path), read
    assert not outputs.related(".", "made", tmp_path)


def dataset(folder: Path) -> Path:
    for ending in (".bin", ".idx", ".json", ".skipped.jsonl"):
        (folder / f"ja_text_document{ending}").write_text(ending)
    (folder / "ja_validation_text_document.bin").write_text("another")
    return folder / "ja_text_document"


def names(path: Path) -> list[str]:
    return [file.name for file in outputs.files_of(path)]


def test_a_dataset_is_its_tokens_by_either_prefix_whatever_a_training_left(tmp_path: Path) -> None:
    prefix = dataset(tmp_path)
    before = outputs.look(prefix)
    assert names(tmp_path / "ja") == names(prefix) == ["ja_text_document.bin", "ja_text_document.idx"]
    (prefix / "cache").mkdir(parents=True)  # as Megatron does
    (prefix / "cache/index.npy").touch()
    (tmp_path / "ja_text_document.json").write_text("made at another time")
    assert outputs.changed(before, outputs.look(prefix, before)) == ""
    outputs.remove(prefix, outputs.look(prefix))
    assert [path.name for path in tmp_path.iterdir()] == ["ja_validation_text_document.bin"]


def test_a_dataset_of_another_field_is_known_by_its_short_prefix(tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        (tmp_path / f"ja_body_document{ending}").touch()
    (tmp_path / "ja_body_document.json").write_text(json.dumps({"options": {"json_key": "body"}}))
    assert names(tmp_path / "ja") == ["ja_body_document.bin", "ja_body_document.idx"]


def test_a_run_is_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/steps.jsonl").touch()
    assert outputs.files_of(tmp_path) == []


def test_a_file_that_was_touched_is_read_again_and_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(LARGE))
    first = outputs.look(file)
    assert outputs.look(file, {"a": {**first["a"], "hash": "believed"}})["a"]["hash"] == "believed"
    os.utime(file, (1, 1))  # by hand: two writes may come within one tick of the file system's clock
    assert outputs.changed(first, outputs.look(file, first)) == ""
    with file.open("r+b") as opened:  # in its middle, at the same size
        opened.seek(LARGE // 2)
        opened.write(b"x")
    os.utime(file, (2, 2))
    assert outputs.changed(first, outputs.look(file, first)) == "a"


def test_a_neighbour_of_a_like_name_stays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").touch()
    assert not outputs.is_there(tmp_path / "a.jsonl")
    outputs.remove(tmp_path / "a.jsonl", {})
    assert (tmp_path / "a.jsonl.gz").exists()


def test_what_is_set_aside_has_a_name_of_its_own(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/which").write_text(json.dumps(number))
        assert outputs.set_aside(tmp_path / "run") == tmp_path / f"run.{number}"
    assert [(tmp_path / f"run.{number}/which").read_text() for number in (1, 2)] == ["1", "2"]


def test_the_record_of_what_a_folder_was_made_of_is_none_of_its_files_and_goes_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", RECORD):
        (folder / name).write_text("{}")
    made = outputs.look(folder)
    assert list(made) == ["model/config.json"]
    outputs.remove(folder, made)
    assert not outputs.is_there(folder)
