"""Runs that are told to stop, or killed: what they leave at their end equals what an unbroken run leaves."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.interruptions import Hit, Runs, Setting

STOPPED, KILLED = 75, -9


@pytest.fixture(scope="module")
def runs(world: Path, blend: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(world, blend, tmp_path_factory.mktemp("stops"))
    assert made.start("unbroken", Setting()) == 0, made.log("unbroken").read_text()[-3000:]
    return made


@pytest.mark.parametrize(
    ("name", "setting", "hits"),
    [
        ("sanity", Setting(), [Hit("on_validation_batch_end", 0, "SIGHUP")]),
        ("first_step", Setting(workers=2), [Hit("on_train_batch_start", 0)]),
        ("before_the_first_checkpoint", Setting(workers=2), [Hit("on_train_batch_start", 1)]),
        ("behind_a_checkpoint", Setting(), [Hit("on_train_batch_start", 4)]),
        ("behind_a_checkpoint_with_workers", Setting(workers=2), [Hit("on_train_batch_start", 4, "SIGUSR1")]),
        ("checkpoint_in_flight", Setting(workers=2, asynchronous=True), [Hit("on_train_batch_start", 3, "SIGINT")]),
        ("within_a_write", Setting(), [Hit("weights", 3, call=5)]),
        ("at_a_validated_step", Setting(), [Hit("on_train_batch_end", 6, everyone=False)]),
        ("within_a_validation", Setting(workers=2), [Hit("on_validation_batch_end", 6)]),
        ("within_the_last_validation", Setting(asynchronous=True), [Hit("on_validation_batch_end", 8)]),
        (
            "again_and_again",
            Setting(),
            [Hit("on_train_batch_start", 1), Hit("on_train_batch_end", 4, "SIGINT"), Hit("on_validation_end", 6)],
        ),
    ],
)  # fmt: skip
def test_a_stop_saves_and_loses_nothing(runs: Runs, name: str, setting: Setting, hits: list[Hit]) -> None:
    codes = runs.broken(name, setting, hits)
    assert codes == [STOPPED] * len(hits) + [0], runs.log(name).read_text()[-3000:]
    assert runs.differences(name, "unbroken") == []
    untrained = "before a step was done: the same command starts again"
    assert (untrained in runs.log(name).read_text()) == (name in ("sanity", "first_step"))


@pytest.mark.parametrize(("ranks", "asynchronous"), [(None, False), ((1,), False), (None, True), ((1,), True)])
def test_a_stop_of_two_ranks_whichever_is_told(runs: Runs, ranks: tuple[int, ...] | None, asynchronous: bool) -> None:
    """With asynchronous saves a checkpoint is in flight on both."""
    setting = Setting(processes=2, asynchronous=asynchronous)
    if not (runs.folder / "unbroken_2").exists():
        assert runs.start("unbroken_2", Setting(processes=2)) == 0, runs.log("unbroken_2").read_text()[-3000:]
    name = f"two_{'all' if ranks is None else 'one'}_{asynchronous}"
    codes = runs.broken(name, setting, [Hit("on_train_batch_start", 3 if asynchronous else 4, ranks=ranks)])
    assert codes == [STOPPED, 0], runs.log(name).read_text()[-3000:]
    assert runs.differences(name, "unbroken_2") == []


@pytest.mark.parametrize(
    "hit",
    [
        Hit("marker", 3, "SIGKILL"),
        Hit("weights", 6, "SIGKILL", call=3),
        Hit("config", 6, "SIGKILL"),
        Hit("unmarking", 6, "SIGKILL"),
        Hit("link", 6, "SIGKILL"),
        Hit("on_train_batch_start", 7, "SIGKILL", everyone=False),
    ],
    ids=lambda hit: hit.where,
)
def test_a_kill_costs_steps_but_nothing_of_the_result(runs: Runs, hit: Hit) -> None:
    name = f"killed_{hit.where}"
    assert runs.broken(name, Setting(), [hit]) == [KILLED, 0], runs.log(name).read_text()[-3000:]
    assert runs.differences(name, "unbroken") == []


def test_kills_in_its_start_up_and_behind_a_checkpoint_and_in_the_start_up_of_the_resumption(runs: Runs) -> None:
    places = ("on_train_start", 0), ("on_train_batch_start", 4), ("on_train_start", 3)
    codes = runs.broken("killed_thrice", Setting(), [Hit(where, step, "SIGKILL") for where, step in places])
    assert codes == [KILLED] * 3 + [0], runs.log("killed_thrice").read_text()[-3000:]
    assert runs.differences("killed_thrice", "unbroken") == []


@pytest.mark.parametrize(
    ("unpatched", "hit"),
    [
        ("_save_validated_step", Hit("on_validation_batch_end", 6)),
        ("_load_validated_step", Hit("on_train_batch_start", 4, "SIGKILL")),
        ("_note_validated_step", Hit("on_train_batch_start", 4, "SIGKILL")),
        ("_validate_when_due", Hit("on_validation_batch_end", 6)),
        ("validate_the_end", Hit("on_validation_batch_end", 8)),
    ],
)
def test_without_any_of_the_patched_loops_a_run_is_another(runs: Runs, unpatched: str, hit: Hit) -> None:
    codes = runs.broken(unpatched, Setting(unpatched=unpatched), [hit])
    same_result = codes[-1] == 0 and not runs.differences(unpatched, "unbroken")
    validated = [line["step"] for line in runs.lines(unpatched) if "val_loss_ja" in line]
    assert not (same_result and validated == [0, 3, 6, 8])


@pytest.mark.parametrize("unpatched", ["", "_count_global_steps"])
def test_loggers_go_on_behind_the_step_of_the_checkpoint(runs: Runs, unpatched: str) -> None:
    """Of steps 6 and 8, which loggers count from 0; the checkpoint was written within the hooks of step 3."""
    name = f"logged{unpatched}"
    codes = runs.broken(name, Setting(unpatched=unpatched), [Hit("on_train_batch_start", 4, "SIGKILL")])
    assert codes == [KILLED, 0], runs.log(name).read_text()[-3000:]
    assert runs.logged(name) == ([4, 6] if unpatched else [5, 7])
