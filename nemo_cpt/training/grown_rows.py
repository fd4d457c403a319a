"""The first steps of a model that has grown: only the rows of the new tokens are trained."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from megatron.core import parallel_state

from nemo_cpt.training.adapters import is_embedding_or_head
from nemo_cpt.training.callbacks import wrapped_model
from nemo_cpt.training.options import check_grown_rows_first, first_new_row


class GrownRowsFirst(pl.Callback):
    """Trains the new rows of the embedding and of the output layer alone for some steps, then everything.

    All other gradients are set to zero before the optimizer sees them, so that Adam's moments stay zero, and weight
    decay waits: in these steps no other value of the model changes.

    Args:
        steps: how many; a resumed run counts those that it has done.

    Raises:
        CptError: the tokenizer has not grown, by the grown.json in its folder; or the rows are frozen, as with LoRA.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._first = 0
        self._decays: list[tuple[dict[str, Any], float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read where the new rows begin."""
        folder = Path(str(getattr(getattr(pl_module.tokenizer, "tokenizer", None), "name_or_path", "")))
        self._first = first_new_row(folder, self.steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to train nothing."""
        rows = [
            each for name, each in wrapped_model(trainer, pl_module).named_parameters() if is_embedding_or_head(name)
        ]
        check_grown_rows_first(self.steps, None, frozen=not all(each.requires_grad for each in rows))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Leave the new rows' gradients alone, and no others."""
        if trainer.global_step >= self.steps:
            return
        for name, parameter in wrapped_model(trainer, pl_module).named_parameters():
            # Megatron gathers gradients in buffers of its own (`main_grad`), and leaves `grad` empty.
            gradient = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None:
                gradient[: self._old_rows(len(gradient)) if is_embedding_or_head(name) else None].zero_()
        # Decay needs no gradient: it would shrink the old rows all the same.
        self._decays = [(group, group["weight_decay"]) for group in optimizer.param_groups]
        for group, _ in self._decays:
            group["weight_decay"] = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Put weight decay back, before a checkpoint is written."""
        for group, decay in self._decays:
            group["weight_decay"] = decay
        self._decays = []

    def _old_rows(self, rows: int) -> int:
        """How many of this rank's rows are old ones: tensor parallelism cuts the vocabulary into equal parts."""
        before = parallel_state.get_tensor_model_parallel_rank() * rows
        return min(max(self._first - before, 0), rows)
