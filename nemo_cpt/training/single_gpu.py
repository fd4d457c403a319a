"""Settings with which Llama-3.1-8B trains on one GPU, a row for each memory budget, all measured."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleGpuSetting:
    """What to set for one GPU; names and values are those of Megatron's and NeMo's configurations.

    Attributes:
        gpu_memory_gib: The card's memory as sold (GiB).
        lora_rank: LoRA's `dim`; None trains every parameter.
        seq_length: Tokens a sample.
        micro_batch_size: Samples a forward pass.
        recompute_num_layers: Layers with full recompute (`recompute_method="block"`), of 32.
        cross_entropy_fusion_impl: "te" (Transformer Engine, in place) or "native".
        fp8_recipe: None for bf16, or Transformer Engine's recipe ("tensorwise").
        fp8_param: Whether the linear layers' weights themselves are fp8.
        grad_dtype: The gradient buffer's dtype, "fp32" or "bf16".
        exp_avg_dtype: The first moment's dtype, "fp32" or "bf16".
        exp_avg_sq_dtype: The second moment's dtype, "fp32" or "bf16".
        host_states: Adam's states that stay in pinned host memory (`HostStateOptimizer`).
    """

    gpu_memory_gib: int
    lora_rank: int | None
    seq_length: int = 8192
    micro_batch_size: int = 1
    recompute_num_layers: int = 0
    cross_entropy_fusion_impl: str = "te"
    fp8_recipe: str | None = None
    fp8_param: bool = False
    grad_dtype: str = "fp32"
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    host_states: tuple[str, ...] = ()
