"""Optimizer states in pinned host memory, updated by the GPU in place: full-parameter training on one GPU.

Transformer Engine's Adam kernel reads and writes its states through pointers, and a GPU can follow a pointer into
pinned host memory: the states cross the PCIe bus once in each direction at every step and never stay on the GPU. The
arithmetic is the stock kernel's. The transfer costs a fixed time a step, so its share falls with the global batch size.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl

from nemo_cpt.errors import CptError
from nemo_cpt.training.adam import STATES

SLAB_BYTES = 2**30
ALIGNMENT = 512
_KEPT: list["PinnedMemory"] = []  # for the life of the process, see PinnedMemory


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

    def __init__(self, config: OptimizerConfig, host_states: Iterable[str] = STATES, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.host_states = tuple(host_states)
        self._adams: list[Any] = []
        _check(config, self.host_states)

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        """Set up the optimizer as NeMo does; its states will be allocated in host memory when they first appear."""
        optimizers = super().optimizers(model)
        self._adams = _inner_optimizers(optimizers[0].mcore_optimizer)
        for adam in self._adams:
            keep_states_on_host(adam, self.host_states)
        return optimizers

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Drop the states before Lightning's teardown, which would copy them to the host, where they are, again."""
        super().on_fit_start(trainer, pl_module)
        teardown = trainer.strategy.teardown

        def teardown_without_states() -> None:
            for adam in self._adams:
                adam.state.clear()
            teardown()

        trainer.strategy.teardown = teardown_without_states


def _check(config: OptimizerConfig, host_states: tuple[str, ...]) -> None:
    unknown = [name for name in host_states if name not in STATES]
    if unknown:
        raise CptError(f"host_states names {unknown}; Adam's states are {list(STATES)}.")
    if not config.use_precision_aware_optimizer:
        raise CptError(
            "host_states needs OptimizerConfig(use_precision_aware_optimizer=True, use_distributed_optimizer=True); "
            "without it Megatron keeps the master weights itself, on the GPU."
        )
    for name in ("exp_avg", "exp_avg_sq"):
        if name in host_states and getattr(config, f"{name}_dtype") == torch.uint8:
            raise CptError(f"{name} in fp8 cannot be kept in host memory; choose {name}_dtype bf16, fp16 or fp32.")


def _inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each.optimizer for each in chained if each.optimizer is not None]


def keep_states_on_host(adam: Any, names: Iterable[str]) -> None:
    """Let a Transformer Engine FusedAdam without states yet allocate the named ones in pinned host memory."""
    memory = PinnedMemory()
    _KEPT.append(memory)
    adam._initialize_state = functools.partial(_initialize, adam, adam._initialize_state, frozenset(names), memory)


def _initialize(
    adam: Any,
    on_device: Any,
    names: frozenset[str],
    memory: "PinnedMemory",
    param: torch.Tensor,
    state_name: str,
    zero_buffer: bool,
    store_param_remainders: bool = False,
) -> None:
    if state_name not in names:
        on_device(param, state_name, zero_buffer, store_param_remainders)
        return
    dtype = torch.int16 if store_param_remainders else adam.name_to_dtype_map[state_name]
    state = memory.of(param, state_name, dtype)
    adam.state[param][state_name] = state.zero_() if zero_buffer else state
    if adam.name_to_dtype_map[state_name] != torch.float32:
        scale = torch.ones(1, dtype=torch.float32, device=param.device)
        adam._scales.setdefault(param, {})[state_name] = scale


class PinnedMemory:
    """Tensors in pinned host memory that the GPU addresses as its own (CUDA's unified virtual addresses).

    Memory is taken in slabs of 1 GiB, because PyTorch rounds each pinned allocation up to a power of two. It is kept
    until the process ends: freed but still registered, its addresses would break the copies to whatever comes there.
    """

    def __init__(self) -> None:
        self._slabs = [torch.empty(0, dtype=torch.uint8)]
        self._used = 0
        self._states: dict[tuple[torch.Tensor, str], torch.Tensor] = {}

    def of(self, param: torch.Tensor, state_name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor for one state of one parameter: zeros at first, later (loading a checkpoint) the same memory."""
        if (param, state_name) not in self._states:
            self._states[param, state_name] = self.zeros(param.shape, dtype)
        return self._states[param, state_name]

    def zeros(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """A CUDA tensor of zeros whose memory is the host's.

        Raises:
            CptError: The host has no such memory left to pin.
        """
        shape = tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        host = self._take(size)
        host.zero_()
        return torch.as_tensor(_DeviceView(host), device="cuda").view(dtype).view(shape)

    def _take(self, size: int) -> torch.Tensor:
        if size > SLAB_BYTES // 4:
            self._slabs.insert(0, _pinned(size))
            return self._slabs[0]
        if self._used + size > self._slabs[-1].numel():
            self._slabs.append(_pinned(SLAB_BYTES))
            self._used = 0
        start = self._used
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return self._slabs[-1][start : start + size]


def _pinned(size: int) -> torch.Tensor:
    """Page-locked bytes, exactly `size` of them, also for the GPU's own accesses."""
    host = torch.empty(size, dtype=torch.uint8)
    code = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size, 0)
    if int(code) != 0:
        raise CptError(
            f"The host refused to pin {size / 2**30:.2f} GiB for optimizer states (CUDA error {int(code)}). "
            "Give the job more memory (ulimit -l, the container's or Slurm's --mem), or keep fewer states on the host."
        )
    return host


class _DeviceView:
    """Presents pinned host bytes as device memory; the tensor made from it keeps them alive."""

    def __init__(self, host: torch.Tensor):
        self._host = host
        self.__cuda_array_interface__ = {
            "shape": (host.numel(),),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }
