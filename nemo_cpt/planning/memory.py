"""The peak memory of each pipeline stage's GPU, as parts that add up, and of each node's host.

The activations are those that Megatron Core 0.15.3 with Transformer Engine 2.11 keeps, read from records of PyTorch's
allocator (`python benchmarks/planner.py measure tune --trace`), byte for byte; Korthikanti et al. (arXiv 2205.05198)
derive the same sum for an older layer. What cannot be derived, Transformer Engine's workspaces and CUDA's context, is
the measured constant. docs/planning.md compares predictions with measurements.
"""

import dataclasses
import itertools
from math import inf, lcm

from nemo_cpt.constants import ADAM_SLICE_ELEMENTS
from nemo_cpt.planning.hardware import GIB
from nemo_cpt.planning.workload import Workload
from nemo_cpt.rounding import rounded_up

WORKSPACES = 99 * 2**20  # of cuBLAS, PyTorch's and Transformer Engine's, on one H200
CONTEXT = int(2.055 * GIB)  # CUDA's context and the kernels loaded, beside what PyTorch reserves
COMPILED_LOSS = int(0.39 * GIB)  # more of them where the loss is compiled by torch.compile ("native")
NCCL = {"data": int(0.47 * GIB), "tensor": int(0.85 * GIB), "pipeline": int(1.38 * GIB), "context": int(1.1 * GIB)}
"""NCCL's buffers, beside the context, by the kind of parallelism (two H200 of one host)."""
PINNED_SHARE = 0.0016  # of pinned host memory, for the GPU's page tables
FRAGMENTATION = 0.02  # of what is allocated; measured 0.1 to 1 % without, 0.5 to 5 % with recomputation
ALIGNMENT = 64  # elements: where Megatron's buffers let a parameter start
PROCESS_HOST = int(2.5 * GIB)  # of a training process on the host (measured peak: 2.3 to 2.5 GiB)
WORKER_HOST = int(0.8 * GIB)  # of each of its data workers
RESULTS_HOST = int(0.25 * GIB)  # of the process that holds what its checkpoint's writers report
LAUNCHER_HOST = int(0.5 * GIB)  # of the command and the supervisor that started them


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """One GPU of a pipeline stage, at the moment of its peak.

    Attributes:
        stage: of the pipeline, from 0.
        moment: when the peak is: "loss", "backward", "optimizer step" or "initialisation".
        parts: bytes by what they are for; they add up to `total`.
    """

    stage: int
    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes on the card, with CUDA's context."""
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """Bytes that PyTorch's allocator has taken: without CUDA's context."""
        return self.total - self.parts["CUDA context"]

    @property
    def allocated(self) -> int:
        """Bytes that PyTorch has allocated: without fragmentation and CUDA's context."""
        return self.reserved - self.parts["fragmentation"]


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """A node's memory.

    Attributes:
        parts: bytes by what they are for.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def stages(work: Workload, room: float = inf) -> list[StageMemory]:
    """Return the peak of every pipeline stage; GPUs of one stage are alike. `room`: see `stage_memory`."""
    return [stage_memory(work, stage, room) for stage in range(work.pipeline_model_parallel_size)]


def stage_memory(work: Workload, stage: int, room: float = inf) -> StageMemory:
    """Return the peak of one stage: the largest of its four moments.

    The loss (activations of all micro batches in flight, and the logits), the backward pass of one layer (after its
    recomputation, where it is recomputed), the optimizer's step, and the initialisation (weights and their copies in
    Megatron's buffers at once, where `room`, the bytes that a job takes of the card, holds them: else the weights wait
    on the host, see `patches.wrap_without_room_for_two_copies`).
    """
    resident = resident_bytes(work, stage)
    moments = {
        "loss": resident | _loss(work, stage),
        "backward": resident | _backward(work, stage),
        "optimizer step": resident | {"optimizer's temporaries": _optimizer_temporaries(work, stage)},
        "initialisation": _initialisation(work, stage, room),
    }
    # One peak, not the sum of the largest parts: what is alive at another moment is not alive at this one.
    moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    parts = {name: size for name, size in parts.items() if size}
    # Without the context, which is not PyTorch's to fragment.
    fragmentation = int(FRAGMENTATION * sum(parts.values()))
    return StageMemory(stage, moment, parts | {"fragmentation": fragmentation, "CUDA context": _context(work, stage)})


def resident_bytes(work: Workload, stage: int) -> dict[str, int]:
    """Return what stays on the GPU from step to step: weights, gradients, states, adapters, workspaces."""
    frozen = work.lora_rank is not None
    elements = stage_parameters(work, stage)
    adapters = adapter_parameters(work, stage)
    whole = whole_parameters(work, stage)
    trained_bytes = adapters * work.weight_bytes + (adapters + whole) * work.grad_bytes
    # Frozen weights are in no buffer of Megatron's, and not padded.
    weights = elements if frozen else buffer_elements(work, stage)
    return {
        "weights": _weight_bytes(work, stage, weights),
        "fp8 copies of weights": 2 * _linear_elements(work, stage) if work.fp8 and not work.fp8_param else 0,
        "gradients": 0 if frozen else weights * work.grad_bytes,
        # Padding has no states.
        "optimizer": 0 if frozen else elements * state_bytes(work) // work.optimizer_shards,
        "adapters": trained_bytes + (adapters + whole) * state_bytes(work) // work.optimizer_shards,
        "unused gradients": _dummy_gradients(work, stage),
        "workspaces": WORKSPACES,
    }


def stage_parameters(work: Workload, stage: int) -> int:
    """Return the parameters on one GPU of a stage, without adapters: linear layers cut by tensor parallelism.

    The embedding is on the first stage, the output layer on the last: tied, it is the embedding's copy there.
    """
    return sum(_parameter_sizes(work, stage))


def _parameter_sizes(work: Workload, stage: int) -> list[int]:
    """Elements of each parameter of a stage's GPU, in the model's order."""
    tensor, hidden = work.tensor_model_parallel_size, work.hidden_size
    linear = {name: size_in * size_out // tensor for name, (size_in, size_out) in work.widths.items()}
    bias = [work.widths["linear_qkv"][1] // tensor] if work.qkv_bias else []
    norms = 2 * [work.kv_channels] if work.qk_norm else []
    attention = [linear["linear_proj"], *norms, hidden, linear["linear_qkv"], *bias]
    layer = [*attention, hidden, linear["linear_fc1"], linear["linear_fc2"]]
    vocabulary = work.vocab_size * hidden // tensor
    first, last = stage == 0, stage == work.last_stage
    sizes = ([vocabulary] if first else []) + layer * work.stage_layers
    if last:
        sizes.append(hidden)
    # Tied, one stage has one matrix; the last of several has a copy of the first's.
    if last and not (work.tied and first):
        sizes.append(vocabulary)
    return sizes


def buffer_elements(work: Workload, stage: int) -> int:
    """Return the elements of Megatron's buffers for weights and for gradients, with their padding.

    `_ParamAndGradBuffer` (megatron-core 0.15.3) starts each parameter at a multiple of 64 elements and ends a bucket
    at a multiple of 128 and of the ranks; without the distributed optimizer nothing is padded.
    """
    sizes = _parameter_sizes(work, stage)
    if not work.distributed_optimizer:
        return sum(sizes)
    # Each rank gets an equal part of a bucket.
    divisor = lcm(128, work.optimizer_shards)
    return rounded_up(sum(rounded_up(size, ALIGNMENT) for size in sizes), divisor)


def adapter_parameters(work: Workload, stage: int) -> int:
    """Return the adapters' parameters on one GPU of a stage: both of an adapter's matrices are cut."""
    share = work.tensor_model_parallel_size * work.pipeline_model_parallel_size
    return work.adapter_parameters // share


def whole_parameters(work: Workload, stage: int) -> int:
    """Return the elements of the embedding and the output layer on one GPU, where they are trained beside adapters."""
    if not work.trained_embeddings:
        return 0
    first, last = stage == 0, stage == work.last_stage
    count = first + (last and not (work.tied and first))
    return count * work.vocab_size * work.hidden_size // work.tensor_model_parallel_size


def trained_parameters(work: Workload, stage: int) -> int:
    """Return the parameters on one GPU of a stage that the optimizer steps."""
    if work.lora_rank is None:
        return stage_parameters(work, stage)
    return adapter_parameters(work, stage) + whole_parameters(work, stage)


def state_bytes(work: Workload) -> int:
    """Return the optimizer's bytes a parameter on the GPU: master weight and two moments, less those on the host."""
    on_gpu = sum(work.states.values()) - work.host_state_bytes
    return round(on_gpu * (1 - work.optimizer_offload_fraction))


