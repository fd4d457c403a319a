"""Whole runs on the CPU through llm.pretrain: parallel layouts, resumption, kills."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from safetensors.torch import load_file

from nemo_cpt.checkpoint import export_hf
from nemo_cpt.checkpoint.folders import TEMPLATES
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.bits_per_byte import sequences_loss
from nemo_cpt.inference.transformers_engine import TransformersEngine
from nemo_cpt.recipes import llama31_8b, tiny
from nemo_cpt.training.callbacks import StopAtStep
from nemo_cpt.training.metrics import read_metrics
from nemo_cpt.training.recompute import RecomputeOutputs
from nemo_cpt.training.run_folder import newest_whole
from tests.training import jobs

STEPS = 6


def train(world: Path, blend: Any, name: str, stop_at: int | None = None, **changes: Any) -> None:
    settings = {"seq_length": 64, "global_batch_size": 8, "max_steps": STEPS, "val_check_interval": 2} | changes
    recipe = tiny.continual_pretrain(str(world / "base"), blend, name=name, directory=str(world / "runs"), **settings)
    if stop_at:
        recipe.trainer.callbacks.append(run.Config(StopAtStep, step=stop_at))
    run.run(recipe, direct=True)


def start(world: Path, blend: Any, name: str, processes: int = 1, **changes: Any) -> int:
    job = functools.partial(train, world, blend, name, processes=processes, **changes)
    return jobs.run(job, processes, log=world / f"{name}.log")


def metrics(world: Path, name: str, key: str = "reduced_train_loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in read_metrics(world / "runs" / name) if key in line}


@pytest.fixture(scope="module")
def reference(world: Path, blend: Any) -> str:
    """One uninterrupted run in one process."""
    assert start(world, blend, "reference") == 0, (world / "reference.log").read_text()[-3000:]
    return "reference"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("data_parallel", {}),
        ("tensor_parallel", {"tensor_model_parallel_size": 2}),
        ("pipeline_parallel", {"pipeline_model_parallel_size": 2}),
    ],
)
def test_two_processes_reproduce_one(world: Path, blend: Any, reference: str, name: str, layout: dict) -> None:
    assert start(world, blend, name, processes=2, **layout) == 0, (world / f"{name}.log").read_text()[-3000:]
    one, two = metrics(world, reference), metrics(world, name)
    assert list(two) == list(range(1, STEPS + 1))
    for step in one:
        assert two[step] == pytest.approx(one[step], abs=1e-4)
    validated = metrics(world, reference, "val_loss_en")
    assert list(validated) == [0, 2, 4, STEPS]
    assert metrics(world, name, "val_loss_en") == pytest.approx(validated, abs=1e-4)


def test_a_checkpoint_says_what_it_was_trained_with_and_what_came_of_it(world: Path, reference: str) -> None:
    """The export takes it along, for the model card."""
    newest = newest_whole(world / "runs" / reference / "checkpoints")
    assert newest is not None
    first, last = newest.record["losses"]
    assert (first["step"], last["step"]) == (0, STEPS)
    for name in ("ja", "en"):
        measured = metrics(world, reference, f"val_loss_{name}")
        assert (first[name], last[name]) == (measured[0], measured[STEPS])
    assert {"nemo_cpt", "nemo_toolkit", "megatron-core", "torch"} <= newest.record["versions"].keys()
    assert newest.record["before"] == []


def test_the_log_tells_the_mean_of_the_sets_as_the_checkpoints_do(world: Path, blend: Any, reference: str) -> None:
    """NeMo's own value, which weighs batches unequally, stood in the lines of the log."""
    told = re.findall(r"global_step: 2 .*val_loss: ([0-9.]+)", (world / f"{reference}.log").read_text())
    sets = [metrics(world, reference, f"val_loss_{name}")[2] for name in ("ja", "en")]
    assert [float(each) for each in told] == [pytest.approx(sum(sets) / 2, rel=1e-3)]


def test_clipping_is_in_effect(world: Path, blend: Any, reference: str) -> None:
    norms = metrics(world, reference, "grad_norm")
    assert max(norms.values()) > 1.0  # so clip_grad=1.0 had something to do


def test_three_resumptions_equal_an_uninterrupted_run(world: Path, blend: Any, reference: str) -> None:
    for stop_at in (1, 3, 4, None):
        assert start(world, blend, "resumed", stop_at=stop_at) == 0, (world / "resumed.log").read_text()[-3000:]
    assert metrics(world, "resumed") == metrics(world, reference)
    assert metrics(world, "resumed", "lr") == metrics(world, reference, "lr")  # the old schedule goes on


