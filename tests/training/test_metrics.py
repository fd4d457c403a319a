"""The file of a run's metrics, read after whatever happened to it."""

import json
import os
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemo_cpt.monitoring.forgetting import changes
from nemo_cpt.training.metrics import (
    METRICS_FILE,
    RESUMED_FROM,
    VALIDATED_OTHERWISE,
    MetricsReader,
    append_metrics,
    read_metrics,
)


def steps(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder)]


def write(folder: Path, *lines: dict) -> None:
    for line in lines:
        append_metrics(folder, line)


def test_no_file(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_steps_training_and_validation_are_one(tmp_path: Path) -> None:
    write(tmp_path, {"step": 0, "val_loss_ja": 9.0}, {"step": 1, "loss": 5.0}, {"step": 1, "val_loss_ja": 4.0})
    assert read_metrics(tmp_path) == [{"step": 0, "val_loss_ja": 9.0}, {"step": 1, "loss": 5.0, "val_loss_ja": 4.0}]


def test_steps_that_were_done_again_count_as_they_were_done_last(tmp_path: Path) -> None:
    write(tmp_path, {RESUMED_FROM: 0}, *({"step": step, "loss": 1.0} for step in (1, 2, 3, 4)))
    write(tmp_path, {RESUMED_FROM: 2}, {"step": 3, "loss": 2.0})
    assert steps(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0)]  # step 4 is not done again yet: it is not there


def test_losses_of_other_samples_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path, {"step": 0, "val_loss_ja": 9.0, "val_loss_en": 3.0, "val_batches_en": [2.0, 4.0]})
    write(tmp_path, {RESUMED_FROM: 3, VALIDATED_OTHERWISE: ["en"]}, {"step": 6, "val_loss_ja": 8.0, "val_loss_en": 4.0})
    assert read_metrics(tmp_path) == [
        {"step": 0, "val_loss_ja": 9.0},
        {"step": 6, "val_loss_ja": 8.0, "val_loss_en": 4},
    ]
    assert list(changes(read_metrics(tmp_path))) == ["ja"]


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0})
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    write(tmp_path, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 2.0})
    assert steps(tmp_path) == [(1, 1.0), (2, 2.0), (3, 2.0)]
    assert len(path.read_bytes().splitlines()) == 4


def test_text_that_is_no_unicode_or_would_break_lines_comes_back(tmp_path: Path) -> None:
    line = {"step": 1, "reply": "東京\u2028\x85\n", "base": os.fsdecode(b"/runs/\xff")}
    write(tmp_path, line)
    assert read_metrics(tmp_path) == [line]
    assert "東京" in (tmp_path / METRICS_FILE).read_text("utf-8")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 200), st.binary(max_size=20))
@example(0, b"{}")
def test_whatever_was_cut_or_written_between_whole_lines_are_read(tmp_path: Path, cut: int, junk: bytes) -> None:
    path = tmp_path / METRICS_FILE
    path.unlink(missing_ok=True)
    write(tmp_path, *({"step": step, "loss": 1.0} for step in range(5)))
    kept = path.read_bytes()[:cut]
    path.write_bytes(kept + junk)
    write(tmp_path, {"step": 9, "loss": 3.0})
    whole = [line for line in kept.split(b"\n")[:-1]]
    expected = {json.loads(line)["step"] for line in whole} | {9}
    assert expected <= {step for step, _ in ((line.get("step"), 0) for line in read_metrics(tmp_path))}


def test_a_reader_goes_on_where_it_stopped(tmp_path: Path) -> None:
    reader = MetricsReader(tmp_path)
    assert reader.read() == []
    write(tmp_path, {"step": 1, "loss": 1.0})
    assert reader.read() == read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    path = tmp_path / METRICS_FILE
    whole = path.read_bytes() + b'{"step": 2, "loss": 2.0}\n'
    for cut in (-20, -1, None):  # within a line, before its end, and behind it
        path.write_bytes(whole[:cut])
        assert reader.read() == read_metrics(tmp_path)
    write(tmp_path, {RESUMED_FROM: 1})
    assert reader.read() == read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
