"""Checkpoints of a machine without Transformer Engine load on one with it."""

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import nemo_run as run
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from nemo.lightning import _strategy_lib
from nemo.lightning.megatron_parallel import MegatronParallel

from nemo_cpt.recipes import tiny
from nemo_cpt.training import patches
from nemo_cpt.training.metrics import read_metrics
from tests.training import jobs


def train_asking_for_extra_states(world: Path, blend: Any, name: str, patched: bool) -> None:
    recipe = tiny.continual_pretrain(
        str(world / "base"), blend, name=name, directory=str(world / "runs"), seq_length=64, global_batch_size=4,
        max_steps=1, val_check_interval=1,
    )  # fmt: skip
    ask, give = MegatronParallel.sharded_state_dict, _strategy_lib.load_model_state_dict

    def with_extra_state(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        key = "module.decoder.unwritten._extra_state"
        return ask(model, *args, **kwargs) | {key: ShardedObject(key, torch.empty(0), (1,), (0,))}

    def without_extra_state(model: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        state = checkpoint["state_dict"]
        assert state.pop("module.decoder.unwritten._extra_state").numel() == 0  # the model's own came back
        give(model, checkpoint, *args, **kwargs)

    patch = None if patched else mock.patch.object(patches, "load_checkpoints_written_without_transformer_engine")
    with (
        mock.patch.object(MegatronParallel, "sharded_state_dict", with_extra_state),
        mock.patch.object(_strategy_lib, "load_model_state_dict", without_extra_state),
        patch or mock.MagicMock(),
    ):
        run.run(recipe, direct=True)


@pytest.mark.parametrize("patched", [True, False])
def test_a_missing_extra_state_does_not_end_the_load(world: Path, blend: Any, patched: bool) -> None:
    name = f"extra_state_{patched}"
    code = jobs.run(
        functools.partial(train_asking_for_extra_states, world, blend, name, patched), log=world / f"{name}.log"
    )
    assert (code == 0) is patched, (world / f"{name}.log").read_text()[-3000:]
    if patched:
        assert read_metrics(world / "runs" / name)[0]["val_loss_en"] < 6
    else:
        assert "unwritten._extra_state" in (world / f"{name}.log").read_text()
