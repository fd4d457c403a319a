"""Activations that cost little to compute again are not kept: the norms' outputs and the MLPs' activations."""

import functools
import importlib
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.training.callbacks import wrapped_model
from nemo_cpt.training.patching import replace

# What computes an output again: it writes it into the tensor that it is given, which has its memory back.
Again = Callable[[torch.Tensor], Any]


class RecomputeOutputs(pl.Callback):
    """Keeps neither the output of a layer's norms nor that of its MLP's activation until the backward pass.

    Both are computed again there from what is kept anyway: for Llama-3.1-8B at 8192 tokens 0.34 of the 1.06 GiB that a
    layer keeps. In all 32 layers that takes 1 to 2 % of a step (docs/performance.md), as much as the recomputation of
    one or two whole layers, which save 1.01 GiB each. Megatron calls this output-discarding recomputation, and has it
    for its mixtures of experts (`recompute_modules=["moe_act"]`). The results are the same to the last bit. It goes
    together with layers that are recomputed whole.

    Norms are Transformer Engine's, which norm and multiply in one module; of the layers that a CPU trains, the
    activation alone is computed again. In fp8 Transformer Engine keeps a byte an element of either, and nothing here
    changes that: `planning.fit` does not propose it there, where it would compute again for nothing.

    Raises:
        CptError: at the first step; the model has no MLP of Megatron's, or experts, its steps are captured as CUDA
            graphs, or its activations are offloaded to the host.
    """

    def __init__(self) -> None:
        self._done = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Let every layer of this rank's part of the model drop its outputs: NeMo has added the adapters by now."""
        if not self._done:
            self._done = True
            recompute_outputs(wrapped_model(trainer, pl_module))


def recompute_outputs(model: torch.nn.Module) -> None:
    """Let every layer of a model drop its norms' outputs and its activation in the forward pass; see the callback.

    Raises:
        CptError: see `RecomputeOutputs`.
    """
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP

    if find_spec("transformer_engine") is not None:
        fused_norms = importlib.import_module("transformer_engine.pytorch.module.layernorm_linear")
        replace(fused_norms, "apply_normalization", _noted)
    found = False
    for module in model.modules():
        config = getattr(module, "config", None)
        # Older names of one setting, which Megatron makes the third one of when it makes the configuration.
        captured = getattr(config, "enable_cuda_graph", False) or getattr(config, "external_cuda_graph", False)
        if captured or getattr(config, "cuda_graph_impl", "none") != "none":
            raise CptError("RecomputeOutputs frees memory within a step, which a CUDA graph cannot: leave one away")
        # It copies outputs to the host on another stream, and so after their memory may have become another tensor's.
        if getattr(config, "cpu_offloading", False):
            raise CptError("RecomputeOutputs drops what cpu_offloading copies to the host: leave one away")
        if getattr(config, "num_moe_experts", None):  # whose activations are also scaled by token
            raise CptError("RecomputeOutputs is for dense models: take recompute_modules=['moe_act'] for experts")
        if isinstance(module, SelfAttention):
            _drop_norm(module.linear_qkv)
        elif isinstance(module, MLP) and type(module).forward is MLP.forward:
            found = True
            _drop_norm(module.linear_fc1)
            _drop_activation(module)
    if not found:
        raise CptError("RecomputeOutputs found no MLP of Megatron's in the model: take it out of trainer.callbacks")


class _Dropped:
    """An output without its memory, until the gradient of what was computed from it asks for it."""

    def __init__(self, output: torch.Tensor, again: Again):
        self.output: torch.Tensor | None = output
        self.again: Again | None = again
        self.size = output.untyped_storage().nbytes()
        # Of the storage, not of the tensor: autograd's saved tensors are others, over the same storage.
        output.untyped_storage().resize_(0)

    def restore(self, gradient: torch.Tensor) -> None:
        """Compute the output again. A hook of the result's gradient: it runs before the backward pass reads it."""
        assert self.output is not None
        assert self.again is not None
        self.output.untyped_storage().resize_(self.size)
        with torch.no_grad():
            # `data` has a version counter of its own: autograd takes what it saved for unchanged, which it is.
            self.again(self.output.data)
        # The hook lives as long as the graph: what it holds would live as long.
        self.output = self.again = None


