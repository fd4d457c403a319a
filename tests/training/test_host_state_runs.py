"""On a GPU: a run with Adam's states on the host is that of the states on the GPU, also across a resumption."""

import functools
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from nemo_cpt.planning.recipe_writer import keep_states_on_host
from nemo_cpt.recipes import llama31_8b, tiny
from nemo_cpt.training.callbacks import StopAtStep
from nemo_cpt.training.metrics import read_metrics
from tests.training import jobs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # six starts of NeMo, four at a time
STEPS = 6


def train(world: Path, blend: Any, name: str, on_host: bool = True, stop_at: int | None = None) -> None:
    recipe = llama31_8b.continual_pretrain(
        str(world / "base"), blend, model=tiny.model(128), name=name, directory=str(world / "runs"), seq_length=128,
        global_batch_size=8, micro_batch_size=4, max_steps=STEPS, val_check_interval=3, lr=1e-3, **llama31_8b.ONE_GPU,
    )  # fmt: skip
    if on_host:
        keep_states_on_host(recipe)
    if stop_at:
        recipe.trainer.callbacks.append(run.Config(StopAtStep, step=stop_at))
    run.run(recipe, direct=True)


def start(world: Path, blend: Any, name: str, **settings: Any) -> list[Any]:
    return jobs.launch(functools.partial(train, world, blend, name, **settings), log=world / f"{name}.log")


def together(world: Path, started: dict[str, list[Any]]) -> None:
    for name, job in started.items():
        assert jobs.wait(job) == 0, (world / f"{name}.log").read_text()[-3000:]


def losses(world: Path, name: str) -> dict[int, float]:
    key = "reduced_train_loss"
    return {line["step"]: line[key] for line in read_metrics(world / "runs" / name) if key in line}


def test_a_resumed_run_equals_an_unbroken_one_and_one_with_its_states_on_the_gpu(world: Path, blend: Any) -> None:
    places = {"on_gpu": {"on_host": False}, "on_host": {"on_host": True}}
    together(
        world,
        {name: start(world, blend, name, **place) for name, place in places.items()}
        | {
            f"{name}_resumed": start(world, blend, f"{name}_resumed", stop_at=3, **place)
            for name, place in places.items()
        },
    )
    together(
        world, {f"{name}_resumed": start(world, blend, f"{name}_resumed", **place) for name, place in places.items()}
    )
    unbroken = losses(world, "on_host")
    assert list(unbroken) == list(range(1, STEPS + 1))
    for name in ("on_gpu", "on_gpu_resumed", "on_host_resumed"):
        assert losses(world, name) == pytest.approx(unbroken, abs=1e-3), name
    assert unbroken[STEPS] < unbroken[1] - 0.1