def _weight_bytes(work: Workload, stage: int, elements: int) -> int:
    """Weights; in fp8 those of linear layers take a byte, and another for the transpose that Hopper multiplies by."""
    if not work.fp8_param:
        return elements * work.weight_bytes
    linear = _linear_elements(work, stage)
    return (elements - linear) * work.weight_bytes + 2 * linear


def _linear_elements(work: Workload, stage: int) -> int:
    """Elements of the layers' linear weights, which Transformer Engine multiplies in fp8; not the output layer."""
    return work.stage_layers * work.linear_parameters // work.tensor_model_parallel_size


def _dummy_gradients(work: Workload, stage: int) -> int:
    """Fused accumulation hands autograd a gradient that nobody reads: one for each shape of a weight, for good."""
    if not work.fused_gradients or work.lora_rank is not None:
        return 0
    shapes = [i * o for i, o in work.widths.values()]
    if stage == work.last_stage:
        shapes.append(work.vocab_size * work.hidden_size)
    return sum(shapes) // work.tensor_model_parallel_size * work.weight_bytes


def layer_bytes_per_token(work: Workload) -> float:
    """Return what one layer keeps for its backward pass, in bytes a token, without recomputation.

    For hidden size h, queries q, keys and values k, MLP f, over t tensor-parallel GPUs, in bf16: both norms' outputs
    and both sums with the residual 2(2h + 2h), rotated queries and keys, values, attention's output 2(2q + 2k)/t, the
    MLP's first output and its activation 2(2f + f)/t; attention's log-sum-exp 4/t a head and the norms' 8 in fp32.
    """
    dtype, tensor = work.weight_bytes, work.tensor_model_parallel_size
    hidden, attention, wide = work.hidden_size, work.query_size + work.kv_size, work.widths["linear_fc1"][1]
    # Only sequence parallelism cuts what lies between the parallel layers.
    residual = hidden / (tensor if work.sequence_parallel else 1)
    kept = 2 * residual * dtype + 2 * attention / tensor * dtype + wide / tensor * dtype
    kept += 4 * work.num_attention_heads / tensor + 8
    if work.qk_norm:  # what they normalise, before it is rotated, and a number a head; not measured
        heads = work.num_attention_heads + work.num_query_groups
        kept += (attention * dtype + 4 * heads) / tensor
    return kept + _inputs_of_linear(work, residual) + _adapters_keep(work) + _selective(work)