def _drop(output: torch.Tensor, again: Again, result: torch.Tensor) -> None:
    """Drop `output`, from which `result` was computed, if it is a tensor of its own."""
    whole = isinstance(output, torch.Tensor) and output.untyped_storage().nbytes() == output.nbytes > 0
    if whole and result.requires_grad:
        result.register_hook(_Dropped(output, again).restore)


def _drop_activation(mlp: torch.nn.Module) -> None:
    """Let an MLP drop the output of its activation, the input of its second linear layer."""
    # Of the call under way: what the first linear layer gave, its output and bias.
    given: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    first, second = mlp.linear_fc1.forward, mlp.linear_fc2.forward

    def widen(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = first(x, *args, **kwargs)
        given[:] = [(output.detach(), bias)]
        return output, bias

    def narrow(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = second(x, *args, **kwargs)
        wide = given.pop()
        _drop(x, functools.partial(_activate, mlp, *wide), output)
        return output, bias

    mlp.linear_fc1.forward, mlp.linear_fc2.forward = widen, narrow


def _activate(mlp: Any, wide: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor) -> None:
    """Write the input of an MLP's second linear layer, from the output and bias of its first."""
    config = mlp.config
    fused = config.bias_activation_fusion and not config.use_te_activation_func
    swiglu = config.gated_linear_unit and mlp.activation_func is torch.nn.functional.silu
    if fused and swiglu and bias is None:
        _compiled_swiglu()(wide.view(-1, wide.shape[-1]), into.view(-1, into.shape[-1]))
        return
    # Megatron's own code: the MLP's forward pass, between its two linear layers.
    between = types.SimpleNamespace(
        config=config,
        activation_func=mlp.activation_func,
        linear_fc1=lambda hidden: (wide, bias),
        linear_fc2=lambda activated: (activated, None),
    )
    into.copy_(type(mlp).forward(between, wide)[0].view_as(into))


@functools.cache
def _compiled_swiglu() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Megatron's fused SwiGLU (`core/fusions/fused_bias_swiglu.py`), written where it belongs without a copy."""
    from megatron.core.jit import jit_fuser

    def swiglu_into(wide: torch.Tensor, into: torch.Tensor) -> None:
        gate, up = torch.chunk(wide, 2, dim=-1)
        into.copy_(torch.nn.functional.silu(gate) * up)

    compiled: Callable[[torch.Tensor, torch.Tensor], None] = jit_fuser(swiglu_into)
    return compiled


def _drop_norm(linear: torch.nn.Module) -> None:
    """Let a linear layer drop the output of the norm that Transformer Engine computes in it, if there is one."""
    forward = linear.forward

    def multiply(x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        with _noting() as norms:
            output, bias = forward(x, *args, **kwargs)
        # Behind the layer: its own product has read them by now.
        for normed, again in norms:
            _drop(normed, again, output)
        return output, bias

    linear.forward = multiply


# By thread: layers that are recomputed whole run again in a thread of autograd's.
_notes = threading.local()


@contextmanager
def _noting() -> Iterator[list[tuple[torch.Tensor, Again]]]:
    """The norms' outputs of the linear layers that run within, each with what computes it again."""
    norms: list[tuple[torch.Tensor, Again]] = []
    _notes.norms = norms
    try:
        yield norms
    finally:
        _notes.norms = None


def _noted(apply_normalization: Callable[..., Any]) -> Callable[..., Any]:
    """Transformer Engine's function (2.11, `pytorch/module/_common.py`), which also takes where to write its output."""

    def apply(inputmat: torch.Tensor, ln_out: torch.Tensor | None, *args: Any) -> Any:
        result = apply_normalization(inputmat, ln_out, *args)
        norms = getattr(_notes, "norms", None)
        if norms is not None:
            source = inputmat.detach()
            norms.append((result[0], lambda into: apply_normalization(source, into, *args)))
        return result

    return apply
