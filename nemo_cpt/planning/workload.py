"""What a recipe asks of the GPUs, in plain numbers: all that the planner needs of it."""

import dataclasses
from typing import Any, Literal

from nemo_cpt.constants import ADAM_STATES
from nemo_cpt.errors import CptError

FP8_TILE = 16  # elements of a side of an fp8 product (Transformer Engine's assert_dim_for_fp8_exec)
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A Llama-shaped decoder, how it is trained, and over how many GPUs.

    Names are those of Megatron's and NeMo's configurations; sizes in elements, tokens and bytes.

    Attributes:
        vocab_size: padded as Megatron pads it, of the whole model.
        tied: whether the embedding is the output layer too.
        qkv_bias: whether query, key and value have biases, as in Qwen2.
        qk_norm: whether each head's query and key are normalised, as in Qwen3.
        gated: SwiGLU, whose first layer is twice as wide; else a plain MLP.
        recompute_num_layers: of "block" how many of a stage's (chunk's) layers, of "uniform" how many at once.
        recompute_modules: what "selective" recomputes: "core_attn", "mlp".
        recompute_outputs: whether norms' and MLPs' activations' outputs are computed again (`RecomputeOutputs`).
        lora_rank: LoRA's or DoRA's `dim`; None trains every parameter.
        lora_targets: the linear layers that have an adapter.
        lora_dropout: the adapters' dropout.
        trained_embeddings: whether the embedding and the output layer are trained whole beside the adapters.
        weight_bytes: of a weight (bf16 2, fp32 4).
        grad_bytes: of an element of Megatron's gradient buffer.
        exp_avg_bytes: of Adam's first moment; 2 in fp8 too, of which Transformer Engine keeps the transpose.
        exp_avg_sq_bytes: of Adam's second moment.
        master_bytes: of the master weight: fp32 4, or 2 where the weight's own 16 bits are its upper half; 0 for none.
        precision_aware: whether Transformer Engine keeps master weights and moments (`use_precision_aware_optimizer`).
        fp8_moments: whether a moment is in fp8.
        host_states: Adam's states in pinned host memory.
        distributed_optimizer: whether the data-parallel ranks share the states.
        fp8: whether linear layers multiply in fp8, with cached fp8 copies of the weights.
        fp8_param: whether their weights are kept in fp8 alone.
        fused_gradients: `gradient_accumulation_fusion`.
        data_workers: processes that read each rank's data, `data.num_workers`.
        loss: "te" (in place), "native" (fused, fp32 logits) or "plain".
        unmodelled: what the recipe holds that the planner leaves out, in words.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tied: bool = False
    gated: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    seq_length: int = 8192
    micro_batch_size: int = 1
    global_batch_size: int = 8
    max_steps: int = 0
    gpus: int = 1
    gpus_per_node: int = 8
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    recompute: Literal["none", "selective", "block", "uniform"] = "none"
    recompute_num_layers: int = 0
    recompute_modules: tuple[str, ...] = ("core_attn",)
    recompute_outputs: bool = False
    loss: Literal["te", "native", "plain"] = "te"
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] = LINEAR
    lora_dropout: float = 0.0
    dora: bool = False
    trained_embeddings: bool = False
    weight_bytes: int = 2
    grad_bytes: int = 4
    exp_avg_bytes: int = 4
    exp_avg_sq_bytes: int = 4
    master_bytes: int = 4
    precision_aware: bool = False
    fp8_moments: bool = False
    host_states: tuple[str, ...] = ()
    optimizer_offload_fraction: float = 0.0
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = True
    fp8: bool = False
    fp8_param: bool = False
    fused_gradients: bool = False
    data_workers: int = 2
    unmodelled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse sizes that no GPU could be given."""
        names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
        groups = {name: getattr(self, name) for name in names}
        for name, size in groups.items():
            if size % self.tensor_model_parallel_size:
                raise CptError(f"{name} {size} cannot be cut over {self.tensor_model_parallel_size} GPUs (tensor)")
        # Megatron gives each chunk of each stage equally many layers.
        stages = self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size
        if self.num_layers % stages:
            raise CptError(f"{self.num_layers} layers cannot be cut into {stages} equal pipeline stages")
        if self.seq_length % self.context_parallel_size:
            raise CptError(
                f"seq_length {self.seq_length} cannot be cut over {self.context_parallel_size} GPUs (context)"
            )
        if self.gpus % self.model_parallel:
            raise CptError(
                f"{self.gpus} GPUs cannot be cut into groups of tensor x pipeline x context parallel = "
                f"{self.model_parallel}: change the parallel sizes or the number of GPUs"
            )
        if self.global_batch_size % (self.micro_batch_size * self.data_parallel):
            raise CptError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x data parallel {self.data_parallel}"
            )
        if self.fp8:
            self._check_fp8()

    def _check_fp8(self) -> None:
        """Refuse what Transformer Engine's fp8 products do not take: a side that is no multiple of 16."""
        cut = self.tensor_model_parallel_size
        # As one GPU multiplies them: tensor parallelism cuts the widths, and tokens with sequence parallelism alone.
        whole = {"seq_length x micro_batch_size": self.tokens // (cut if self.sequence_parallel else 1)}
        whole |= {"hidden_size": self.hidden_size, "ffn_hidden_size": self.ffn_hidden_size // cut}
        whole |= {"the width of queries": self.query_size // cut}
        whole |= {"the width of queries, keys and values": self.widths["linear_qkv"][1] // cut}
        for name, size in whole.items():
            if size % FP8_TILE:
                raise CptError(
                    f"fp8 multiplies in tiles of {FP8_TILE}, and {name} is {size} on one GPU: change seq_length, "
                    "micro_batch_size or the parallel sizes, or train with precision=bf16"
                )

    @property
    def model_parallel(self) -> int:
        """GPUs that hold one copy of the model for one micro batch."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel(self) -> int:
        """Copies of the model that see different data."""
        return self.gpus // self.model_parallel

    @property
    def optimizer_shards(self) -> int:
        """Ranks that share the optimizer's states: data and context parallel together (Megatron's `dp_cp_group`)."""
        # Ranks that differ in context alone hold the same weights, too.
        return self.data_parallel * self.context_parallel_size if self.distributed_optimizer else 1

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch on one GPU: its share of the sequence."""
        # Not cut by tensor parallelism: what that cuts is divided where it is counted.
        return self.seq_length * self.micro_batch_size // self.context_parallel_size

    @property
    def logits(self) -> int:
        """Elements of a micro batch's logits on one GPU."""
        return self.tokens * self.vocab_size // self.tensor_model_parallel_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch_size * self.seq_length

    @property
    def query_size(self) -> int:
        """Width of all queries."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        """Width of all keys, or of all values."""
        return self.num_query_groups * self.kv_channels

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear layers, of the whole model."""
        h, f = self.hidden_size, self.ffn_hidden_size
        return {
            "linear_qkv": (h, self.query_size + 2 * self.kv_size),
            "linear_proj": (self.query_size, h),
            # Gate and up in one product.
            "linear_fc1": (h, 2 * f if self.gated else f),
            "linear_fc2": (f, h),
        }

    @property
    def linear_parameters(self) -> int:
        """Parameters of one layer's linear layers."""
        return sum(size_in * size_out for size_in, size_out in self.widths.values())

    @property
    def stage_layers(self) -> int:
        """Layers of a pipeline stage."""
        return self.num_layers // self.pipeline_model_parallel_size

    @property
    def last_stage(self) -> int:
        """The pipeline stage that has the output layer."""
        return self.pipeline_model_parallel_size - 1

    @property
    def states(self) -> dict[str, int]:
        """Bytes a parameter of Adam's states, by name."""
        return dict(zip(ADAM_STATES, (self.exp_avg_bytes, self.exp_avg_sq_bytes, self.master_bytes), strict=True))

    @property
    def host_state_bytes(self) -> int:
        """Bytes a parameter of the states in pinned host memory."""
        return sum(size for name, size in self.states.items() if name in self.host_states)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, without adapters."""
        bias = self.widths["linear_qkv"][1] if self.qkv_bias else 0
        norms = 2 * self.hidden_size + (2 * self.kv_channels if self.qk_norm else 0)
        layers = self.num_layers * (self.linear_parameters + bias + norms)
        return layers + self.hidden_size + self.embedding_parameters  # the last norm's

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and the output layer, counted once where they are tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def adapter_parameters(self) -> int:
        """Parameters of all adapters: rank x (in + out) for each target, DoRA's magnitudes besides."""
        if self.lora_rank is None:
            return 0
        widths = [self.widths[name] for name in self.lora_targets]
        return self.num_layers * sum(self.lora_rank * (i + o) + (o if self.dora else 0) for i, o in widths)

    @property
    def trained_parameters(self) -> int:
        """Parameters that the optimizer steps."""
        if self.lora_rank is None:
            return self.parameters
        return self.adapter_parameters + (self.embedding_parameters if self.trained_embeddings else 0)

    @property
    def trains_head(self) -> bool:
        """Whether the output layer's weight gets a gradient."""
        return self.lora_rank is None or self.trained_embeddings

    @property
    def recomputed_at_once(self) -> int:
        """Layers that are recomputed from one kept input: "uniform" groups them, "block" takes each by itself."""
        return max(1, self.recompute_num_layers) if self.recompute == "uniform" else 1

    def recomputed(self, layers: int) -> int:
        """How many of a pipeline stage's `layers` (of one model chunk) are recomputed whole."""
        if self.recompute == "uniform":
            return layers
        return min(layers, self.recompute_num_layers) if self.recompute == "block" else 0

    def replace(self, **changes: Any) -> "Workload":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)
