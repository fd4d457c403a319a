"""NeMo and Megatron Core on a machine without a GPU: the same code, tensors on the CPU, gloo between processes.

`cpu_stack()` is entered for as long as Megatron runs and puts everything back when it is left. Seen with nemo_toolkit
2.7.3, megatron-core 0.15.3 and torch 2.13.0, in fp32, with tensor, pipeline and data parallelism.
"""

import contextlib
import types
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

# Megatron's fused kernels need Transformer Engine or Apex; these are their plain equivalents, with the same values.
UNFUSED = {
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "use_cpu_initialization": True,
}


class _CudaMeansCpu(TorchFunctionMode):
    """Every request for a CUDA tensor is served from the CPU; Megatron's optimizers hard-code `device="cuda"`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron sorts parameters by comparing with "torch.cuda.FloatTensor" and the like.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        # Three ways to ask for the GPU: a `device=`, pinned memory (for copies to it), and `tensor.to("cuda")`.
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """Stands for a CUDA stream: work on the CPU is done when the call returns."""

    def __init__(self, *args, **kwargs): ...

    def wait_stream(self, stream): ...

    def synchronize(self): ...


def _cuda_functions() -> dict[str, Any]:
    """What `torch.cuda` offers, played by the CPU as in its CPU build; the CPU's random generator plays the GPU's."""
    return {
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda *args: _Stream(),
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        # A CUDA build of PyTorch would count the device above, and ask a driver that is not there for its name.
        "is_available": lambda: False,
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
    }


def _patches() -> Iterator[Any]:
    """What is replaced while Megatron runs on the CPU, in groups by what would fail without it."""
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.utils as transformer_utils
    import nemo.collections.llm.peft.lora as lora
    import nemo.collections.llm.peft.utils as peft_utils
    import nemo.lightning.io.pl as checkpoint_io
    import nemo.lightning.pytorch.strategies.megatron_strategy as megatron_strategy
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    # 1. Calls of torch.cuda, and moves to the GPU, have a CPU's meaning.
    for name, function in _cuda_functions().items():
        yield mock.patch.object(torch.cuda, name, function)
    yield mock.patch.object(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    yield mock.patch.object(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    yield mock.patch.object(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    # Megatron's own versions of torch.cuda's functions for the random generator.
    yield mock.patch.object(megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    yield mock.patch.object(
        megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    )
    # 2. Kernels and layers of Transformer Engine, where it is installed, have their plain equivalents.
    # torch.compile would want a C++ compiler for one line, and some 15 s.
    yield mock.patch.object(transformer_utils, "gelu_impl", partial(torch.nn.functional.gelu, approximate="tanh"))
    for module, replaced in _plain_parts():
        yield mock.patch.multiple(module, **replaced)
    if not lora.HAVE_TE:  # NeMo's LoRA asks for Transformer Engine's classes even where it is absent
        absent = type("Absent", (), {})
        yield mock.patch.object(lora, "te", types.SimpleNamespace(Linear=absent, LayerNormLinear=absent), create=True)
    yield mock.patch.object(peft_utils, "HAVE_TE", False)
    # 3. What asks a driver, or waits for ever with gloo.
    # Called on rank 0 alone it gathers nothing from all ranks, which gloo counts and then waits for ever.
    yield mock.patch.object(ProgressPrinter, "log_megatron_timers", lambda printer, timers: "")
    # A CUDA build of PyTorch asks the driver whether a graph is captured, at each optimizer's step.
    yield mock.patch.object(
        torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None, create=True
    )
    # Both move what a checkpoint holds to the current GPU; the first asserts that there is one.
    yield mock.patch.object(checkpoint_io, "_fix_tensors_device", lambda checkpoint: checkpoint)
    yield mock.patch.object(megatron_strategy, "_optimizer_to_device", lambda optimizer, device: None)


def _plain_parts() -> Iterator[tuple[Any, dict[str, Any]]]:
    """What Megatron takes from Transformer Engine wherever that is installed, and what it has itself where it is not.

    Those of Transformer Engine know CUDA tensors alone: without this, no model runs on the CPU of a GPU's machine.
    """
    from megatron.core import optimizer, utils
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as optimizers
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    over_tensors = {
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
    }
    yield transformer_block, {"LayerNormImpl": WrappedTorchNorm}
    yield gpt_layer_specs, {"LNImpl": WrappedTorchNorm}
    yield optimizer, {"Adam": torch.optim.AdamW, "USING_PYTORCH_OPTIMIZER": True}
    yield optimizers, over_tensors
    yield clip_grads, over_tensors | {"l2_norm_impl": utils.local_multi_tensor_l2_norm}


@contextlib.contextmanager
def cpu_stack() -> Iterator[None]:
    """Let NeMo and Megatron run on the CPU inside the `with` block; everything is as before after it.

    Nested entries are allowed: the inner one does nothing.

    Example:
        >>> with cpu_stack():
        ...     model.configure_model()
    """
    if torch.cuda.current_stream.__module__ == __name__:
        yield
        return
    with contextlib.ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        stack.enter_context(_CudaMeansCpu())
        yield
