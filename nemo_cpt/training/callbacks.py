"""What a run reports about itself."""

import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from nemo.lightning._strategy_lib import _sync_from_last_pipeline_stage
from nemo.utils import AppState

from nemo_cpt.errors import CptError
from nemo_cpt.page import finite
from nemo_cpt.training.metrics import BATCHES, LOSS, RESUMED_FROM, VALIDATED_OTHERWISE, append_metrics
from nemo_cpt.training.record import validated_otherwise


class ValidationLossBySet(pl.Callback):
    """Log each validation set's own loss as `val_loss_NAME`, in nats per token: the monitor of forgetting.

    Needs a `NamedSetsDataModule`, which validates one set after the other. With the trainer's `num_sanity_val_steps`
    set, the first line is the base's own loss, before any training.
    """

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have pipeline stages validate before the first step, too, which NeMo's strategy has just given up."""
        trainer.num_sanity_val_steps = getattr(trainer.datamodule, "first_validation", trainer.num_sanity_val_steps)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last validation."""
        self._losses = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args) -> None:
        """Keep the loss of one global batch."""
        # A copy: the broadcast below writes into it.
        loss = outputs.detach().clone()
        # Only the last pipeline stage has a loss, and every rank names checkpoints by it.
        _sync_from_last_pipeline_stage(loss, broadcast=True)
        self._losses.append(loss)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Average the losses of each set and log them."""
        by_set = self.losses(trainer)
        for name, loss in by_set.items():
            pl_module.log(f"{LOSS}{name}", loss, batch_size=1)
        if by_set:
            # NeMo's own val_loss weighs the first batch of a validation as one sequence, the others by their size.
            pl_module.log("val_loss", torch.stack(list(by_set.values())).mean(), prog_bar=True, batch_size=1)
            values: dict[str, Any] = {f"{LOSS}{name}": float(loss) for name, loss in by_set.items()}
            values |= {f"{BATCHES}{name}": losses for name, losses in self._batches(trainer) if len(losses) > 1}
            _append(trainer, {"step": trainer.global_step, "time": time.time(), **values})

    def losses(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        """Mean loss of each set, if the last validation went through all of them whole."""
        weights = getattr(trainer.datamodule, "validation_weights", {})
        # One that was stopped in the middle, or NeMo's own data module: no mean is better than one of other batches.
        if not self._losses or len(self._losses) != sum(map(len, weights.values())):
            return {}
        # The batches come set by set, in the order of `validation_weights`: `FirstSamples` knows no other.
        batches = iter(torch.stack([loss.reshape(()) for loss in self._losses]))
        return {
            name: sum(weight * next(batches) for weight in of_set) / sum(of_set) for name, of_set in weights.items()
        }

    def _batches(self, trainer: pl.Trainer) -> Iterator[tuple[str, list[float]]]:
        """Each set's losses batch by batch, whose differences over the steps tell how sure a change is."""
        batches = iter(torch.stack([loss.reshape(()) for loss in self._losses]).tolist())
        for name, of_set in trainer.datamodule.validation_weights.items():
            yield name, [next(batches) for _ in of_set]


class MetricsFile(pl.Callback):
    """Append one JSON line a logged step to `metrics/steps.jsonl` in the run's folder: step, loss, lr, grad_norm, time.

    `time` is when the step ended, in seconds since 1970, and `gpu_memory_gib` the most that rank 0's allocator took.
    Unlike a logger's file it is append-only, so a resumed run continues it.
    """

    NAMES = (
        "reduced_train_loss", "lr", "embeddings_lr", "grad_norm", "consumed_samples", "train_step_timing in s",
    )  # fmt: skip

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write which step this start goes on from: what is there of later ones will be done again."""
        other = {VALIDATED_OTHERWISE: names} if (names := validated_otherwise(trainer)) else {}
        _append(trainer, {RESUMED_FROM: trainer.global_step, **other})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Write the step's metrics if the trainer logs this step."""
        # The same steps as Lightning's loggers, whose metrics these are.
        if trainer.global_step % trainer.log_every_n_steps:
            return
        logged = trainer.callback_metrics
        values = {name: float(logged[name]) for name in self.NAMES if name in logged}
        if torch.cuda.is_available():
            values["gpu_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        _append(trainer, {"step": trainer.global_step, "time": time.time(), **values})


class Seed(pl.Callback):
    """Seed every random number of the job but the data's order, which has its own: an adapter's first values.

    Megatron seeds its generators with 1234 when it is set up, ahead of any callback.

    Args:
        seed: the same on every rank; Megatron adds the rank where ranks must differ.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Seed ahead of the model, which is built next."""
        pl.seed_everything(self.seed, verbose=False)
        model_parallel_cuda_manual_seed(self.seed)


class StopAtStep(pl.Callback):
    """End the run in good order after `step`, as a time limit would: a checkpoint is written, nothing is finished."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Ask the trainer to stop once the step is reached."""
        if trainer.global_step >= self.step:
            trainer.should_stop = True


def wrapped_model(trainer: pl.Trainer, pl_module: torch.nn.Module) -> torch.nn.Module:
    """The model as Megatron wraps it for data parallelism, with the adapters that NeMo adds; else Lightning's own.

    Its parameters are those that Megatron's gradient buffers and the optimizer hold.
    """
    return getattr(trainer.strategy, "megatron_parallel", None) or pl_module


def end_with(trainer: pl.Trainer, pl_module: Any, callback: pl.Callback, error: CptError, cause: BaseException) -> None:
    """End a run with another error than the one that a callback's `on_exception` was called with.

    Raises:
        CptError: `error`, of which the callbacks behind this one have heard.
    """
    # Lightning asks one after the other, and hears of none behind one that raises: a run would tell nobody its end.
    for each in trainer.callbacks[trainer.callbacks.index(callback) + 1 :]:
        each.on_exception(trainer, pl_module, error)
    raise error from cause


def _append(trainer: pl.Trainer, values: dict[str, Any]) -> None:
    if trainer.is_global_zero:
        # NaN is no JSON: readers other than Python's would refuse the whole line.
        append_metrics(AppState().log_dir, finite(values))
