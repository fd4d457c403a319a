"""Patches of defects in NeMo 2.7, Megatron Core 0.15 and Transformer Engine 2.11, in effect once `apply()` was called.

A function each, named for what it mends. `tests/training/test_patches.py` shows every defect without its patch, and so
fails when upstream no longer needs one.
"""

import copy
import functools
import logging
import pickle
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy
import torch

from nemo_cpt.constants import ADAM_SLICE_ELEMENTS, MEMORY_MARGIN
from nemo_cpt.training import dora_patches, index_cache, loop_patches
from nemo_cpt.training.patching import replace


def apply() -> None:
    """Put every patch into effect in this process; a second call changes nothing.

    Call it inside the job, before the model is built.
    """
    # The order is free but for pairs that replace one method: `replace` puts the later one around the earlier.
    loop_patches.validate_by_global_step()
    dora_patches.take_dora_norms_of_whole_rows()
    dora_patches.save_dora_magnitudes_like_their_rows()
    fold_gradient_of_frozen_linear()
    give_recomputed_layers_a_gradient()
    add_lora_in_one_pass()
    record_where_the_base_of_adapters_is()
    step_adam_in_slices()
    load_checkpoints_written_without_transformer_engine()
    free_gradients_at_once()
    wrap_without_room_for_two_copies()
    accumulate_gradients_without_apex()
    allocate_unread_gradients_first()
    resume_with_precision_aware_states()
    mend_datasets()
    multiply_shapes_with_numpy_2()
    write_one_checkpoint_at_a_time()
    keep_staged_copies_until_written()
    report_writes_as_bytes()
    end_without_moving_to_the_host()


def mend_datasets() -> None:
    """Put the patches of Megatron's datasets into effect; `nemo_cpt.training.datasets` does, wherever data are read."""
    keep_tokens_that_equal_padding()
    keep_indices_by_content()


def fold_gradient_of_frozen_linear() -> None:
    """Compute the input's gradient of a frozen linear layer as one matrix product.

    `LinearWithFrozenWeight.backward` (megatron-core 0.15.3, `core/tensor_parallel/layers.py`) multiplies a [s, b, v]
    gradient by a [v, h] weight. With a micro batch of 1 the fused cross-entropy, NeMo's default, hands it over with the
    strides of [b, s, v], which PyTorch does not fold for a weight that needs no gradient: it runs s products of one row
    each. With LoRA on Llama-3.1-8B that was 77 % of an H200's time (3,600 against 13,744 tokens/s).
    """
    from megatron.core.tensor_parallel import layers

    replace(layers.LinearWithFrozenWeight, "backward", lambda original: _folded_backward)


@torch.amp.custom_bwd(device_type="cuda")
def _folded_backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    # reshape, not view: the gradient has the strides of [b, s, v], which is the defect's cause.
    grad_input = torch.mm(grad_output.reshape(-1, grad_output.shape[-1]), weight)
    grad_input = grad_input.view(*grad_output.shape[:-1], weight.shape[-1])
    # As upstream: with tensor parallelism each rank has the product with its part of the weight.
    if ctx.allreduce_dgrad:
        torch.distributed.all_reduce(grad_input, group=ctx.tp_group)
    # One for each argument of upstream's forward; the frozen weight gets none.
    return grad_input, None, None, None, None


def give_recomputed_layers_a_gradient() -> None:
    """Let the embedding's output require a gradient where activations are recomputed.

    Megatron Core 0.15.3 and Transformer Engine 2.11 recompute through reentrant autograd functions, which record
    nothing when no input requires a gradient. Below a frozen embedding (LoRA) the recomputed layers, from the first
    on, then get no gradients: they silently keep their initial adapters (80 of 128 with 20 of 32 layers recomputed).
    """
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

    replace(LanguageModelEmbedding, "forward", _with_gradient)


