"""Tokens a second and wall time: operations over measured rates, plus what crosses memory, host and links.

The rates were fitted to the settings of one H200 in benchmarks/planner.py, and tested on the recipes and on those of
several GPUs (docs/planning.md). Other GPUs are scaled by their data sheets' ceilings and were
not measured. Links between GPUs enter by volume and data-sheet bandwidth.
"""

from dataclasses import dataclass
from math import hypot

from nemo_cpt.errors import CptError
from nemo_cpt.planning.hardware import DEFAULT, Gpu
from nemo_cpt.planning.memory import (
    layer_bytes_per_token,
    recomputed_outputs_per_token,
    stage_parameters,
    trained_parameters,
    whole_parameters,
)
from nemo_cpt.planning.workload import Workload

BF16_RATE = 676e12  # operations a second of the linear layers' products on one H200
FP8_RATE = 1187e12  # the same with tensorwise scaling, with the inputs' casts
FP8_CAST_SECONDS = 10.8e-12  # a weight, cast once a step for all its micro batches
ATTENTION_RATE = 438e12  # of causal attention, of which half the square is counted
ACTIVATION_RATE = 1.26e12  # bytes of kept activations a second: norms, rotation, SwiGLU, residuals, both ways
GRADIENT_RATE = 4.5e12  # bytes a second of weights' gradients, added to Megatron's buffer
LAUNCH_SECONDS = 6.7e-3  # the host takes for the kernels of a layer and micro batch, both passes
OUTPUT_AGAIN = 1.15  # bytes of activations' traffic for a byte of a norm's or activation's output computed again
RECOMPUTED = 0.22  # of a layer's work beside products that its second forward pass repeats
ADAM_SECONDS = {4: 14.2e-12, 2: 25.6e-12}  # a parameter, by the bytes of its first moment, on the GPU
ADAM_FP8_SECONDS = 240e-12
ADAM_HOST_SECONDS = 25.8e-12  # a byte of pinned state, which is read and written across the bus
HOST_MEMORY_SECONDS = 10.6e-12  # a byte of it too, of all GPUs of a node: they share the host's memory
STEP_SECONDS = 10e-3  # a step's fixed part
NODE_LINK_GB_S = 50.0  # a GPU's share of the links between nodes: 400 Gb/s each
ERRORS = {
    1: "mean error 3 %, worst 9 % on one H200",
    2: "mean error 4 %, worst 10 % on two H200",
    4: "mean error 4 %, worst 13 % on four H200",
}
NOT_MEASURED = "scaled from an H200, not measured"
# Their GPUs wait for the host most of the time, whose speed is another machine's: docs/from-scratch.md has the 124M's.
SMALL, SMALL_ERROR = 800_000_000, "below 1B steps are bound by the host: the 124M's were a quarter shorter on one H200"


