"""A run that ends when a validation set's loss falls no more."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping

from nemo_cpt.training.record import validated_otherwise


class StopEarly(EarlyStopping):
    """End the run, in good order, after `patience` validations in which a set's loss was not below its lowest.

    The checkpoint of the last step is saved as at any end. Checkpoints hold the lowest loss and the count, so that a
    resumed run goes on counting, unless the set is validated on other samples now; one that had ended so ends again at
    once, unless it is given more patience, or none.

    Args:
        validation_set: name of the set.
        patience: validations.
    """

    def __init__(self, validation_set: str, patience: int = 3):
        # A NaN only counts as not below: Lightning would end the run in good order, where its next gradient fails it.
        super().__init__(
            f"val_loss_{validation_set}", patience=patience, check_on_train_epoch_end=False, check_finite=False
        )
        self.validation_set, self._lowest_at = validation_set, 0

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and the step of the lowest loss."""
        return super().state_dict() | {"lowest_at": self._lowest_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """All but the patience, which is this start's."""
        super().load_state_dict(state_dict | {"patience": self.patience})
        self._lowest_at = state_dict["lowest_at"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a run again that had ended."""
        super().on_train_start(trainer, pl_module)
        if self.validation_set in validated_otherwise(trainer):
            # The lowest loss is one of other samples.
            self.best_score, self.wait_count = torch.tensor(torch.inf), 0
        self._stop_if_it_is_time(trainer)
        if trainer.should_stop and trainer.checkpoint_callback:
            # This step was resumed from, and NeMo cannot save again ahead of a first step.
            trainer.checkpoint_callback._last_global_step_saved = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count, and end the run when it is time."""
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        if self.wait_count == 0:
            self._lowest_at = trainer.global_step
        self._stop_if_it_is_time(trainer)

    def _stop_if_it_is_time(self, trainer: pl.Trainer) -> None:
        if self.wait_count < self.patience or trainer.global_step >= trainer.max_steps:
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            print(
                f"nemo_cpt: ended early at step {trainer.global_step} of {trainer.max_steps}: {self.monitor} has not "
                f"fallen below {float(self.best_score):.4f} (step {self._lowest_at}) in {self.wait_count} validations. "
                "To train on, give a larger patience=, or no early_stop=",
                flush=True,
            )