def _inputs_of_linear(work: Workload, residual: float) -> float:
    """Norms' outputs and the activation, as the linear layers keep them: for the weight's gradient, or an adapter's."""
    tensor, dtype = work.tensor_model_parallel_size, work.weight_bytes
    activation = work.ffn_hidden_size / tensor
    if work.recompute_outputs and not work.fp8:
        # What was gathered for the adapters is a copy, and stays.
        gathered = work.lora_rank is not None and work.sequence_parallel
        return _gathered_for_adapters(work) if gathered else 0.0
    if work.lora_rank is None:
        # fp8 keeps the inputs as it multiplied them, in a byte.
        return (2 * residual + activation) * (1 if work.fp8 else dtype)
    kept = _gathered_for_adapters(work)
    kept += activation * dtype if "linear_fc2" in work.lora_targets else 0
    if work.sequence_parallel:  # what was gathered for the adapters lies beside the part that it was gathered from
        kept += 2 * residual * dtype
    return kept + (2 * residual if work.fp8 else 0)


def _gathered_for_adapters(work: Workload) -> float:
    """Norms' outputs, whole, as the adapters of the layers behind them keep them."""
    behind_norms = [name for name in ("linear_qkv", "linear_fc1") if name in work.lora_targets]
    return float(len(behind_norms) * work.hidden_size * work.weight_bytes)


def recomputed_outputs_per_token(work: Workload) -> float:
    """Return the bytes a token that one layer's norms and activation give back until the backward pass."""
    if not work.recompute_outputs:
        return 0.0
    return layer_bytes_per_token(work.replace(recompute_outputs=False)) - layer_bytes_per_token(work)


