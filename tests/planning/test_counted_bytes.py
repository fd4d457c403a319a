"""The planner's bytes against those of a tiny model's real tensors, in real runs on the CPU."""

import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo_run as run
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel

from nemo_cpt.planning import memory, read
from nemo_cpt.recipes import llama31_8b, tiny
from tests.training import jobs


class CountBytes(pl.Callback):
    """Write what the first step's tensors take, on every rank."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        chunks = list(trainer.strategy.megatron_parallel)
        parameters = [each for chunk in chunks for each in chunk.parameters()]
        ddp = [each for chunk in chunks for each in chunk.modules() if isinstance(each, DistributedDataParallel)]
        states = [
            value
            for optimizer in trainer.optimizers
            for state in _inner(optimizer).state.values()
            for value in state.values()
            if torch.is_tensor(value) and value.ndim
        ]
        counted = {
            "weights": _bytes([each for each in parameters if not _is_adapter(each, chunks)]),
            "adapter weights": _bytes([each for each in parameters if _is_adapter(each, chunks)]),
            "gradients": _bytes([buffer.grad_data for each in ddp for buffer in each.buffers]),
            "optimizer": _bytes(states),
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(counted))


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    mcore = optimizer.mcore_optimizer
    return getattr(mcore, "chained_optimizers", [mcore])[0].optimizer


def _is_adapter(parameter: torch.Tensor, chunks: list[Any]) -> bool:
    names = {id(each): name for chunk in chunks for name, each in chunk.named_parameters()}
    return "adapter" in names[id(parameter)]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def make(world: Path, blend: Any, folder: Path, processes: int, lora: dict, layout: dict[str, int]) -> run.Partial:
    recipe = tiny.continual_pretrain(
        str(world / "base"), blend, processes=processes, name=folder.name, directory=str(folder), seq_length=64,
        global_batch_size=8, max_steps=1, val_check_interval=1, **layout,
    )  # fmt: skip
    recipe.trainer.callbacks.append(run.Config(CountBytes, folder))
    recipe.trainer.enable_checkpointing, recipe.log.ckpt = False, None
    return llama31_8b.with_lora(recipe, **lora) if lora else recipe


def count(world: Path, blend: Any, folder: Path, processes: int, lora: dict, layout: dict[str, int]) -> None:
    run.run(make(world, blend, folder, processes, lora, layout), direct=True)


@pytest.mark.parametrize(
    ("processes", "lora", "layout"),
    [
        (1, {}, {}),
        (1, {"rank": 8}, {}),
        (1, {"rank": 8, "embeddings_lr": 5e-4}, {}),
        (2, {}, {"tensor_model_parallel_size": 2}),
        (2, {}, {"pipeline_model_parallel_size": 2}),
    ],
    ids=["full", "LoRA", "LoRA and embeddings", "tensor parallel", "pipeline parallel"],
)
def test_predicted_bytes_are_the_counted_ones(world, blend, tmp_path, processes, lora, layout) -> None:
    job = functools.partial(count, world, blend, tmp_path, processes, lora, layout)
    assert jobs.run(job, processes, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()[-3000:]
    work = read(make(world, blend, tmp_path, processes, lora, layout))
    for process in range(processes):
        counted = json.loads((tmp_path / f"{process}.json").read_text())
        stage = process if work.pipeline_model_parallel_size > 1 else 0
        predicted = memory.resident_bytes(work, stage)
        assert predicted["weights"] == counted["weights"]
        adapters, whole = memory.adapter_parameters(work, stage), memory.whole_parameters(work, stage)
        assert adapters * work.weight_bytes == counted["adapter weights"]
        trained = (adapters + whole) if lora else 0
        assert (predicted["gradients"] or trained * work.grad_bytes) == counted["gradients"]
        assert (predicted["optimizer"] or trained * memory.state_bytes(work)) == counted["optimizer"]
        if lora:
            assert predicted["adapters"] == sum(counted[k] for k in ("adapter weights", "gradients", "optimizer"))
