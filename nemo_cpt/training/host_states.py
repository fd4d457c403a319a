"""Adam's states in pinned host memory: the GPU updates them there, and checkpoints are written from and read into it.

Transformer Engine's Adam kernel reads and writes its states through pointers, and a GPU can follow a pointer into
pinned host memory: the states cross the PCIe bus once in each direction at every step and never stay on the GPU. The
arithmetic is the stock kernel's.
"""

import contextlib
import functools
import itertools
import math
import mmap
import queue
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from nemo_cpt.errors import CptError

SLAB_BYTES = 2**30
ALIGNMENT = 512
_KEPT: list["PinnedMemory"] = []  # for the life of the process, see PinnedMemory


class HostStates:
    """The named states of a Transformer Engine FusedAdam, which has none yet, in pinned host memory.

    Four methods of the instance are replaced, one for each way in which states come to be, change place or leave:
        `_initialize_state`, which makes a state: it makes a view of the host's memory (`initialize`).
        `set_scaled_state`, which copies into one: a value that is in its place already is not copied (`set`).
        `load_state_dict`, which would make all of them anew on the GPU (`load`).
        `state_dict`, which would convert all of them to fp32 at once: PyTorch's own takes its place.
    A state is found again by its address (`PinnedMemory.at`), because Megatron hands checkpoints the CUDA view alone;
    the view and the host's tensor have the same one, and that memory is never given back.

    Args:
        adam: a `transformer_engine.pytorch.optimizers.FusedAdam`; some of its methods are replaced on the instance.
        names: any of `constants.ADAM_STATES`.
    """

    def __init__(self, adam: Any, names: Iterable[str]):
        self.adam, self.names, self.memory = adam, frozenset(names), PinnedMemory()
        _KEPT.append(self.memory)
        self._initialize, self._set, self._load = adam._initialize_state, adam.set_scaled_state, adam.load_state_dict
        adam._initialize_state, adam.set_scaled_state, adam.load_state_dict = self.initialize, self.set, self.load
        adam.state_dict = functools.partial(torch.optim.Optimizer.state_dict, adam)  # not all states in fp32 at once

    def allocate(self) -> None:
        """Make every state now, not at the first step; the states' values are zeros."""
        for param in itertools.chain.from_iterable(group["params"] for group in self.adam.param_groups):
            # A second call, after a checkpoint was read, must not zero what it brought.
            if not self.adam.state[param]:
                remainders = self.adam.store_param_remainders and param.dtype == torch.bfloat16
                self.adam.initialize_state(param, remainders)

    def initialize(
        self, param: torch.Tensor, name: str, zero_buffer: bool, store_param_remainders: bool = False
    ) -> None:
        """`FusedAdam._initialize_state`: a named state is a view, as CUDA memory, of the host's."""
        if name not in self.names:
            self._initialize(param, name, zero_buffer, store_param_remainders)
            return
        dtype = torch.int16 if store_param_remainders else self.adam.name_to_dtype_map[name]
        state = as_cuda(self.memory.of(param, name, dtype))  # the same memory when it is made a second time
        self.adam.state[param][name] = state.zero_() if zero_buffer else state
        # FusedAdam keeps a scale beside every state that is not fp32, and multiplies by it.
        if self.adam.name_to_dtype_map[name] != torch.float32:
            scale = torch.ones(1, dtype=torch.float32, device=param.device)
            self.adam._scales.setdefault(param, {})[name] = scale

    def set(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """`FusedAdam.set_scaled_state`; a state that a checkpoint was read into is in its place already."""
        state = self.adam.state[param].get(name)
        # Equal addresses: the checkpoint was read straight into the state's own memory.
        if state is not None and value.data_ptr() == state.data_ptr():
            return
        self._set(param, name, value.to(param.device) if name in self.names else value)

    def load(self, state_dict: dict[str, Any]) -> None:
        """`FusedAdam.load_state_dict`, without PyTorch's copies of all states in the parameters' dtype."""
        state, groups = self.adam.state, state_dict["param_groups"]
        self._load({"state": {}, "param_groups": groups})  # the groups alone; it also empties the states
        # PyTorch's load_state_dict put a new dictionary in its place; the states are those of before.
        self.adam.state = state
        indices = itertools.chain.from_iterable(group["params"] for group in groups)
        params = itertools.chain.from_iterable(group["params"] for group in self.adam.param_groups)
        for index, param in zip(indices, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.set(param, name, value)

    def for_checkpoint(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replace a parameter's states by CPU tensors: their own memory where they are kept as they are written.

        Args:
            tensors: what Megatron writes and reads of a parameter, by name: "param", the master weight, and moments.
        """
        # Megatron's "param" is FusedAdam's "master_param".
        named = {name for name in tensors if (name if name != "param" else "master_param") in self.names}
        return tensors | {name: self.memory.at(tensors[name]) for name in named}


class PinnedMemory:
    """Zeros in pinned host memory that the GPU addresses as its own (CUDA's unified virtual addresses).

    Memory is taken in slabs of 1 GiB, because PyTorch rounds each pinned allocation up to a power of two. It is kept
    until the process ends: freed but still registered, its addresses would break the copies to whatever comes there.
    """

    def __init__(self) -> None:
        self._slab, self._used = mmap.mmap(-1, 1), 1  # full: the first state takes a slab
        self._states: dict[tuple[torch.Tensor, str], torch.Tensor] = {}
        self._at: dict[int, torch.Tensor] = {}

    def of(self, param: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor on the host for one state of one parameter: zeros at first, later the same memory.

        Raises:
            CptError: the host has no such memory left to pin.
        """
        if (param, name) not in self._states:
            taken = self._take(param.numel(), dtype).view(param.shape)
            self._states[param, name] = self._at[taken.data_ptr()] = taken
        return self._states[param, name]

    def at(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the host that a CUDA tensor is a view of; a copy on the host where it is of none."""
        host = self._at.get(tensor.data_ptr())
        return tensor.cpu() if host is None else host

    def _take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        size = count * dtype.itemsize
        if size > SLAB_BYTES // 4:  # of its own, so that no slab's end stays empty by more than a quarter
            return torch.frombuffer(_pinned(size), dtype=dtype, count=count)
        if self._used + size > len(self._slab):
            # The old slab lives on in the tensors that view it.
            self._slab, self._used = _pinned(SLAB_BYTES), 0
        start = self._used
        self._used += math.ceil(size / ALIGNMENT) * ALIGNMENT
        return torch.frombuffer(self._slab, dtype=dtype, count=count, offset=start)


def _pinned(size: int) -> mmap.mmap:
    """Page-locked zeros, exactly `size` bytes of them, also for the GPU's own accesses; forked processes have none.

    A fork would copy them: the kernel does not share what a device may write to.
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CptError(_refused(size, str(error))) from error
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with contextlib.suppress(OSError):  # of a kernel without it
            memory.madvise(advice)
    zeros = torch.frombuffer(memory, dtype=torch.uint8).zero_()  # by all threads, while pinning faults pages in by one
    code = torch.cuda.cudart().cudaHostRegister(zeros.data_ptr(), size, 0)
    if int(code) != 0:
        raise CptError(_refused(size, f"CUDA error {int(code)}"))
    return memory


def _refused(size: int, reason: str) -> str:
    return (
        f"The host refused to pin {size / 2**30:.2f} GiB for optimizer states ({reason}). "
        "Give the job more memory (ulimit -l, the container's or Slurm's --mem), or keep fewer states on the host."
    )


def as_cuda(host: torch.Tensor) -> torch.Tensor:
    """View pinned host memory as a CUDA tensor of the same shape and dtype."""
    return torch.as_tensor(_DeviceView(host), device="cuda").view(host.dtype).view(host.shape)


class _DeviceView:
    """Presents pinned host bytes as device memory; the tensor made from it keeps them alive."""

    def __init__(self, host: torch.Tensor):
        self._host = host
        self.__cuda_array_interface__ = {
            "shape": (host.numel() * host.itemsize,),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def write_checkpoints_in_threads() -> None:
    """Let this process write its own checkpoints, from the pinned memory itself, which forked writers do not see.

    Megatron Core 0.15.3 (`dist_checkpointing/strategies/filesystem_async.py`) forks a process for each file.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_threads)


def _write_in_threads(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """`FileSystemWriterAsync.write_preloaded_data_multiproc`: put what each bucket's writer returned, by its index."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    done: queue.Queue[tuple[int, Any]] = queue.Queue()
    waiting: queue.Queue[int] = queue.Queue()
    options = {"use_fsync": True} | ({"use_msc": True} if use_msc else {})
    write = FileSystemWriterAsync.write_preloaded_data
    # A thread a file: writing lets go of the interpreter, so that they run at once as the processes would.
    with ThreadPoolExecutor(len(buckets)) as pool:
        writers = []  # each takes one item off `waiting` when it is done, as Megatron's processes count themselves
        for index, bucket in enumerate(buckets):
            waiting.put(index)
            writers.append(pool.submit(write, transforms, index, bucket, done, waiting, **options))
    for writer in writers:
        writer.result()
    written = dict(done.get_nowait() for _ in buckets)
    failures = [each for each in written.values() if isinstance(each, Exception)]
    # An exception in the place of the results is how Megatron's caller hears of a failure.
    results.put(failures[0] if failures else written)
