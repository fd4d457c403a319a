"""A real run that forgets: it says so, stops at its limit, is not started beyond it again, and goes on without it."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle
import nemo_run as run
import pytest

from nemo_cpt import planning
from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.bits_per_byte import sequences_loss
from nemo_cpt.evaluation.loss_sets import training_record
from nemo_cpt.inference.transformers_engine import TransformersEngine
from nemo_cpt.monitoring import description
from nemo_cpt.monitoring.forgetting import changes
from nemo_cpt.recipes import llama31_8b, tiny
from nemo_cpt.training.masks import masks_of
from nemo_cpt.training.metrics import END_FILE, RUN_FILE, WARNINGS_FILE, read_file, read_lines, read_metrics
from nemo_cpt.training.run_folder import newest_whole
from nemo_cpt.watching.record import Record
from nemo_cpt.watching.report import write_report
from tests.training import jobs

STEPS, BATCHES, BATCH, LENGTH = 12, 2, 8, 64


def train(world: Path, stop_when: dict[str, str] | None) -> None:
    blend = Blend(
        train={str(world / "ds/ja_train"): 1.0},
        validation={language: str(world / f"ds/{language}_validation") for language in ("ja", "en")},
    )
    recipe = tiny.continual_pretrain(
        str(world / "base"), blend, name="forgets", directory=str(world / "runs"), seq_length=LENGTH,
        global_batch_size=BATCH, max_steps=STEPS, val_check_interval=1, lr=1e-2, stop_when=stop_when,
    )  # fmt: skip
    recipe.trainer.limit_val_batches = BATCHES
    recipe.data.eod_mask_loss = recipe.data.reset_attention_mask = True
    run.run(recipe, direct=True)


def start(world: Path, stop_when: dict[str, str] | None) -> tuple[int, str]:
    log = world / "forgets.log"
    log.unlink(missing_ok=True)
    code = jobs.run(functools.partial(train, world, stop_when), log=log)
    return code, log.read_text()


@pytest.fixture(scope="module")
def stopped(world: Path) -> tuple[Path, str, dict[str, Any]]:
    """The run's folder, the log of the start that stopped at its limit, and `end.json` behind it."""
    code, log = start(world, {"en": "+1%"})
    assert code == 75, log[-3000:]
    return world / "runs/forgets", log, read_file(world / "runs/forgets", END_FILE)


def test_it_warns_and_stops_with_a_checkpoint_of_the_step(stopped: tuple[Path, str, dict[str, Any]]) -> None:
    folder, log, end = stopped
    newest = newest_whole(folder / "checkpoints")
    assert newest is not None
    assert 0 < newest.step < STEPS
    assert (end["state"], end["step"]) == ("stopped", newest.step)
    assert f"stopped by stop_when, saved at step {newest.step}: en is +" in log
    warnings = read_lines(folder, WARNINGS_FILE)
    assert warnings[0]["text"].startswith("en has got worse: ")
    assert "bits per byte" in warnings[0]["text"]
    assert warnings[0]["text"].endswith("this run trains on ja_train 100 %")
    assert f"nemo_cpt: warning: {warnings[0]['text']}" in log
    assert changes(read_metrics(folder))["en"].percent >= 1


def test_what_the_run_is_stands_beside_its_metrics(world: Path, stopped: tuple[Path, str, dict[str, Any]]) -> None:
    about = read_file(stopped[0], RUN_FILE)
    assert (about["max_steps"], about["tokens_per_step"], about["resumed"]) == (STEPS, BATCH * LENGTH, False)
    (ja,) = about["training"]
    assert ja["epochs"] == pytest.approx(STEPS * BATCH * LENGTH / ja["tokens"])
    assert about["plan"] == {"unknown": "the planner is for GPUs"}
    assert about["configuration"]["optim"]["config"]["lr"] == 1e-2
    data, trainer = about["configuration"]["data"], about["configuration"]["trainer"]
    assert (data["global_batch_size"], data["seq_length"], data["seed"]) == (BATCH, LENGTH, 1234)
    assert trainer["_target_"].endswith("Trainer")
    assert [each for each in trainer["callbacks"] if each["_target_"].endswith(".ForgettingAlarm")]
    assert "0x" not in json.dumps(about["configuration"])
    engine = TransformersEngine(world / "base_hf", device="cpu")
    masks = dict.fromkeys(masks_of(training_record(stopped[0])), True)
    assert masks == {"eod_mask_loss": True, "reset_attention_mask": True}
    for name in ("ja", "en"):
        prefix, samples = world / f"ds/{name}_validation", BATCHES * BATCH
        read = sequences_loss(engine, prefix, seq_length=LENGTH, samples=samples, **masks)
        assert about["validation"][name]["bytes_per_token"] == pytest.approx(sum(read.bytes) / sum(read.tokens))
        lines = read_metrics(stopped[0])
        assert lines[0][f"val_loss_{name}"] == pytest.approx(read.loss, abs=1e-3)
        assert sum(lines[0][f"val_batches_{name}"]) / BATCHES == pytest.approx(lines[0][f"val_loss_{name}"])


def test_it_is_not_started_beyond_its_limit_again_and_goes_on_without_it(
    world: Path, stopped: tuple[Path, str, dict[str, Any]]
) -> None:
    """So a scheduler that lets stopped jobs come back does not train on, a validation at a time."""
    folder = stopped[0]
    before = (folder / "metrics/steps.jsonl").read_text()
    code, log = start(world, {"en": "+1%"})
    assert code == 2
    assert "which was reached at an earlier start: to train on, raise the limit or leave it away" in log
    assert "reduced_train_loss" not in (folder / "metrics/steps.jsonl").read_text().removeprefix(before)
    code, log = start(world, None)
    assert code == 0, log[-3000:]
    assert read_file(folder, END_FILE)["state"] == "finished"
    page, *_ = write_report([Record(folder)], world / "report")
    assert json.loads(page.with_name("report.json").read_text())["runs"][0]["summary"]["state"] == "finished"


def recipe_for_a_gpu(world: Path, blend: Any) -> run.Partial:
    return llama31_8b.continual_pretrain(
        str(world / "base"), blend, model=tiny.model(128), name="on_gpu", directory=str(world / "runs"), seq_length=128,
        global_batch_size=8, micro_batch_size=4, max_steps=3, val_check_interval=3, lr=1e-3, **llama31_8b.ONE_GPU,
    )  # fmt: skip


def test_the_plan_of_a_job_is_that_of_its_recipe(world: Path, blend: Any) -> None:
    """By the data module that was built of it, from which a job reads its batches."""
    recipe = recipe_for_a_gpu(world, blend)
    parts = {name: getattr(recipe, name) for name in ("model", "trainer", "optim")}
    built = SimpleNamespace(**parts, data=description._as_made(fiddle.build(recipe.data)), peft=None)
    assert planning.read(built) == planning.read(recipe)
    assert planning.read(built).global_batch_size == 8


def train_on_a_gpu(world: Path, blend: Any) -> None:
    run.run(recipe_for_a_gpu(world, blend), direct=True)


@pytest.mark.gpu
def test_on_a_gpu_the_plan_stands_beside_what_came(world: Path, blend: Any) -> None:
    log = world / "on_gpu.log"
    assert jobs.run(functools.partial(train_on_a_gpu, world, blend), log=log) == 0, log.read_text()[-3000:]
    found = Record(world / "runs/on_gpu")
    assert found.plan["tokens_per_second"] > 0, found.description["plan"]
    assert not found.plan["lower_bound"]
    assert found.last("gpu_memory_gib") == pytest.approx(found.plan["reserved_gib"], abs=2)
    assert found.tokens_per_second


def test_limits_are_refused_where_they_are_written(world: Path, blend: Any) -> None:
    for wrong, says in ({"en": "three"}, "such as"), ({"de": "+3%"}, "stop_when names de, and the run validates on"):
        with pytest.raises(CptError, match=says):
            tiny.continual_pretrain(str(world / "base"), blend, stop_when=wrong)
