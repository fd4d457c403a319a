"""Which conversations a training sees, how often and in which order."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_cpt.conversations import Conversations, TrainingSequences, prepare
from nemo_cpt.corpus import prepare as prepare_texts
from nemo_cpt.errors import CptError
from tests.conversations.helpers import pairs, write_lines

LENGTH = 200


@pytest.fixture(scope="module")
def sets(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` and `b` with 40 and 15 conversations, `held_out` with 9."""
    folder = tmp_path_factory.mktemp("sets")
    for name, count, start in (("a", 40, 0), ("b", 15, 100), ("held_out", 9, 200)):
        lines = write_lines(folder / f"{name}.jsonl", pairs(count, start))
        prepare(lines, folder / name, small, template="alpaca-ja", workers=1, quiet=True)
    return folder


def sequences(sets: Path, weights: dict[str, float], seed: int = 1) -> TrainingSequences:
    return TrainingSequences(Conversations({str(sets / name): w for name, w in weights.items()}), LENGTH, seed)


def epoch(order: TrainingSequences, number: int) -> list[list[int]]:
    return [order.members(index).tolist() for index in range(order.count(number), order.count(number + 1))]


def test_an_epoch_has_each_conversation_as_often_as_its_weight_says(sets: Path) -> None:
    order = sequences(sets, {"a": 1.0, "b": 2.0})
    for number in range(3):
        seen = Counter(member for members in epoch(order, number) for member in members)
        assert seen == Counter(range(40)) + Counter([*range(40, 55)] * 2)


def test_a_part_of_a_set_goes_round(sets: Path) -> None:
    order = sequences(sets, {"a": 0.25, "b": 1.5})
    epochs = [Counter(member for members in epoch(order, number) for member in members) for number in range(4)]
    assert [sum(1 for member in each if member < 40) for each in epochs] == [10] * 4
    assert sum(epochs, Counter()) == Counter(range(40)) + Counter([*range(40, 55)] * 6)


def test_every_epoch_is_packed_anew_and_every_process_the_same(sets: Path) -> None:
    order, again = sequences(sets, {"a": 1.0}), sequences(sets, {"a": 1.0})
    assert epoch(order, 0) != epoch(order, 1)
    backwards = [again.members(index).tolist() for index in reversed(range(order.count(2)))]
    assert backwards[::-1] == epoch(order, 0) + epoch(order, 1)
    assert epoch(sequences(sets, {"a": 1.0}, seed=2), 0) != epoch(order, 0)


def test_a_sequence_holds_whole_conversations(sets: Path) -> None:
    order = sequences(sets, {"a": 1.0, "b": 1.0})
    for index in range(order.count(1)):
        laid, members = order[index], order.members(index)
        starts = laid["cu_seqlens"]
        for place, member in enumerate(members):
            tokens, mask = order.chats.read(int(member))
            stretch = slice(starts[place], starts[place + 1])
            assert laid["tokens"][stretch].tolist() == tokens[:-1].tolist()
            assert laid["labels"][stretch].tolist() == tokens[1:].tolist()
            assert laid["loss_mask"][stretch].tolist() == mask[1:].tolist()
            assert laid["position_ids"][stretch].tolist() == list(range(len(tokens) - 1))
        assert not laid["loss_mask"][starts[len(members)] :].any()


def test_steps_go_through_the_epochs_and_no_further(sets: Path) -> None:
    data = Conversations({str(sets / "a"): 1.0})
    once = sequences(sets, {"a": 1.0}).count(1)
    assert data.steps(1, 1, LENGTH) == once
    assert data.steps(3, 4, LENGTH) == -(-3 * once // 4)
    assert data.steps(0.5, 1, LENGTH) == -(-once // 2)
    assert data.steps(1, 10**6, LENGTH) == 1
    with_replay = data.steps(3, 4, LENGTH, replay_share=0.25)
    assert 3 * once <= with_replay * 4 * 0.75 < 3 * once + 4


def test_the_report_counts_epochs_and_what_is_left_out(sets: Path) -> None:
    data = Conversations({str(sets / "a"): 1.0, str(sets / "b"): 2.0}, {"ja": str(sets / "held_out")})
    report = data.report(4, LENGTH, data.steps(2, 4, LENGTH))
    assert [each["epochs"] for each in report.sets] == [pytest.approx(2, abs=0.4), pytest.approx(4, abs=0.8)]
    assert sum(each["share"] for each in report.sets) == pytest.approx(1)
    assert report.warnings == []
    often = Conversations({str(sets / "a"): 1.0, str(sets / "b"): 6.0}, data.validation)
    (warning,) = often.report(4, LENGTH, often.steps(2, 4, LENGTH)).warnings
    assert f"{sets / 'b'}_conversations is gone through 1" in warning
    middle = int(np.median(sequences(sets, {"a": 1.0}).fit.positions))
    short = Conversations({str(sets / "a"): 1.0}).report(4, middle, 1000)
    assert [word in " ".join(short.warnings) for word in ("left out", "by heart", "no validation")] == [True] * 3


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ("{sft/ja: 1.0}", {}, r"train is a dictionary written as a string.*Conversations\(train="),
        ({}, {}, "nothing to train on"),
        ({"a": 0}, {}, "weight of .* must be a positive number"),
        ({"a": 1.0, "a_conversations": 1.0}, {}, "names one dataset twice"),
        ({"a": 1.0}, {"ja": "a"}, "also trained on"),
        ({"a": 1.0, "copy": 1.0}, {}, "trains on one dataset twice"),
        ({"a": 1.0, "other_template": 1.0}, {}, "different templates.*alpaca-ja.*alpaca-en"),
        ({"text": 1.0}, {}, r"no set of conversations .*text_text_document is a dataset of texts"),
        ({"nowhere": 1.0}, {}, "no set of conversations .*nowhere_conversations. Make it"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    sets: Path, small: Path, train: Any, validation: dict[str, str], message: str
) -> None:
    if not (sets / "copy_conversations.idx").exists():
        for end in ("bin", "idx", "mask", "json"):
            (sets / f"copy_conversations.{end}").write_bytes((sets / f"a_conversations.{end}").read_bytes())
        lines = write_lines(sets / "other.jsonl", pairs(3, 300))
        prepare(lines, sets / "other_template", small, template="alpaca-en", workers=1, quiet=True)
        (sets / "text.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
        prepare_texts(sets / "text.jsonl", sets / "text", small, workers=1, quiet=True)
    full = {str(sets / name): weight for name, weight in train.items()} if isinstance(train, dict) else train
    with pytest.raises(CptError, match=message):
        Conversations(full, {name: str(sets / prefix) for name, prefix in validation.items()}).check()


def test_a_length_that_nothing_fits_is_refused(sets: Path) -> None:
    with pytest.raises(CptError, match=r"None of the 40 conversations .* fits into a sequence of 5 positions"):
        TrainingSequences(Conversations({str(sets / "a"): 1.0}), 5)
