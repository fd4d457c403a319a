"""Settings with which Llama-3.1-8B trains on one GPU, a row for each memory budget.

`benchmarks/train.py budgets` measures every row under its cap; docs/performance.md has the figures.
"""

import dataclasses
from typing import Any

from nemo_cpt.errors import CptError

ADAM_STATES = ("exp_avg", "exp_avg_sq", "master_param")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleGpuSetting:
    """What to set for one GPU; names and values are those of Megatron's and NeMo's configurations.

    Attributes:
        gpu_memory_gib: The card's memory as sold. PyTorch may use 1 GiB less, and 5 % of that are left free.
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


LORA = (
    SingleGpuSetting(gpu_memory_gib=24, lora_rank=32, seq_length=4096, recompute_num_layers=30),
    SingleGpuSetting(gpu_memory_gib=48, lora_rank=128, recompute_num_layers=12),
    SingleGpuSetting(gpu_memory_gib=80, lora_rank=128),
)
"""LoRA on all linear layers, bf16, fp32 gradients and states of the adapters: the stock arithmetic."""

FULL_PARAMETER = (
    SingleGpuSetting(
        gpu_memory_gib=48, lora_rank=None, recompute_num_layers=27, grad_dtype="bf16", host_states=ADAM_STATES
    ),
    SingleGpuSetting(gpu_memory_gib=80, lora_rank=None, recompute_num_layers=11, host_states=ADAM_STATES),
    SingleGpuSetting(gpu_memory_gib=141, lora_rank=None, host_states=ADAM_STATES),
)
"""Every parameter, Adam's fp32 states in 75 GiB of pinned host memory; 80 and 141 GB keep fp32 gradients too, which is
the stock arithmetic. The states cross the bus in 3.2 s a step: use a global batch of at least half a million tokens."""

HOST_MEMORY_GIB = 100
"""Host memory to ask for with `host_states`: 75 GiB pinned, the rest for the process, its data and checkpoints."""


def lora_setting(gpu_memory_gib: float) -> SingleGpuSetting:
    """The LoRA row for a GPU with `gpu_memory_gib` GiB: the largest budget that it holds.

    Raises:
        CptError: No row fits.
    """
    return _largest_that_fits(LORA, gpu_memory_gib, "LoRA")


def full_parameter_setting(gpu_memory_gib: float) -> SingleGpuSetting:
    """The full-parameter row for a GPU with `gpu_memory_gib` GiB: the largest budget that it holds.

    Raises:
        CptError: No row fits.
    """
    return _largest_that_fits(FULL_PARAMETER, gpu_memory_gib, "Full-parameter training")


def _largest_that_fits(rows: tuple[SingleGpuSetting, ...], gpu_memory_gib: float, what: str) -> SingleGpuSetting:
    fitting = [row for row in rows if row.gpu_memory_gib <= gpu_memory_gib]
    if not fitting:
        smallest = min(row.gpu_memory_gib for row in rows)
        raise CptError(
            f"{what} of Llama-3.1-8B on one GPU needs at least {smallest} GB of GPU memory, not {gpu_memory_gib:g}. "
            f"Use gpu_memory_gib={smallest} or more, several GPUs, or a smaller model."
        )
    return max(fitting, key=lambda row: row.gpu_memory_gib)


def configure(recipe: Any, setting: SingleGpuSetting) -> None:
    """Put a setting into a recipe: its model, data, precision, gradients and optimizer; LoRA itself is the recipe's.

    Args:
        recipe: A `run.Partial` of `llm.pretrain` or `llm.finetune` with one GPU; changed in place.
        setting: A row of `LORA` or `FULL_PARAMETER`, or one of your own.
    """
    model = recipe.model.config
    model.seq_length = recipe.data.seq_length = setting.seq_length
    recipe.data.micro_batch_size = setting.micro_batch_size
    model.cross_entropy_fusion_impl = setting.cross_entropy_fusion_impl
    if setting.recompute_num_layers:
        model.recompute_granularity, model.recompute_method = "full", "block"
        model.recompute_num_layers = setting.recompute_num_layers
    precision = recipe.trainer.plugins
    precision.grad_reduce_in_fp32 = setting.grad_dtype == "fp32"
    recipe.trainer.strategy.ddp.grad_reduce_in_fp32 = setting.grad_dtype == "fp32"
    if setting.fp8_recipe:
        precision.fp8, precision.fp8_recipe = "hybrid", setting.fp8_recipe
        precision.fp8_param_gather = setting.fp8_param
    if setting.lora_rank is None:
        _configure_states(recipe, setting)


def _configure_states(recipe: Any, setting: SingleGpuSetting) -> None:
    import nemo_run as run
    import torch

    from nemo_cpt.training.optimizer import HostStateOptimizer

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    optimizer = recipe.optim.config
    optimizer.use_precision_aware_optimizer = optimizer.use_distributed_optimizer = True
    optimizer.main_grads_dtype = dtypes[setting.grad_dtype]
    optimizer.exp_avg_dtype = dtypes[setting.exp_avg_dtype]
    optimizer.exp_avg_sq_dtype = dtypes[setting.exp_avg_sq_dtype]
    if setting.host_states:
        recipe.trainer.strategy.ckpt_async_save = False  # it would keep a second copy of the states in host memory
        recipe.optim = run.Config(
            HostStateOptimizer,
            config=optimizer,
            lr_scheduler=recipe.optim.lr_scheduler,
            host_states=list(setting.host_states),
        )


def check_fp8(compute_capability: tuple[int, int]) -> None:
    """Check that a GPU of this compute capability has fp8 matrix products.

    Raises:
        CptError: It is older than Ada (8.9) and Hopper (9.0).
    """
    if compute_capability < (8, 9):
        major, minor = compute_capability
        raise CptError(
            f"fp8 needs a GPU of compute capability 8.9 (Ada), 9.0 (Hopper) or later; this one has {major}.{minor}. "
            "Train in bf16: fp8=False."
        )
