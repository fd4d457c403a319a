"""What counts as another setting when a run is started again."""

from nemo_cpt.training.changes import changes
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
