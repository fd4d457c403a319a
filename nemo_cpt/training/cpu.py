"""Recipes on a machine without a GPU: `on_cpu(recipe)` turns any of them into one whose strategy enters `cpu_stack()`
for the length of its job."""

import contextlib
from typing import Any

import fiddle as fdl
import nemo_run as run
import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from nemo import lightning as nl
from nemo.collections.llm.gpt.model.base import local_layer_spec

from nemo_cpt.cpu_stack import UNFUSED, cpu_stack
from nemo_cpt.errors import CptError
from nemo_cpt.training.optimizer import HostStateOptimizer


class CpuStrategy(nl.MegatronStrategy):
    """NeMo's MegatronStrategy over gloo on the CPU: enters `cpu_stack()` for the length of the job."""

    # No __init__: NeMo writes the arguments into each checkpoint's context by the signature that it finds.
    _cpu_stack: contextlib.ExitStack | None = None

    def setup_environment(self) -> None:
        """Enter the CPU stack before the processes meet."""
        self._cpu_stack = contextlib.ExitStack()
        # Not in __init__: a recipe is also built where it only is launched, and the stack replaces parts of torch.cuda.
        self._cpu_stack.enter_context(cpu_stack())
        super().setup_environment()

    def teardown(self) -> None:
        """Close the process groups and leave the CPU stack, also after an error: another run may follow."""
        try:
            super().teardown()
            _close_process_groups()
        finally:
            if self._cpu_stack is not None:
                self._cpu_stack.close()


def _close_process_groups() -> None:
    if not torch.distributed.is_initialized():
        return
    parallel_state.destroy_model_parallel()
    unset_num_microbatches_calculator()
    torch.distributed.destroy_process_group()


def on_cpu(recipe: Any, processes: int = 1) -> Any:
    """Make a recipe run on the CPU, in fp32: the same model, data, schedule and checkpoints, without a GPU.

    Args:
        recipe: the run.Partial of a recipe function; it is changed in place.
        processes: processes of the run; the recipe's parallel sizes are kept if there are several, else set to 1.

    Returns:
        The recipe.

    Raises:
        CptError: it trains in fp8, or with moments in bf16.
    """
    trainer, strategy = recipe.trainer, recipe.trainer.strategy
    if getattr(trainer.plugins, "fp8", None):
        raise CptError("a CPU has no fp8 products: make the recipe with precision=bf16")
    # Moments: gradients alone are in bf16 where a GPU's memory made them so.
    if getattr(recipe.optim.config, "exp_avg_dtype", None) == torch.bfloat16:
        raise CptError("a CPU trains with states in fp32: make the recipe with state_precision=fp32")
    trainer.accelerator, trainer.devices, trainer.num_nodes, trainer.plugins = "cpu", processes, 1, None
    # The class alone: every argument that the recipe or its user set stays.
    fdl.update_callable(strategy, CpuStrategy)
    strategy.pipeline_dtype = torch.float32
    strategy.ckpt_async_save = strategy.sequence_parallel = False  # gloo does not reduce and scatter
    strategy.ddp.overlap_grad_reduce = strategy.ddp.overlap_param_gather = False
    strategy.ddp.average_in_collective = False  # gloo has no average
    # With several processes a test or a user wants just these sizes.
    if processes == 1:
        strategy.tensor_model_parallel_size = strategy.pipeline_model_parallel_size = strategy.context_parallel_size = 1
    _plain_adam(recipe)
    recipe.data.num_workers, recipe.data.persistent_workers, recipe.data.pin_memory = 0, False, False
    recipe.data.create_attention_mask = True  # Megatron's plain attention builds none itself
    recipe.model.config.transformer_layer_spec = local_layer_spec
    recipe.model.config.params_dtype = torch.float32  # of which Mistral's class says bf16
    for field, value in UNFUSED.items():
        setattr(recipe.model.config, field, value)
    return recipe


def _plain_adam(recipe: Any) -> None:
    """Megatron's own Adam with fp32 states, whatever a GPU's memory made of it."""
    if recipe.optim.__fn_or_cls__ is HostStateOptimizer:
        recipe.optim = run.Config(
            nl.MegatronOptimizerModule, config=recipe.optim.config, lr_scheduler=recipe.optim.lr_scheduler
        )
    for field in ("bf16", "use_distributed_optimizer", "use_precision_aware_optimizer"):
        setattr(recipe.optim.config, field, False)
    for field in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        setattr(recipe.optim.config, field, torch.float32)