def _with_gradient(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def embed(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        embeddings = forward(self, *args, **kwargs)
        # Only where activations are recomputed: elsewhere autograd would compute a gradient that nobody reads.
        recomputes = self.config.recompute_granularity is not None
        return embeddings.requires_grad_() if recomputes and torch.is_grad_enabled() else embeddings

    return embed


def record_where_the_base_of_adapters_is() -> None:
    """Let the checkpoints of a resumed run of adapters name the base that they are added to.

    NeMo 2.7.3 (`WrappedAdapterIO.load_checkpoint`, `lightning/pytorch/callbacks/peft.py`) takes the base's weights from
    where `AutoResume` says, and records the folder that the resumed checkpoint recorded, where it may be no more.
    """
    from nemo.lightning.pytorch.callbacks.peft import WrappedAdapterIO

    replace(WrappedAdapterIO, "load_checkpoint", _keeping_the_base)


def _keeping_the_base(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Of two calls the first one loads the base; the second, the adapters', would replace its name.
        base = self.model_ckpt_path
        loaded = load(self, *args, **kwargs)
        self.model_ckpt_path = base or self.model_ckpt_path
        return loaded

    return load_checkpoint


def add_lora_in_one_pass() -> None:
    """Add a LoRA adapter's output to its linear layer's in the adapter's last matrix product.

    NeMo 2.7.3 (`LoRALinear.forward`, `ParallelLinearAdapter.forward`) writes the [s, b, out] output of the adapter,
    scales it and adds it: six passes over it forward and four backward, where two and two do. The scale moves to the
    [s, b, rank] side; the sum is the product's own (beta = 1).
    """
    from nemo.collections.llm.peft import lora

    replace(lora.LoRALinear, "forward", _with_fused_addition)


def _with_fused_addition(forward: Callable[..., Any]) -> Callable[..., Any]:
    def fused(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        # What this does not cover takes NeMo's own way, which is right and only slower.
        if not _is_plain_adapter(self.adapter):
            return forward(self, x, *args, **kwargs)
        output, bias, layernorm_output = self.base_linear_forward(x, *args, **kwargs)
        low_rank, _ = self.adapter.linear_in(layernorm_output.contiguous())
        # Scaled here, where it has rank columns and not thousands.
        low_rank = low_rank * (self.adapter.alpha / self.adapter.dim)
        return _AddProduct.apply(output, low_rank, self.adapter.linear_out.weight), bias

    return fused


def _is_plain_adapter(adapter: Any) -> bool:
    from megatron.core import parallel_state
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    return (
        type(adapter) is ParallelLinearAdapter
        and isinstance(adapter.activation, torch.nn.Identity)
        and adapter.dropout is None
        and not adapter.is_expert
        and not adapter.config.cpu_offloading
        and parallel_state.get_tensor_model_parallel_world_size() == 1
    )


class _AddProduct(torch.autograd.Function):
    """output + low_rank @ weight.T, written over `output` [s, b, out]; low_rank [s, b, rank], weight [out, rank].

    `output` is shared, not marked as changed: linear layers return views from their autograd functions, and PyTorch
    refuses to change those in place. Its version counter still moves, so a layer that had saved it would fail loudly.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, low_rank: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(low_rank, weight)
        # detach shares the memory: `addmm_` writes into the linear layer's own output.
        summed = output.detach()
        summed.view(-1, summed.shape[-1]).addmm_(low_rank.reshape(-1, low_rank.shape[-1]), weight.t())
        return summed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low_rank, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_low_rank = torch.mm(rows, weight).view_as(low_rank)
        grad_weight = torch.mm(rows.t(), low_rank.reshape(-1, low_rank.shape[-1]))
        # The output's gradient is the sum's, unchanged.
        return grad, grad_low_rank, grad_weight


def step_adam_in_slices() -> None:
    """Let Transformer Engine's Adam hold fp32 copies of a slice of its moments, not of all of them.

    With bf16, fp16 or fp8 moments, `FusedAdam.step` (transformer_engine 2.11, `pytorch/optimizers/fused_adam.py`)
    first widens the moments of a whole parameter group: 8 bytes a parameter, 60 GiB for 8 B of them, at every step.
    """
    if find_spec("transformer_engine") is None:
        return
    from transformer_engine.pytorch.optimizers import FusedAdam

    replace(FusedAdam, "step", functools.partial(in_slices, elements=ADAM_SLICE_ELEMENTS))


def in_slices(step: Callable[..., Any], elements: int) -> Callable[..., Any]:
    """Let an optimizer's `step` see its parameter groups in slices of at most `elements` elements.

    A parameter larger than that is a slice of its own. For optimizers that count steps per group (`group["step"]`),
    as Transformer Engine's do, or per parameter, as PyTorch's do.
    """

    def step_in_slices(self: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        # Once, before the slices: each `step` would run it again.
        loss = closure() if closure is not None else None
        groups = self.param_groups
        try:
            for group in groups:
                # Every slice must see the step of before: the optimizer counts it up in each call, and Adam's bias
                # correction goes by it.
                steps_done = {"step": group["step"]} if "step" in group else {}
                for parameters in _slices(group["params"], elements):
                    self.param_groups = [group | steps_done | {"params": parameters}]
                    step(self, **kwargs)
                # The count of the last slice, which all of them reached.
                group |= {key: value for key, value in self.param_groups[0].items() if key == "step"}
        finally:
            self.param_groups = groups
        return loss

    return step_in_slices


def _slices(parameters: list[torch.Tensor], elements: int) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if batch and size + parameter.numel() > elements:
            yield batch
            batch, size = [], 0
        batch.append(parameter)
        size += parameter.numel()
    if batch:
        yield batch


def load_checkpoints_written_without_transformer_engine() -> None:
    """Load a checkpoint that lacks Transformer Engine's `_extra_state` objects, such as one that was trained on a CPU.

    NeMo 2.7.3 (`lightning/io/pl.py`) asks for every object of the model; without fp8 scaling factors these are empty,
    yet a missing one ends the load with "Missing key in checkpoint state_dict". Other missing keys still end it.
    """
    from nemo.lightning.io.pl import MegatronCheckpointIO

    replace(MegatronCheckpointIO, "load_checkpoint", _without_missing_extra_states)


def _without_missing_extra_states(load: Callable) -> Callable:
    def load_checkpoint(self: Any, path: Any, sharded_state_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge

        if sharded_state_dict is None:
            return load(self, path, sharded_state_dict, *args, **kwargs)
        missing, written = _part_extra_states(self._preprocess_checkpoint_load_path(path), sharded_state_dict)
        loaded = load(self, path, written, *args, **kwargs)
        return merge(loaded, dict_list_map_outplace(lambda item: item.data, missing))  # the model's own, untouched

    return load_checkpoint


def _part_extra_states(path: Any, sharded_state_dict: Any) -> tuple[Any, Any]:
    """The extra states that the checkpoint lacks, and everything else."""
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    # Of the checkpoint's metadata alone: no tensor is read for this.
    written = {item.key for item in load_sharded_metadata(str(path)).values()}

    def missing(item: Any) -> bool:
        return isinstance(item, ShardedObject) and item.key.endswith("_extra_state") and item.key not in written

    return extract_matching_values(sharded_state_dict, missing)


def free_gradients_at_once() -> None:
    """Let a weight's gradient give its memory back as soon as it was added to Megatron's buffer.

    NeMo 2.7.3 (`lightning/megatron_parallel.py`) wraps the model for data parallelism on a CUDA stream of its own, for
    the capture of whole iterations as CUDA graphs. The nodes that accumulate gradients stay on that stream, so PyTorch
    frees a gradient only when the GPU has reached it there: 2 to 8 GiB of reserved memory more than allocated when
    every parameter is trained (benchmarks/planner.py). Without such a capture, training's own stream does.
    """
    from nemo.lightning.megatron_parallel import MegatronParallel

    replace(MegatronParallel, "init_ddp", _on_the_stream_of_training)


def _on_the_stream_of_training(init_ddp: Callable[[Any], None]) -> Callable[[Any], None]:
    def init(self: Any) -> None:
        config = getattr(self[0], "config", None)
        # A capture needs the stream of its own that NeMo gives it.
        if not _on_gpu(self[0]) or getattr(config, "enable_cuda_graph", False):
            return init_ddp(self)
        with torch.cuda.stream(torch.cuda.default_stream()):
            return init_ddp(self)

    return init


def _on_gpu(module: torch.nn.Module) -> bool:
    """By the weights: a GPU's machine also trains on its CPU."""
    return any(each.is_cuda for each in module.parameters())


def wrap_without_room_for_two_copies() -> None:
    """Let weights wait in host memory while Megatron makes its buffers, where the GPU does not hold both.

    `_ParamAndGradBuffer` (megatron-core 0.15.3) allocates its copy of the weights and the gradients before it lets go
    of the weights: the peak of full-parameter training on 48 GB (45 of 47 GiB; 30 GiB with this patch).
    """
    from megatron.core.distributed import DistributedDataParallel

    replace(DistributedDataParallel, "__init__", _with_room)


def _with_room(init: Callable[..., None]) -> Callable[..., None]:
    def wrap(self: Any, config: Any, ddp_config: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if _on_gpu(module) and ddp_config.use_distributed_optimizer:
            move_to_host_without_room(module, 4 if ddp_config.grad_reduce_in_fp32 else 2, _free_gpu_bytes())
        init(self, config, ddp_config, module, *args, **kwargs)

    return wrap


def move_to_host_without_room(module: torch.nn.Module, grad_bytes: int, free: int) -> bool:
    """Move trainable weights to the host if a second copy of them and their gradients exceed `free` bytes.

    Megatron copies them into its buffer on the GPU, and the host's memory is free again.
    """
    # Plain tensors: Transformer Engine's fp8 weights are objects whose data cannot simply be moved.
    trainable = [each for each in module.parameters() if each.requires_grad and type(each.data) is torch.Tensor]
    if sum(each.numel() * (each.element_size() + grad_bytes) for each in trainable) <= free:
        return False
    for each in trainable:
        each.data = each.data.to("cpu", copy=True)
    # Else PyTorch keeps the freed blocks, in pieces that the one large buffer does not fit into.
    torch.cuda.empty_cache()
    return True


def _free_gpu_bytes() -> int:
    """What PyTorch may still allocate: of the card, and of the share that the process was given, less what is spared.

    As much is spared as by `planning.fit`, so that the wrapping is not the peak that another process would feel.
    """
    free, total = torch.cuda.mem_get_info()
    # What PyTorch holds in reserve counts as used for the driver, and is free for us.
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    allowed = total * torch.cuda.get_per_process_memory_fraction()
    return int(min(free, allowed - torch.cuda.memory_allocated()) - MEMORY_MARGIN * allowed)


def accumulate_gradients_without_apex() -> None:
    """Let `gradient_accumulation_fusion=True` work with Transformer Engine alone.

    Megatron Core 0.15.3 (`core/tensor_parallel/layers.py`) adds the output layer's gradient to its buffer within the
    matrix product by a CUDA extension of Apex, and refuses the setting without it, for Transformer Engine's layers too,
    which need no Apex. Transformer Engine's own product does the same for the output layer.
    """
    from megatron.core.tensor_parallel import layers

    if find_spec("transformer_engine") is None or layers._grad_accum_fusion_available:
        return
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=_add_weight_gradient, wgrad_gemm_accum_fp16=_add_weight_gradient
    )
    # Megatron asks this name, which it sets at its import.
    layers._grad_accum_fusion_available = True


def _add_weight_gradient(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_output [n, out] transposed @ inputs [n, in], summed in main_grad's dtype."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(inputs, grad_output, out_dtype=main_grad.dtype, accumulate=True, layout="NT", out=main_grad, grad=True)


def allocate_unread_gradients_first() -> None:
    """Allocate what fused gradient accumulation hands to autograd before the first activations, not among them.

    Transformer Engine 2.11 (`module/base.py`) makes a tensor for each shape of a weight, which nobody reads, at its
    first backward pass and keeps it. The output layer's then lies where the logits were, and the next logits find no
    room: 1.6 GiB of the 80 GB recipe and 3.5 GiB of the 48 GB recipe were reserved beyond what was allocated.
    """
    from megatron.core.distributed import DistributedDataParallel

    if find_spec("transformer_engine") is not None:
        replace(DistributedDataParallel, "__init__", _with_unread_gradients)


def _with_unread_gradients(init: Callable[..., None]) -> Callable[..., None]:
    def wrap(self: Any, config: Any, ddp_config: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        from transformer_engine.pytorch.module.base import get_dummy_wgrad

        init(self, config, ddp_config, module, *args, **kwargs)
        if config.gradient_accumulation_fusion and _on_gpu(module):
            for weight in module.parameters():
                # As Transformer Engine caches them: one a shape, whatever the number of layers.
                if weight.requires_grad and weight.ndim == 2:
                    get_dummy_wgrad(list(weight.main_grad.shape), weight.dtype)

    return wrap


def resume_with_precision_aware_states() -> None:
    """Let a training with `use_precision_aware_optimizer=True` go on from its checkpoint.

    `DistributedOptimizer` (megatron-core 0.15.3) marks what it reads as padding or not, and hands that mark to
    Transformer Engine's Adam as if it were a state: "'bool' object has no attribute 'dtype'".
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", _without_padding)


def _without_padding(set_states: Callable[..., None]) -> Callable[..., None]:
    def set_tensors(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {name: value for name, value in tensors.items() if name != "padding"})

    return set_tensors


def keep_tokens_that_equal_padding() -> None:
    """Let a dataset give the tokens that its file holds where the tokenizer's padding token is one of them.

    `GPTDataset` (megatron-core 0.15.3, `core/datasets/gpt_dataset.py`) takes every token equal to `tokenizer.pad` for
    padding: it writes token 0 over it and masks its loss, in the first sample within the mask that all later ones
    share. Where a base pads with its end of text (SmolLM2-Instruct, many fine-tunes), no document has an end any more.
    Tokenized text holds no padding; what the dataset itself would pad with is -1, as without a tokenizer's.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset

    replace(GPTDataset, "__init__", _with_padding_of_no_token)


def _with_padding_of_no_token(init: Callable[..., None]) -> Callable[..., None]:
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        from megatron.core.datasets.gpt_dataset import _PAD_TOKEN_ID

        init(self, *args, **kwargs)
        # After the constructor, which takes the tokenizer's; -1 is no token's id.
        self._pad_token_id = _PAD_TOKEN_ID

    return build


def keep_indices_by_content() -> None:
    """Keep a dataset's index for the content that it was built from, whole or not at all.

    Megatron Core 0.15.3 (`core/datasets/gpt_dataset.py`, `blended_dataset.py`) names index files by the data's path, so
    that data which were made again are read through the index of the old ones; it takes any file that exists for a
    whole one, also what a killed or another job has half written; and it cannot train on a read-only file system. How a
    blend takes turns follows from its weights (0.1 s a million sequences) and is not kept.
    """
    from megatron.core.datasets import blended_dataset, gpt_dataset

    replace(gpt_dataset.GPTDataset, "_build_document_sample_shuffle_indices", _in_index_cache)
    replace(blended_dataset.BlendedDataset, "_build_indices", _in_memory)
    for module in (gpt_dataset, blended_dataset):
        module.logger.addFilter(_is_no_complaint_about_the_cache)


def _in_index_cache(build: Callable[..., Any]) -> Callable[..., Any]:
    def load_or_build(self: Any) -> Any:
        if self.config.mock:
            return build(self)
        return index_cache.load_or_build(self, functools.partial(_in_memory(build), self))

    return load_or_build


def _in_memory(build: Callable[..., Any]) -> Callable[..., Any]:
    def build_in_memory(self: Any) -> Any:
        # On a copy: the configuration is shared by the datasets of a blend.
        config, self.config = self.config, copy.copy(self.config)
        self.config.path_to_cache = ""  # Megatron's word for: nowhere, and by every process
        try:
            return build(self)
        finally:
            self.config = config

    return build_in_memory


def _is_no_complaint_about_the_cache(record: logging.LogRecord) -> bool:
    return "because path_to_cache is None" not in record.getMessage()


def multiply_shapes_with_numpy_2() -> None:
    """Let several processes load a checkpoint under NumPy 2.

    Megatron Core 0.15.3 asks for NumPy 1 and calls `np.product`, which NumPy 2 has no more, where a checkpoint's parts
    are shared out for loading (`core/dist_checkpointing/exchange_utils.py`) and where flattened ones are checked
    (`mapping.py`, `validation.py`). These three modules are given a NumPy that has it; NumPy itself stays as it is. No
    other name that NumPy 2 dropped is left in Megatron Core or in what NeMo 2.7.3 trains with.
    """
    from megatron.core.dist_checkpointing import exchange_utils, mapping, validation

    for module in (exchange_utils, mapping, validation):
        if not hasattr(module.np, "product"):
            # In these modules' own namespace: NumPy itself may not be changed for everybody.
            module.np = _NumpyWithProduct()


class _NumpyWithProduct:
    product = staticmethod(numpy.prod)

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy, name)


def write_one_checkpoint_at_a_time() -> None:
    """Let an asynchronous save wait for the one before it.

    NeMo 2.7.3 (`utils/callbacks/dist_ckpt_io.py`) starts a save whatever is still being written: each takes a copy of
    its own in host memory, and what the writers report, in one queue, goes to whichever save is finished first.
    """
    from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

    replace(AsyncFinalizableCheckpointIO, "save_checkpoint", _after_the_one_before)


def _after_the_one_before(save: Callable[..., None]) -> Callable[..., None]:
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        self.maybe_finalize_save_checkpoint(blocking=True)
        save(self, *args, **kwargs)

    return save_checkpoint


def keep_staged_copies_until_written() -> None:
    """Keep the copy that an asynchronous save is written from until it is written.

    `TemporalAsyncCaller` (megatron-core 0.15.3, `core/dist_checkpointing/strategies/async_utils.py`) copies a
    checkpoint into pinned memory, forks the writer and lets go of the copy. A fork shares pinned memory instead of
    copying it, and PyTorch gives what was let go of to the next who asks, a data loader's batch or the next save: the
    writer then writes theirs. Later versions keep it too (Megatron-LM's pull request 2288).
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

    replace(TemporalAsyncCaller, "schedule_async_call", _keeping_its_copy)
    replace(TemporalAsyncCaller, "close", _letting_go_of_its_copy)


def _keeping_its_copy(schedule: Callable[..., None]) -> Callable[..., None]:
    def schedule_async_call(self: Any, request: Any) -> None:
        def stage() -> Any:
            self.staged = request.preload_fn()
            return self.staged

        schedule(self, request._replace(preload_fn=stage) if request.preload_fn else request)

    return schedule_async_call


def _letting_go_of_its_copy(close: Callable[..., None]) -> Callable[..., None]:
    def close_and_let_go(self: Any, *args: Any, **kwargs: Any) -> None:
        close(self, *args, **kwargs)
        self.staged = None

    return close_and_let_go


def report_writes_as_bytes() -> None:
    """Pass on what a checkpoint's writers report without reading it.

    Megatron Core 0.15.3 (`core/dist_checkpointing/strategies/filesystem_async.py`) keeps the reports in a process of
    their own, which unpickles them and imports PyTorch for that: on each rank 2 s of the first save, and 265 MB of the
    host's memory until the end.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    replace(filesystem_async, "_get_write_results_queue", _of_bytes)


def _of_bytes(get_queue: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: _Reports(get_queue())


class _Reports:
    """The part of a queue that Megatron uses; what is in the queue itself is bytes."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, report: Any) -> None:
        self._queue.put(pickle.dumps(report))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def end_without_moving_to_the_host() -> None:
    """Leave weights and optimizer states where they are when a training ends.

    Lightning 2.4 (`pytorch/strategies/strategy.py`, `Strategy.teardown`) moves both to the host's memory, where the
    copy of the last asynchronous checkpoint still is: the peak of the whole run, 100 of 234 GiB for the 8B model on
    four GPUs, and 10 s, for a process that is about to end.
    """
    from nemo.lightning.pytorch.strategies import MegatronStrategy

    replace(MegatronStrategy, "teardown", _without_moving)


def _without_moving(teardown: Callable[[Any], None]) -> Callable[[Any], None]:
    def leave(self: Any) -> None:
        module, optimizers = self._lightning_module, self.optimizers
        self._lightning_module, self.optimizers = None, []  # what Lightning does not see it does not move
        try:
            teardown(self)
        finally:
            self._lightning_module, self.optimizers = module, optimizers

    return leave
