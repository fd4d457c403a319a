"""What counts as another setting when a run is started again."""

from pathlib import Path

from nemo_cpt.training.changes import changes, content_of, sets_of
from nemo_cpt.training.settings import default_min_lr


def test_a_number_is_the_same_however_it_was_reckoned() -> None:
    was = {
        "schedule": {"lr": 3e-4, "min_lr": default_min_lr(3e-4)},
        "data": {"train": [[0.1 + 0.2, "ja"], [0.7, "en"]]},
    }
    now = {"schedule": {"lr": 3e-4, "min_lr": 3e-5}, "data": {"train": [[0.3, "ja"], [0.7, "en"]]}}
    assert was != now
    assert changes(was, now) == []


def test_another_number_set_or_order_is_told() -> None:
    was = {"schedule": {"lr": 3e-4}, "data": {"train": [[0.3, "ja"], [0.7, "en"]], "seed": None}}
    now = {"schedule": {"lr": 3.001e-4}, "data": {"train": [[0.7, "en"], [0.3, "ja"]], "seed": 1}}
    assert [each.name for each in changes(was, now)] == ["lr", "train", "seed"]
    assert [each.name for each in changes(was, {"data": {"train": [[0.3, "ja"]]}})] == ["train"]


def test_a_dataset_that_was_renamed_or_moved_is_no_other(tmp_path: Path) -> None:
    def written(name: str, tokens: bytes) -> str:
        for suffix, content in ((".idx", b"index"), (".bin", tokens)):
            (tmp_path / name).with_suffix(suffix).write_bytes(content)
        return str(tmp_path / name)

    ja, renamed, other = written("ja_text_document", b"1"), written("news_body_document", b"1"), written("ja", b"2")
    was = {"data": {"train": sets_of({ja: 0.3})}, "validation": {"sets": {"ja": content_of(ja)}}}
    assert changes(was, {"data": {"train": sets_of({renamed: 0.3})}}) == []
    assert changes(was, {"validation": {"sets": {"ja": content_of(renamed)}}}) == []
    for now in (sets_of({other: 0.3}), sets_of({renamed: 0.4})):
        assert [each.name for each in changes(was, {"data": {"train": now}})] == ["train"]
