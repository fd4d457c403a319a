"""The optimizer module with states in pinned host memory: what it refuses, and what it does around a run."""

import types

import pytest
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.training import optimizer


def config(**fields):
    return types.SimpleNamespace(
        **{"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.float32}
        | fields
    )


class TestConfiguration:
    def test_states_are_checked_before_anything_is_allocated(self):
        with pytest.raises(CptError, match=r"\['moment'\].*exp_avg.*master_param"):
            optimizer.HostStateOptimizer(config(), host_states=["exp_avg", "moment"])
        with pytest.raises(CptError, match="use_precision_aware_optimizer=True"):
            optimizer.HostStateOptimizer(config(use_precision_aware_optimizer=False))
        with pytest.raises(CptError, match="exp_avg_sq in fp8"):
            optimizer.HostStateOptimizer(config(exp_avg_sq_dtype=torch.uint8))

    def test_fp8_states_may_stay_on_the_gpu(self):
        module = optimizer.HostStateOptimizer(config(exp_avg_dtype=torch.uint8), host_states=["exp_avg_sq"])
        assert module.host_states == ("exp_avg_sq",)

    def test_the_states_are_dropped_before_the_teardown_copies_them(self):
        module, adam = (
            optimizer.HostStateOptimizer(config()),
            types.SimpleNamespace(state={"parameter": {"exp_avg": 1}}),
        )
        module._states = [types.SimpleNamespace(adam=adam)]
        left = []
        trainer = trainer_with(teardown=lambda: left.append(len(adam.state)))
        module.on_fit_start(trainer, types.SimpleNamespace(config=types.SimpleNamespace()))
        assert len(adam.state) == 1
        trainer.strategy.teardown()
        assert left == [0]

    def test_another_process_cannot_write_the_checkpoints(self):
        module = optimizer.HostStateOptimizer(config())
        with pytest.raises(CptError, match="ckpt_async_save=False"):
            module.on_fit_start(trainer_with(async_save=True), types.SimpleNamespace(config=types.SimpleNamespace()))


def trainer_with(**strategy):
    return types.SimpleNamespace(strategy=types.SimpleNamespace(**{"async_save": False, "teardown": None} | strategy))
