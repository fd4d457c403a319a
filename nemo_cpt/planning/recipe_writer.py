"""Puts a workload's settings into a recipe."""

from collections.abc import Iterable
from typing import Any

from nemo_cpt.constants import ADAM_STATES
from nemo_cpt.planning.workload import Workload


def apply(recipe: Any, before: Workload, after: Workload) -> None:
    """Set what differs between two workloads in a recipe, by the fields of NeMo's and Megatron's configurations.

    Args:
        recipe: the run.Partial that `before` was read from; changed in place.
        before: what it asks for now.
        after: what it is to ask for.
    """
    config, strategy = recipe.model.config, recipe.trainer.strategy
    if after.seq_length != before.seq_length:
        # NeMo has it in both places, and looks at either.
        config.seq_length = recipe.data.seq_length = after.seq_length
    if after.micro_batch_size != before.micro_batch_size:
        recipe.data.micro_batch_size = after.micro_batch_size
    if after.loss != before.loss:
        config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl = True, after.loss
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"):
        if getattr(after, name) != getattr(before, name):
            setattr(strategy, name, getattr(after, name))
    if after.lora_rank != before.lora_rank:
        # alpha / rank is the adapter's scale, which is not to change.
        recipe.peft.alpha = recipe.peft.alpha * after.lora_rank // before.lora_rank
        recipe.peft.dim = after.lora_rank
    _recompute(config, after)
    if after.recompute_outputs != before.recompute_outputs:
        _recompute_outputs(recipe.trainer, after.recompute_outputs)
    if after.grad_bytes != before.grad_bytes or after.host_states != before.host_states:
        _states(recipe, after)


def _recompute(config: Any, work: Workload) -> None:
    if work.recompute in ("none", "selective"):
        config.recompute_granularity = None if work.recompute == "none" else "selective"
        # Megatron refuses a method without full granularity.
        config.recompute_method = config.recompute_num_layers = None
        return
    config.recompute_granularity, config.recompute_method = "full", work.recompute
    config.recompute_num_layers = work.recompute_num_layers


def _recompute_outputs(trainer: Any, wanted: bool) -> None:
    import nemo_run as run

    from nemo_cpt.training.recompute import RecomputeOutputs

    others = [each for each in trainer.callbacks if getattr(each, "__fn_or_cls__", type(each)) is not RecomputeOutputs]
    trainer.callbacks = others + [run.Config(RecomputeOutputs)] * wanted


def _states(recipe: Any, work: Workload) -> None:
    """The gradients' dtype, and Adam's states on the host."""
    keep_gradients(recipe, fp32=work.grad_bytes == 4)
    if work.host_states:
        keep_states_on_host(recipe, work.host_states)


def keep_gradients(recipe: Any, *, fp32: bool) -> None:
    """Let a recipe keep and reduce gradients in fp32, or in bf16, in all three places that NeMo and Megatron look at.

    Args:
        recipe: a run.Partial of a full-parameter recipe; changed in place.
        fp32: whether in fp32.
    """
    import torch

    recipe.trainer.plugins.grad_reduce_in_fp32 = recipe.trainer.strategy.ddp.grad_reduce_in_fp32 = fp32
    recipe.optim.config.main_grads_dtype = torch.float32 if fp32 else torch.bfloat16


def keep_states_on_host(recipe: Any, states: Iterable[str] = ADAM_STATES) -> None:
    """Let a recipe keep some of Adam's states in pinned host memory (training/host_states.py).

    Args:
        recipe: a run.Partial of a full-parameter recipe; changed in place.
        states: any of `adam.ADAM_STATES`.
    """
    import nemo_run as run

    from nemo_cpt.training.optimizer import HostStateOptimizer

    optimizer = recipe.optim.config
    optimizer.use_precision_aware_optimizer = optimizer.use_distributed_optimizer = True
    recipe.trainer.strategy.ckpt_async_save = False  # another process does not see the states
    recipe.optim = run.Config(
        HostStateOptimizer, config=optimizer, lr_scheduler=recipe.optim.lr_scheduler, host_states=list(states)
    )