def test_a_new_run_from_a_training_checkpoint_starts_a_fresh_schedule(world: Path, blend: Any, reference: str) -> None:
    checkpoint = newest_whole(world / "runs" / reference / "checkpoints")
    assert checkpoint is not None
    job = functools.partial(continue_from, world, blend, checkpoint.path)
    assert jobs.run(job, log=world / "fresh.log") == 0, (world / "fresh.log").read_text()[-3000:]
    assert metrics(world, "fresh", "lr") == metrics(world, reference, "lr")
    trained = metrics(world, reference, "val_loss_ja")[STEPS]
    assert metrics(world, "fresh", "val_loss_ja")[0] == pytest.approx(trained, abs=1e-5)
    # Of the model that was named for its tokenizer, they hold neither weights nor a folder, which NeMo cannot copy.
    newest = newest_whole(world / "runs/fresh/checkpoints")
    assert newest is not None
    carried = {path.name for path in (newest.path / "context/hf").iterdir()}
    assert {"tokenizer.json", "config.json"} < carried
    assert not {"model.safetensors", "original"} & carried
    export_hf(newest.path, world / "fresh_hf")
    assert (world / "fresh_hf" / TEMPLATES / "tool_use.jinja").read_text() == "{{ tools }}"


def continue_from(world: Path, blend: Any, checkpoint: Path) -> None:
    model = Path(shutil.copytree(world / "base_hf", world / "with_folders"))
    (model / "original").mkdir()
    (model / "original" / "params.json").write_text("{}")
    (model / TEMPLATES).mkdir()
    (model / TEMPLATES / "tool_use.jinja").write_text("{{ tools }}")
    recipe = tiny.continual_pretrain(
        str(checkpoint), blend, tokenizer=str(model), name="fresh", directory=str(world / "runs"), seq_length=64,
        global_batch_size=8, max_steps=STEPS, val_check_interval=2,
    )  # fmt: skip
    run.run(recipe, direct=True)


def test_a_finished_run_started_again_does_nothing(world: Path, blend: Any, reference: str) -> None:
    before = (world / "runs" / reference / "metrics" / "steps.jsonl").read_text()
    assert start(world, blend, reference) == 0, (world / "reference.log").read_text()[-3000:]
    assert (world / "runs" / reference / "metrics" / "steps.jsonl").read_text() == before


def train_adapters(
    world: Path, blend: Any, stop_at: int | None, name: str = "lora", embeddings_lr: float | None = None
) -> None:
    recipe = tiny.continual_pretrain(
        str(world / "base"), blend, name=name, directory=str(world / "runs"), seq_length=64, global_batch_size=8,
        max_steps=STEPS, val_check_interval=2, lr=1e-2,
    )  # fmt: skip
    recipe.model.config.recompute_granularity, recipe.model.config.recompute_method = "full", "block"
    recipe.model.config.recompute_num_layers = 3
    if embeddings_lr:
        recipe.trainer.callbacks.append(run.Config(RecomputeOutputs))
    if stop_at:
        recipe.trainer.callbacks.append(run.Config(StopAtStep, step=stop_at))
    run.run(llama31_8b.with_lora(recipe, rank=8, embeddings_lr=embeddings_lr), direct=True)


def test_adapters_train_under_recompute_and_resume(world: Path, blend: Any) -> None:
    for stop_at in (3, None):
        log = world / "lora.log"
        assert jobs.run(functools.partial(train_adapters, world, blend, stop_at), log=log) == 0, log.read_text()[-3000:]
    losses = metrics(world, "lora")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.5


def test_embeddings_train_beside_adapters_at_their_own_rate_resume_and_are_exported(world: Path, blend: Any) -> None:
    for stop_at in (3, None):
        log = world / "embeddings.log"
        job = functools.partial(train_adapters, world, blend, stop_at, "embeddings", 5e-3)
        assert jobs.run(job, log=log) == 0, log.read_text()[-3000:]
    assert metrics(world, "embeddings")[STEPS] < metrics(world, "embeddings")[1] - 0.5
    own, embeddings = (metrics(world, "embeddings", name) for name in ("lr", "embeddings_lr"))
    assert list(own) == list(embeddings) == list(range(1, STEPS + 1))
    for step, rate in own.items():  # one cosine, from 0.01 and from 0.005, to 0.001; the run was resumed at step 3
        assert (embeddings[step] - 1e-3) / (5e-3 - 1e-3) == pytest.approx((rate - 1e-3) / (1e-2 - 1e-3), abs=1e-6)
    assert (own[1], embeddings[1]) == pytest.approx((1e-2, 5e-3))
    newest = newest_whole(world / "runs/embeddings/checkpoints")
    assert newest is not None
    checkpoint = newest.path
    export_hf(checkpoint, world / "embeddings_hf")
    engine = TransformersEngine(world / "embeddings_hf", device="cpu")
    loss = sequences_loss(engine, world / "ds/ja_validation", seq_length=64, samples=8).loss
    assert loss == pytest.approx(metrics(world, "embeddings", "val_loss_ja")[STEPS], abs=1e-4)
    before, after = (load_file(world / folder / "model.safetensors") for folder in ("base_hf", "embeddings_hf"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not before[name].equal(after[name])
    assert before["model.norm.weight"].equal(after["model.norm.weight"])
    with pytest.raises(CptError, match="which an adapter cannot hold"):
        export_hf(checkpoint, world / "embeddings_adapter", adapter=True)


def test_a_rate_below_the_schedules_end_is_refused(world: Path, blend: Any) -> None:
    recipe = tiny.continual_pretrain(str(world / "base"), blend, lr=1e-2)
    with pytest.raises(CptError, match=r"embeddings_lr 0\.0001 is below the schedule's min_lr 0\.001"):
        llama31_8b.with_lora(recipe, rank=8, embeddings_lr=1e-4)
