"""The sets that a run validated on, wherever the project lies now."""

from pathlib import Path
from typing import Any

import pytest

from nemo_cpt.checkpoint.provenance import Provenance, write_provenance
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.candidates import Candidate
from nemo_cpt.evaluation.loss_sets import LossSet, find_loss_sets, mask_warnings, training_record, validated_on
from nemo_cpt.inference.models import Found
from nemo_cpt.training.changes import content_of
from nemo_cpt.training.masks import masks_of


def write_set(prefix: Path, content: bytes) -> str:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".bin", ".idx"):
        prefix.with_name(prefix.name + ending).write_bytes(content + ending.encode())
    return str(prefix)


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """The record of a run in the project `was`, which has validated on ds/ja and ds/en."""
    sets = {name: write_set(tmp_path / "was/ds" / f"{name}_text_document", name.encode()) for name in ("ja", "en")}
    contents = {name: content_of(prefix) for name, prefix in sets.items()}
    return {"validated_on": {"sets": sets}, "settings": {"validation": {"sets": contents}}}


def test_of_a_project_that_was_moved_they_are_found_by_their_content(tmp_path: Path, run: dict[str, Any]) -> None:
    told: list[str] = []
    before = [f"{name}={prefix}" for name, prefix in run["validated_on"]["sets"].items()]
    assert validated_on(run, tmp_path / "was/results/run", told.append) == before
    now = (tmp_path / "was").rename(tmp_path / "now here")
    expected = [f"{name}={now}/ds/{name}_text_document" for name in ("ja", "en")]
    for model in (now / "results/run", now / "results/run/checkpoints/steps=4"):
        assert validated_on(run, model, told.append) == expected
    assert told == []
    write_set(now / "ds/en_text_document", b"other")
    assert validated_on(run, now / "results/run", told.append) == expected[:1]
    assert told == [f"the run validated on {run['validated_on']['sets']['en']}, which is not there any more"]


def test_conversations_of_a_run_are_found_where_its_record_says_so(tmp_path: Path) -> None:
    prefix = write_set(tmp_path / "chats_conversations", b"chats")
    run = {"settings": {"validation": {"sets": {"chats": content_of(prefix)}}}, "validated_on": {"sets": {}}}
    told: list[str] = []
    assert validated_on(run, tmp_path, told.append) == []
    assert told == ["the run validated on conversations (chats): --loss chats=PREFIX measures the answers"]
    run["validated_on"] = {"sets": {}, "conversations": {"chats": prefix}}
    assert validated_on(run, tmp_path, told.append) == [f"chats={prefix}"]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("texts", "texts is a folder: name one file of it, or the Megatron prefix of a dataset"),
        ("ja.txt", r"there is no file .*ja\.txt; near: .*jaa\.txt"),
        ("ja.CSV", r"there is no file .*ja\.CSV"),
        ("hf:a/b", "hf:a/b is a dataset of the hub: name a file of it"),
        ("ja", r"There is no .*ja_text_document\.idx"),
    ],
)
def test_what_is_no_prefix_is_told_from_one(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "jaa.txt").write_text("some")
    with pytest.raises(CptError, match=message):
        find_loss_sets([f"ja={path if path.startswith('hf:') else tmp_path / path}"], [], {}, None, print)


def test_masks_are_the_runs_also_of_its_export_and_those_of_others_are_named(tmp_path: Path) -> None:
    records = {
        "plain": {"settings": {"data": {"eod_mask_loss": False}}},
        "masked": {
            "settings": {"data": {"eod_mask_loss": True, "reset_attention_mask": True}},
            "validated_on": {"reset_attention_mask": True, "reset_position_ids": False},
        },
        # Where Transformer Engine computed the attention.
        "in_effect": {
            "settings": {"data": {"eod_mask_loss": True, "reset_attention_mask": True}},
            "validated_on": {"reset_attention_mask": False},
        },
    }
    for name, record in records.items():
        (tmp_path / name).mkdir()
        write_provenance(tmp_path / name, Provenance("a/b", trainings=[{}, record]))
    (tmp_path / "base").mkdir()
    found = {name: masks_of(training_record(tmp_path / name)) for name in [*records, "base"]}
    both = ("eod_mask_loss", "reset_attention_mask")
    assert found == {"plain": (), "masked": both, "in_effect": both[:1], "base": ()}
    models = [Candidate(name, str(tmp_path / name)) for name in ("base", "plain", "masked")]
    for each in models:
        each.__dict__["found"] = Found(tmp_path / each.label, each.label)
    texts = [LossSet("ja", "ja.jsonl"), LossSet("ja", "ds/ja", 64, 8, masks=found["masked"])]
    (said,) = mask_warnings(models, texts)
    assert said.startswith("plain was trained with no mask, and the losses of tokenized sets are ")
    assert "are measured with eod_mask_loss and reset_attention_mask, for all models" in said
    assert mask_warnings(models, texts[:1]) == []