def _adapters_keep(work: Workload) -> float:
    """The low-rank side of each adapter; DoRA's outputs before its scale; a dropout's result and mask."""
    if work.lora_rank is None:
        return 0.0
    dtype, tensor = work.weight_bytes, work.tensor_model_parallel_size
    widths = [work.widths[name] for name in work.lora_targets]
    kept: float = len(widths) * work.lora_rank * dtype
    if work.dora:
        kept += sum(size_out for _, size_out in widths) / tensor * dtype
    if work.lora_dropout:
        kept += sum(size_in for size_in, _ in widths) * (dtype + 1)
    return kept


def _selective(work: Workload) -> float:
    """What selective recompute adds or saves: attention's inputs are kept before the rotation's copies, its LSE not."""
    if work.recompute != "selective":
        return 0.0
    dtype, tensor = work.weight_bytes, work.tensor_model_parallel_size
    change = 0.0
    if "core_attn" in work.recompute_modules:
        change += (work.query_size + work.kv_size) / tensor * dtype - 4 * work.num_attention_heads / tensor
    if "mlp" in work.recompute_modules:
        change -= work.widths["linear_fc1"][1] / tensor * dtype
        if not work.recompute_outputs:  # which had dropped these already
            change -= work.ffn_hidden_size / tensor * dtype + work.hidden_size * dtype
    return change


def in_flight(work: Workload, stage: int) -> float:
    """Return the micro batches whose activations a stage holds at once, in units of the whole stage.

    One forward, one backward: pipeline stages - stage. Interleaved (Narayanan et al., arXiv 2104.04473): a stage's v
    chunks warm up 2 (stages - stage - 1) + (v - 1) stages, and one more is running.
    """
    stages_, chunks = work.pipeline_model_parallel_size, work.virtual_pipeline_model_parallel_size
    # Never more than there are micro batches.
    if chunks == 1:
        return min(stages_ - stage, work.micro_batches)
    warm_up = 2 * (stages_ - stage - 1) + (chunks - 1) * stages_
    return min(warm_up + 1, work.micro_batches * chunks) / chunks


