"""What a resumed run makes of settings that are not those it was started with, and of a base that is gone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.interruptions import STEPS, Hit, Runs, Setting

MORE = STEPS + 4


@pytest.fixture(scope="module")
def runs(world: Path, blend: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With a finished run "whole" of STEPS steps."""
    made = Runs(world, blend, tmp_path_factory.mktemp("schedules"))
    assert made.start("whole", Setting()) == 0, made.log("whole").read_text()[-3000:]
    return made


def goes_on(runs: Runs, name: str, **changes: Any) -> int:
    """Start a copy of the finished run with other settings."""
    shutil.copytree(runs.folder / "whole", runs.folder / name, symlinks=True)
    return runs.start(name, Setting(), **changes)


def rates(runs: Runs, name: str, **changes: Any) -> list[float]:
    """Learning rates by step; of an unbroken run of its own unless it is there."""
    if not (runs.folder / name).exists():
        assert runs.start(name, Setting(), **changes) == 0, runs.log(name).read_text()[-3000:]
    return [lr for _, _, lr in runs.left(name)["steps"]]


@pytest.mark.parametrize(
    "changes", [{"max_steps": MORE}, {"max_steps": MORE, "lr": 5e-4}, {"max_steps": MORE, "min_lr": 1e-5}]
)
def test_another_schedule_is_refused_unless_one_says_what_becomes_of_it(runs: Runs, changes: dict[str, Any]) -> None:
    name = "-".join(changes)
    assert goes_on(runs, name, **changes) == 2
    said = runs.log(name).read_text()
    assert "this run was started otherwise than it is resumed at step 8" in said
    assert all(field in said for field in changes)
    assert "extend=rewarm" in said
    assert runs.differences(name, "whole") == []


def test_master_weights_of_another_form_are_refused(runs: Runs) -> None:
    """Megatron would read the low halves of fp32 numbers, which bf16 states keep of them, as the numbers."""
    shutil.copytree(runs.folder / "whole", runs.folder / "halves", symlinks=True)
    for path in {each.resolve() for each in (runs.folder / "halves/checkpoints").glob("*/run.json")}:
        record = json.loads(path.read_text())
        assert record["settings"]["states"]["use_precision_aware_optimizer"] is False
        record["settings"]["states"]["use_precision_aware_optimizer"] = True
        path.write_text(json.dumps(record))
    assert runs.start("halves", Setting(), max_steps=MORE, extend="keep") == 2
    said = runs.log("halves").read_text()
    assert "use_precision_aware_optimizer True -> False (as state_precision=bf16 does" in said


def test_keep_trains_on_at_the_end_of_the_old_schedule(runs: Runs) -> None:
    assert goes_on(runs, "keep", max_steps=MORE, extend="keep") == 0, runs.log("keep").read_text()[-3000:]
    lrs = rates(runs, "keep")
    assert lrs[:STEPS] == rates(runs, "whole")
    assert lrs[STEPS:] == pytest.approx([1e-4] * 4)


def test_stretch_is_the_new_schedule_from_the_start(runs: Runs) -> None:
    assert goes_on(runs, "stretch", max_steps=MORE, extend="stretch") == 0, runs.log("stretch").read_text()[-3000:]
    assert rates(runs, "stretch")[STEPS:] == pytest.approx(rates(runs, "unbroken", max_steps=MORE)[STEPS:])


def test_rewarm_is_a_schedule_of_its_own_over_the_steps_that_are_left(runs: Runs) -> None:
    changes = {"lr": 5e-4, "warmup_steps": 2}
    assert goes_on(runs, "rewarm", max_steps=MORE, extend="rewarm", **changes) == 0, runs.log("rewarm").read_text()[
        -3000:
    ]
    assert rates(runs, "rewarm")[STEPS:] == pytest.approx(rates(runs, "short", max_steps=4, **changes))


def test_a_run_of_adapters_takes_another_schedule_too(runs: Runs) -> None:
    setting, short = Setting(adapters=True), {"lr": 5e-4, "warmup_steps": 2}
    assert runs.start("lora", setting) == 0, runs.log("lora").read_text()[-3000:]
    for name, changes in (("lora_stretch", {"extend": "stretch"}), ("lora_rewarm", {"extend": "rewarm", **short})):
        shutil.copytree(runs.folder / "lora", runs.folder / name, symlinks=True)
        code = runs.start(name, setting, max_steps=MORE, **changes)
        assert code == 0, runs.log(name).read_text()[-3000:]
    assert rates(runs, "lora_stretch")[STEPS:] == pytest.approx(rates(runs, "unbroken", max_steps=MORE)[STEPS:])
    assert rates(runs, "lora_rewarm")[STEPS:] == pytest.approx(rates(runs, "short", max_steps=4, **short))


def test_a_run_goes_on_without_the_base_that_it_began_with(world: Path, blend: Any, tmp_path: Path) -> None:
    shutil.copytree(world / "base", tmp_path / "base")
    runs = Runs(tmp_path, blend, tmp_path / "runs")
    assert runs.start("orphan", Setting(), Hit("on_train_batch_end", 4)) != 0
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert runs.start("orphan", Setting()) == 0, runs.log("orphan").read_text()[-3000:]
    assert [step for step, _, _ in runs.left("orphan")["steps"]] == list(range(1, STEPS + 1))