@dataclass(frozen=True)
class Speed:
    """How long a step takes.

    Attributes:
        seconds: of a step, by what they are for; they add up.
        tokens_per_step: of the global batch.
        gpus: over all of which the step runs.
        model_tflops: 1e12 model operations a second and GPU: recomputation and frozen weights' gradients not counted.
        error: how far to trust it.
    """

    seconds: dict[str, float]
    tokens_per_step: int
    gpus: int
    model_tflops: float
    error: str

    @property
    def step_seconds(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, over all GPUs."""
        return self.tokens_per_step / self.step_seconds

    def hours(self, tokens: float) -> float:
        """Hours for a number of tokens, without start-up, validation and checkpoints."""
        return tokens / self.tokens_per_second / 3600


def speed(work: Workload, gpu: Gpu = DEFAULT) -> Speed:
    """Return the speed of a workload on GPUs of one kind.

    Raises:
        CptError: it multiplies in fp8, which this kind cannot.
    """
    if work.fp8 and not gpu.fp8:
        raise CptError(f"the {gpu.name} has no fp8 products: train with precision=bf16, or on an Ada or Hopper card")
    tensor_parallel = _tensor_parallel_seconds(work, gpu)
    micro_batch = _micro_batch_seconds(work, gpu)
    micro_batch += _waiting_for_launches(work, micro_batch + tensor_parallel)
    # In micro batches: stages - 1 of them pass before the last stage has work, v times shorter with v chunks.
    bubble = (work.pipeline_model_parallel_size - 1) / work.virtual_pipeline_model_parallel_size
    seconds = {
        # Each rank's own: data-parallel ranks work at once.
        "forward and backward": work.micro_batches * micro_batch,
        "pipeline bubble": bubble * micro_batch,
        "tensor parallel": work.micro_batches * tensor_parallel,
        "fp8 weights": _fp8_weights_seconds(work, gpu),
        "data parallel": _data_parallel_seconds(work, gpu),
        "optimizer": _optimizer_seconds(work, gpu),
    }
    seconds = {name: each for name, each in seconds.items() if each}
    step = sum(seconds.values())
    tflops = work.tokens_per_step * model_flops_per_token(work) / step / work.gpus / 1e12
    error = ERRORS.get(work.gpus, f"{work.gpus} GPUs were not measured")
    if work.parameters < SMALL:
        error = SMALL_ERROR
    return Speed(seconds, work.tokens_per_step, work.gpus, tflops, error if gpu.measured else NOT_MEASURED)


def model_flops_per_token(work: Workload) -> float:
    """Return the model's operations a token, forward and backward, as papers count them (arXiv 2204.02311, app. B).

    Recomputation is not counted, nor the gradients of frozen weights; of attention half the square.
    """
    layers = (4 if work.lora_rank else 6) * work.num_layers * work.linear_parameters
    head = (6 if work.trains_head else 4) * work.vocab_size * work.hidden_size
    # Two products, of queries with keys and of weights with values, 2 operations a value, over half the square; three
    # times that with the backward pass, which has two for each.
    attention = 3 * 2 * work.num_layers * work.seq_length * work.query_size
    return layers + head + attention + 6 * work.adapter_parameters


def _micro_batch_seconds(work: Workload, gpu: Gpu) -> float:
    """Forward and backward of one micro batch on the slowest stage: the last, which has the output layer too."""
    # How many times slower than the H200, on which the rates were measured.
    compute, memory = DEFAULT.bf16_tflops / gpu.bf16_tflops, DEFAULT.bandwidth_tb_s / gpu.bandwidth_tb_s
    layers, head, attention = _operations(work)
    # The output layer stays in bf16 under fp8.
    seconds = compute * (layers / (FP8_RATE if work.fp8 else BF16_RATE) + head / BF16_RATE + attention / ATTENTION_RATE)
    seconds += memory * _activation_traffic(work) / ACTIVATION_RATE
    return seconds + memory * _gradient_traffic(work) / GRADIENT_RATE


def _waiting_for_launches(work: Workload, busy: float) -> float:
    """How long a GPU that has `busy` seconds of work in a micro batch waits for the host to launch it.

    A layer takes the larger of its work and its launches, rounded off where they are alike: the square root of the sum
    of their squares. So a GPU waits where its share of a layer is small: in short sequences, small or cut layers.
    """
    layers = work.stage_layers + RECOMPUTED * work.recomputed(work.stage_layers)
    return layers * (hypot(busy / layers, LAUNCH_SECONDS) - busy / layers)


def _operations(work: Workload) -> tuple[float, float, float]:
    """Operations of a micro batch on one GPU: linear layers; output layer and adapters; attention."""
    layers = work.stage_layers
    # Forward and the inputs' gradients; the weights' own where they are trained.
    again, passes = work.recomputed(layers), 2 if work.lora_rank else 3
    tokens = work.tokens / work.tensor_model_parallel_size
    # A multiplication and an addition for each weight and token.
    products = 2 * work.linear_parameters * tokens * (layers * passes + again)
    adapters = work.adapter_parameters / work.num_layers * 2 * tokens * (3 * layers + again)
    if work.dora:  # the norm of weight + product of the adapter's matrices, each time
        adapters += 2 * (work.lora_rank or 0) * work.linear_parameters * layers * 2
    head = 2 * work.vocab_size * work.hidden_size * tokens * (3 if work.trains_head else 2)
    # Flash attention's backward costs 2.5 times its forward.
    attention_again = layers if work.recompute == "selective" and "core_attn" in work.recompute_modules else again
    attention = 2 * tokens * work.seq_length * work.query_size * (3.5 * layers + attention_again)
    return products, head + adapters, attention


def _activation_traffic(work: Workload) -> float:
    """Bytes of activations of a micro batch, by the count of what is kept, and of the logits."""
    layers = work.stage_layers
    # Outputs that are computed again were written and read before, too.
    kept = layer_bytes_per_token(work.replace(recompute="none", recompute_outputs=False)) * work.tokens
    traffic = kept * (layers + RECOMPUTED * work.recomputed(layers))
    traffic += OUTPUT_AGAIN * recomputed_outputs_per_token(work) * work.tokens * layers
    if work.dora:
        traffic += 12 * layers * work.linear_parameters / work.tensor_model_parallel_size
    if work.lora_rank and work.tensor_model_parallel_size > 1:  # patches.add_lora_in_one_pass leaves these alone
        outputs = sum(work.widths[name][1] for name in work.lora_targets) / work.tensor_model_parallel_size
        traffic += 8 * layers * outputs * work.tokens * work.weight_bytes
    if work.lora_rank and work.fp8:  # the adapters cast their inputs once more
        traffic += 4 * layers * sum(work.widths[name][0] for name in work.lora_targets) * work.tokens
    return traffic + work.logits * (6 if work.loss == "te" else 20)


def _gradient_traffic(work: Workload) -> float:
    """Bytes of the weights' gradients of a micro batch: added within the product, or written, read and added."""
    summed = (
        stage_parameters(work, work.last_stage) if work.lora_rank is None else whole_parameters(work, work.last_stage)
    )
    written = 0 if work.fused_gradients else 2 * work.weight_bytes
    return summed * (2 * work.grad_bytes + written)


def _fp8_weights_seconds(work: Workload, gpu: Gpu) -> float:
    """The linear layers' weights cast to fp8, where they are kept in bf16."""
    if not work.fp8:
        return 0.0
    memory = DEFAULT.bandwidth_tb_s / gpu.bandwidth_tb_s
    return memory * work.stage_layers * work.linear_parameters / work.tensor_model_parallel_size * FP8_CAST_SECONDS


def _tensor_parallel_seconds(work: Workload, gpu: Gpu) -> float:
    """Four all-reduces a layer and micro batch (two forward, two backward; Shoeybi et al., arXiv 1909.08053)."""
    size, layers = work.tensor_model_parallel_size, work.stage_layers
    # A ring all-reduce sends each byte twice, less its own part.
    volume = 2 * (size - 1) / size * work.tokens * work.hidden_size * work.weight_bytes
    count = 4 * layers + 2 * work.recomputed(layers)
    return count * volume / _link(work, gpu, size)


def _data_parallel_seconds(work: Workload, gpu: Gpu) -> float:
    """Gradients reduced and weights gathered once a step; half of it is hidden behind the backward pass."""
    shards = work.data_parallel * work.context_parallel_size
    if shards == 1:
        return 0.0
    trained = trained_parameters(work, 0)
    volume = (shards - 1) / shards * trained * (work.grad_bytes + work.weight_bytes)
    exposed = 0.5 if work.overlap_grad_reduce else 1.0
    return exposed * volume / _link(work, gpu, work.gpus)


def _link(work: Workload, gpu: Gpu, span: int) -> float:
    """Bytes a second each way between GPUs of a group that spans `span` of them: within the node, or between nodes."""
    return (gpu.link_gb_s if span <= work.gpus_per_node else NODE_LINK_GB_S) * 1e9


def _optimizer_seconds(work: Workload, gpu: Gpu) -> float:
    trained = trained_parameters(work, 0) / work.optimizer_shards
    if work.host_states:
        state_bytes = trained * work.host_state_bytes
        node = min(work.gpus, work.gpus_per_node)
        return max(state_bytes * ADAM_HOST_SECONDS, node * state_bytes * HOST_MEMORY_SECONDS) + STEP_SECONDS
    memory = DEFAULT.bandwidth_tb_s / gpu.bandwidth_tb_s
    fp8_moments = work.precision_aware and work.fp8_moments
    a_parameter = ADAM_FP8_SECONDS if fp8_moments else ADAM_SECONDS[work.exp_avg_bytes]
    return trained * a_parameter * memory + STEP_SECONDS
