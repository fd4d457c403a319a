"""Optimizer states in pinned host memory, updated by the GPU in place: full-parameter training on one GPU.

Their transfer costs a fixed time a step, so its share falls with the global batch size.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl

from nemo_cpt.constants import ADAM_STATES
from nemo_cpt.errors import CptError
from nemo_cpt.training.host_states import HostStates, write_checkpoints_in_threads


class HostStateOptimizer(nl.MegatronOptimizerModule):
    """NeMo's Megatron optimizer with some of Adam's states in pinned host memory.

    Args:
        config: Megatron's configuration; it needs `use_precision_aware_optimizer=True` (so that Transformer Engine
            holds the states) and for every state named here a dtype other than fp8.
        host_states: Any of "exp_avg", "exp_avg_sq" (the two moments) and "master_param" (the fp32 master weight, or
            its lower 16 bits with `store_param_remainders`). Host memory: parameters times the bytes of their dtypes.
        **kwargs: What `nl.MegatronOptimizerModule` takes (lr_scheduler, no_weight_decay_cond, ...).

    Raises:
        CptError: A name that is no state of Adam, or a configuration that keeps the states elsewhere.
    """

    def __init__(self, config: OptimizerConfig, host_states: Iterable[str] = ADAM_STATES, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.host_states = tuple(host_states)
        self._states: list[HostStates] = []
        _check(config, self.host_states)

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        """Set up the optimizer as NeMo does; its states will be allocated in host memory when they first appear."""
        optimizers = super().optimizers(model)
        self._states = [_keep_on_host(each, self.host_states) for each in _with_adam(optimizers[0].mcore_optimizer)]
        # A forked writer would see zeros: pinned memory is MADV_DONTFORK.
        write_checkpoints_in_threads()
        return optimizers

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Drop the states before Lightning's teardown, which would copy them to the host, where they are, again.

        Raises:
            CptError: checkpoints are to be written by another process, which does not see the states.
        """
        super().on_fit_start(trainer, pl_module)
        if trainer.strategy.async_save:
            raise CptError("host_states needs MegatronStrategy(ckpt_async_save=False).")
        teardown = trainer.strategy.teardown

        def teardown_without_states() -> None:
            for states in self._states:
                # The parameters' own states, not the memory, which stays pinned until the process ends.
                states.adam.state.clear()
            teardown()

        trainer.strategy.teardown = teardown_without_states


def _check(config: OptimizerConfig, host_states: tuple[str, ...]) -> None:
    unknown = [name for name in host_states if name not in ADAM_STATES]
    if unknown:
        raise CptError(f"host_states names {unknown}; Adam's states are {list(ADAM_STATES)}.")
    if not config.use_precision_aware_optimizer:
        raise CptError(
            "host_states needs OptimizerConfig(use_precision_aware_optimizer=True, use_distributed_optimizer=True); "
            "without it Megatron keeps the master weights itself, on the GPU."
        )
    for name in ("exp_avg", "exp_avg_sq"):
        if name in host_states and getattr(config, f"{name}_dtype") == torch.uint8:
            raise CptError(f"{name} in fp8 cannot be kept in host memory; choose {name}_dtype bf16, fp16 or fp32.")


def _with_adam(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each for each in chained if each.optimizer is not None]


def _keep_on_host(megatron: Any, names: tuple[str, ...]) -> HostStates:
    """Keep states of a Megatron optimizer's Adam on the host, also while a checkpoint is written or read."""
    states = HostStates(megatron.optimizer, names)
    load, states_of = megatron.load_state_dict, megatron._get_main_param_and_optimizer_states

    @functools.wraps(load)
    def load_into_host(state_dict: dict[str, Any]) -> None:
        states.allocate()  # Megatron would fill the place of states that are not there with as many bytes on the GPU
        load(state_dict)

    megatron.load_state_dict = load_into_host
    megatron._get_main_param_and_optimizer_states = lambda param: states.for_checkpoint(states_of(param))
    return states
