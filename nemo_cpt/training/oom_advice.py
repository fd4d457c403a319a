"""What to change when the GPU's memory does not suffice."""

import lightning.pytorch as pl
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.training.callbacks import end_with
from nemo_cpt.training.recompute import RecomputeOutputs


class OutOfMemoryAdvice(pl.Callback):
    """Ends a job that ran out of GPU memory with what to change, instead of with the allocator's message alone.

    Raises:
        CptError: From the `torch.OutOfMemoryError` of a step, with the settings to change, the cheapest first.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Turn an out-of-memory error into advice; leave every other exception alone."""
        if isinstance(exception, torch.OutOfMemoryError):
            outputs_again = any(isinstance(each, RecomputeOutputs) for each in trainer.callbacks)
            error = CptError(advice(getattr(pl_module, "config", None), str(exception), outputs_again))
            end_with(trainer, pl_module, self, error, exception)


def advice(config: object | None, message: str, outputs_again: bool = False) -> str:
    """What to change, cheapest first, in a run with Megatron's transformer `config` that failed with `message`.

    Args:
        config: Megatron's transformer configuration, if there is one.
        message: the allocator's.
        outputs_again: whether `RecomputeOutputs` is among the run's callbacks.
    """
    layers = getattr(config, "num_layers", None)
    recomputed = getattr(config, "recompute_num_layers", None) or 0
    # Cheapest first: what costs no speed before what does, and what changes the training last.
    changes = ["micro_batch_size=1 with the same global_batch_size, if it is larger"]
    if getattr(config, "cross_entropy_fusion_impl", "te") != "te":
        changes.append('cross_entropy_fusion_impl="te" (the loss in place, without fp32 logits)')
    if not outputs_again and getattr(config, "fp8", None) is None:  # in fp8 it saves nothing
        changes.append("run.Config(RecomputeOutputs) of nemo_cpt.training.recompute in trainer.callbacks")
    if layers is not None and recomputed < layers:
        changes.append(f"more recomputed layers (recompute_num_layers={recomputed} of {layers} now)")
    changes += ["a shorter seq_length", "a lower LoRA rank, or LoRA if every parameter is trained", "more GPUs"]
    return (
        "The GPU's memory did not suffice. `nemo-cpt plan RECIPE` finds the fastest setting that fits. Change, the "
        f"cheapest first: {'; '.join(changes)}. ({message[:300]})"
    )
