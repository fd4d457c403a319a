"""A recipe's run is the training that a plain PyTorch + transformers loop does: benchmarks/loss_curves.py, in small."""

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from nemo.core.optim.lr_scheduler import CosineAnnealing

from nemo_cpt.recipes import tiny
from tests.training import jobs

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loss_curves.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loss_curves", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_twice(world: Path, blend: Any) -> None:
    loss_curves = load()
    recipe = tiny.continual_pretrain(
        str(world / "base"), blend, name="twice", directory=str(world / "runs"), seq_length=64, global_batch_size=8,
        micro_batch_size=4, max_steps=10, val_check_interval=5, warmup_steps=3,
    )  # fmt: skip
    recipe.log.ckpt, recipe.trainer.enable_checkpointing = None, False
    plain = loss_curves.train_by_plain_loop(recipe, world / "base_hf")
    half = loss_curves.train_by_plain_loop(recipe, world / "base_hf", steps=5)
    curves = {"recipe": loss_curves.train_by_recipe(recipe), "plain": plain, "half": half}
    (world / "twice.json").write_text(json.dumps(curves))


def test_the_recipe_and_a_plain_loop_train_alike(world: Path, blend: Any) -> None:
    log = world / "twice.log"
    assert jobs.run(functools.partial(train_twice, world, blend), log=log) == 0, log.read_text()[-3000:]
    curves = json.loads((world / "twice.json").read_text())
    losses = [line["reduced_train_loss"] for line in curves["plain"] if "reduced_train_loss" in line]
    assert losses[-1] < losses[0] - 0.1  # there is something to agree about
    figures = load().compare(curves["recipe"], curves["plain"])
    assert figures["largest_loss_difference"] < 1e-4
    assert figures["grad_norm"]["mean"] < 1e-3
    assert figures["lr"]["largest"] < 1e-9
    assert curves["half"][-1]["step"] == 5  # of the same schedule: its rate had not fallen to the end's
    assert load().compare(curves["recipe"], curves["half"])["largest_loss_difference"] < 1e-4


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_plain_loops_schedule_is_nemos(warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = CosineAnnealing(optimizer, max_steps=20, warmup_steps=warmup, constant_steps=0, min_lr=3e-5)
    rate = load().learning_rate
    for step in range(20):
        assert rate(step, 3e-4, 3e-5, warmup, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