def activation_bytes(work: Workload, stage: int) -> int:
    """Return what a stage keeps of one micro batch: its layers, the inputs of recomputed ones, its own input."""
    layers = work.stage_layers
    recomputed = work.recomputed(layers)
    hidden = _hidden_bytes(work)
    # A recomputed group keeps its input alone.
    inputs = -(-recomputed // work.recomputed_at_once)
    # Recomputed layers keep nothing but their group's input.
    kept = (layers - recomputed) * layer_bytes_per_token(work) * work.tokens + inputs * hidden
    ends = 2 if stage == work.last_stage else 1  # the stage's input; the last norm's output
    if stage == 0 and work.lora_rank is not None and work.recompute != "none":
        ends += 2  # the embedding's output requires a gradient (patches.give_recomputed_layers_a_gradient)
    return int(kept + ends * hidden)


def _hidden_bytes(work: Workload) -> int:
    """One [tokens, hidden] tensor."""
    shards = work.tensor_model_parallel_size if work.sequence_parallel else 1
    return work.tokens * work.hidden_size * work.weight_bytes // shards


def _loss(work: Workload, stage: int) -> dict[str, int]:
    activations = int(in_flight(work, stage) * activation_bytes(work, stage))
    last = stage == work.last_stage
    return {"activations": activations, "logits and loss": logit_bytes(work) if last else 0}


def logit_bytes(work: Workload) -> int:
    """Return the logits and what is alive beside them at the loss's worst moment.

    Transformer Engine's loss works in place on the bf16 logits; the others hold two fp32 copies beside them. In the
    backward pass, with a trainable output layer, its gradient [vocabulary, hidden] and that of its input come instead.
    """
    loss = 0 if work.loss == "te" else 8 * work.logits
    backward = 0
    if work.trains_head:
        backward = work.tokens * work.hidden_size * work.weight_bytes
        if not work.fused_gradients:
            backward += work.vocab_size * work.hidden_size // work.tensor_model_parallel_size * work.weight_bytes
    return work.logits * work.weight_bytes + max(loss, backward)


def _backward(work: Workload, stage: int) -> dict[str, int]:
    """The backward pass of one layer, or of the layers that are recomputed at once.

    Beside the layer's own activations: the gradients of its output, of the residual and of the MLP's activation, and
    the gradient of its widest weight.
    """
    dtype, tensor = work.weight_bytes, work.tensor_model_parallel_size
    layers = work.stage_layers
    recomputed = work.recomputed(layers)
    activations = in_flight(work, stage) * activation_bytes(work, stage)
    if recomputed:
        # The backward pass runs from the last layer to the first: those that are not recomputed, behind the others in a
        # block, are done and freed when a recomputed one is at its peak.
        activations -= (layers - recomputed) * layer_bytes_per_token(work) * work.tokens
        activations += min(recomputed, work.recomputed_at_once) * layer_bytes_per_token(work) * work.tokens
    gradients = 2 * _hidden_bytes(work) + work.tokens * work.ffn_hidden_size // tensor * dtype
    if work.lora_rank is None and not work.fused_gradients:
        gradients += work.widths["linear_fc1"][0] * work.widths["linear_fc1"][1] // tensor * dtype
    if work.recompute_outputs:  # the MLP's activation is back
        gradients += work.tokens * work.ffn_hidden_size // tensor * dtype
    return {"activations": int(activations), "gradients of activations": gradients}


def _optimizer_temporaries(work: Workload, stage: int) -> int:
    """Adam's copies in fp32: of a slice's moments (patches.step_adam_in_slices), or of all bf16 gradients."""
    share = trained_parameters(work, stage) // work.optimizer_shards
    # Megatron's own Adam copies low-precision gradients to fp32 before the step.
    if not work.precision_aware:
        return 4 * share if work.grad_bytes < 4 else 0
    if work.exp_avg_bytes == work.exp_avg_sq_bytes == 4 or {"exp_avg", "exp_avg_sq"} <= set(work.host_states):
        return 0
    # A parameter is not cut: one larger than a slice is a slice of its own.
    largest = max(_parameter_sizes(work, stage)) // work.optimizer_shards
    return min(share, max(largest, ADAM_SLICE_ELEMENTS)) * (8 if work.fp8_moments else 10)


def _initialisation(work: Workload, stage: int, room: float) -> dict[str, int]:
    """Weights and their copies in Megatron's buffer at once, or the fp32 master weights being made."""
    resident = resident_bytes(work, stage)
    if work.lora_rank is not None:
        # Frozen weights are never copied into a buffer.
        return {"weights": resident["weights"], "adapters": resident["adapters"]}
    kept = {"weights": resident["weights"], "gradients": resident["gradients"]}
    with_copies = (sum(kept.values()) + resident["weights"]) * (1 + FRAGMENTATION) + _context(work, stage)
    # The distributed optimizer alone moves weights into a buffer of its own.
    copies = resident["weights"] if work.distributed_optimizer and with_copies <= room else 0
    masters = 0
    if not work.precision_aware and work.master_bytes:
        masters = stage_parameters(work, stage) * work.master_bytes // work.optimizer_shards
        masters += max(_parameter_sizes(work, stage)) * work.weight_bytes
    return kept | {"initialisation": max(copies, masters)}


def _context(work: Workload, stage: int) -> int:
    compiled = COMPILED_LOSS if work.loss == "native" and stage == work.last_stage else 0
    return CONTEXT + _nccl_bytes(work) + compiled + int(PINNED_SHARE * _pinned_bytes(work))


def _nccl_bytes(work: Workload) -> int:
    sizes = {
        "data": work.data_parallel,
        "tensor": work.tensor_model_parallel_size,
        "pipeline": work.pipeline_model_parallel_size,
        "context": work.context_parallel_size,
    }
    return sum(NCCL[kind] for kind, size in sizes.items() if size > 1)


def _pinned_bytes(work: Workload) -> int:
    """Adam's states of one GPU in pinned host memory."""
    if work.lora_rank is not None:
        return 0
    # Offloaded: weight, gradient and two moments, each in fp32.
    a_parameter = work.host_state_bytes + 16 * work.optimizer_offload_fraction
    return int(max(stage_parameters(work, s) for s in range(work.pipeline_model_parallel_size)) * a_parameter)


def host_memory(work: Workload) -> HostMemory:
    """Return a node's host memory: its processes, states kept there, and the copy that a checkpoint is written from.

    Megatron writes checkpoints from a copy in pinned host memory, asynchronously or not, whose memory PyTorch keeps for
    the next one; there are never two (patches.write_one_checkpoint_at_a_time). Measured: the copy of the whole 8B on
    four H200 125.3 GiB, 125.3 here, and of its first three layers on one 23.85, 23.84 here; the node with the former
    143, 143 here. States that are kept in host memory are written from there (`training/host_states.py`);
    benchmarks/host_states.py: 34.9 GiB of a process with 2.8 B parameters, 34.3 here.
    """
    # A job on part of a node has fewer processes there.
    processes = min(work.gpus, work.gpus_per_node)
    a_process = PROCESS_HOST + work.data_workers * WORKER_HOST + RESULTS_HOST
    return HostMemory(
        {
            "processes": LAUNCHER_HOST + a_process * processes,
            "optimizer states": _pinned_bytes(work) * processes // work.optimizer_shards,
            "checkpoint being written": _checkpoint_copy(work) * processes // work.gpus,
        }
    )


def _checkpoint_copy(work: Workload) -> int:
    """The pinned copy of what all GPUs save: each tensor rounded up to the power of two that PyTorch allocates.

    Weights; in fp32 moments and master weights (or what these have beyond the weights); of LoRA what is trained.
    """
    # What lives in host memory is written from there, without a copy.
    copied = [size for name, size in _saved_states(work).items() if name not in work.host_states]
    if work.lora_rank is not None:
        embeddings = work.embedding_parameters if work.trained_embeddings else 0
        widths = [work.weight_bytes, *copied]
        return sum(work.adapter_parameters * width + _pinned_size(embeddings * width) for width in widths)
    total = 0
    for stage in range(work.pipeline_model_parallel_size):
        total += sum(_pinned_size(size * work.weight_bytes) for size in _saved_sizes(work, stage))
        total += sum(_pinned_size(size * width) for size in _saved_pieces(work, stage) for width in copied)
    # Tensor-parallel ranks each save their part, all alike in size.
    return total * work.tensor_model_parallel_size


def checkpoint_bytes(work: Workload) -> int:
    """Return the bytes of a training checkpoint on the disk: what is trained, with the optimizer's states."""
    return work.trained_parameters * (work.weight_bytes + sum(_saved_states(work).values()))


def _saved_states(work: Workload) -> dict[str, int]:
    return {"exp_avg": 4, "exp_avg_sq": 4, "master_param": work.master_bytes or 4}


def _saved_sizes(work: Workload, stage: int) -> list[int]:
    """Elements of each parameter that a stage's GPU saves: not those of a tied output layer, which is the embedding."""
    sizes = _parameter_sizes(work, stage)
    return sizes[:-1] if work.tied and stage == work.last_stage > 0 else sizes


def _saved_pieces(work: Workload, stage: int) -> list[int]:
    """Elements of each piece of a parameter whose states are saved together.

    `_ParamAndGradBuffer` (megatron-core 0.15.3) fills buckets from the last parameter to the first, behind the first
    stage a single one, and gives each rank of the distributed optimizer an equal part of every bucket.
    """
    sizes, ranks = _saved_sizes(work, stage), work.optimizer_shards
    if not work.distributed_optimizer or ranks == 1:
        return sizes
    # Megatron's bucket size for overlapped communication.
    full = max(40_000_000, 1_000_000 * ranks) if stage == 0 else inf
    pieces: list[int] = []
    bucket: list[tuple[int, int]] = []
    end = 0
    for number, size in enumerate(reversed(sizes), start=1):
        start = rounded_up(end, ALIGNMENT)
        end = start + size
        bucket.append((start, end))
        if end >= full or number == len(sizes):
            part = rounded_up(end, lcm(128, ranks)) // ranks
            pieces += itertools.chain.from_iterable(_cut(*parameter, part) for parameter in bucket)
            bucket, end = [], 0
    return pieces


def _cut(start: int, end: int, part: int) -> list[int]:
    """The lengths of what multiples of `part` make of a range."""
    edges = [start, *range(rounded_up(start + 1, part), end, part), end]
    return [after - before for before, after in itertools.pairwise(edges)]


def _pinned_size(size: int) -> int:
    # The next power of two: PyTorch's pinned allocator rounds up to it.
    return 1 << (size - 1).bit_length() if size else 0
