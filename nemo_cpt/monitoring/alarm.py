"""The forgetting alarm: warns when a validation set has got worse than it was before the training, or stops the run."""

import time
from collections.abc import Mapping
from typing import Any, Optional

import lightning.pytorch as pl
from nemo.utils import AppState

from nemo_cpt.errors import CptError, StoppedEarlyError
from nemo_cpt.monitoring import forgetting
from nemo_cpt.training.checkpoints import save_now
from nemo_cpt.training.metrics import RUN_FILE, WARNINGS_FILE, append_metrics, read_file, read_metrics


class ForgettingAlarm(pl.Callback):
    """Warns at a validation at which a set has become worse beyond two standard errors, and stops at a limit.

    The warning goes to the log and to `metrics/warnings.jsonl`, which `nemo-cpt watch` shows. See
    `nemo_cpt.monitoring.forgetting` for how the loss is smoothed and its noise measured.

    Args:
        stop_when: of validation sets, by how many percent their loss may rise: `{"en": "+3%"}`. A run that is beyond a
            limit is saved and stopped as a step begins; started again with the same limit, it is refused.

    Raises:
        StoppedEarlyError: a set is beyond its limit; the run is saved.
        CptError: a limit is no percentage, names no validation set, or was reached before this start.
    """

    def __init__(self, stop_when: Optional[dict[str, str]] = None) -> None:  # noqa: UP045  NeMo-Run cannot parse `| None`
        self.stop_when = stop_when
        self.limits = forgetting.limits(stop_when)
        self._stop: str | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse limits of sets that nobody validates."""
        forgetting.limits(self.stop_when, getattr(trainer.datamodule, "validation_sets", None) or ())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on where the last start stopped."""
        # Else it would train on for an interval, find the same, and stop again.
        reached = _on_rank_0(trainer, lambda: _beyond(_metrics(trainer), self.limits))
        if reached:
            raise CptError(
                f"{reached}, which was reached at an earlier start: to train on, raise the limit or leave it away. The "
                "checkpoints are as they were"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at every set's losses up to this validation."""
        # A few batches before the training, which are no validation.
        if trainer.sanity_checking:
            return

        def judge() -> str | None:
            metrics = _metrics(trainer)
            for change in forgetting.begun(metrics, trainer.max_steps):
                _warn(trainer, forgetting.told(change, *_known_of(change.name)))
            return _beyond(metrics, self.limits)

        self._stop = _on_rank_0(trainer, judge)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Stop between two steps, once the validation's own checkpoint is written."""
        if self._stop:
            save_now(trainer)
            raise StoppedEarlyError(f"stopped by stop_when, saved at step {trainer.global_step}: {self._stop}")


def _metrics(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """What was measured up to now: of a resumed run without the steps that it is about to do again."""
    return [line for line in read_metrics(AppState().log_dir) if line["step"] <= trainer.global_step]


def _beyond(metrics: list[dict[str, Any]], limits: Mapping[str, float]) -> str | None:
    reached = forgetting.beyond(forgetting.changes(metrics), limits)
    if reached is None:
        return None
    before = f"at step {reached.since}" if reached.since else "before the training"
    return (
        f"{reached.name} is {reached.percent:+.1f} % worse than {before} at step {reached.step}, and "
        f"stop_when allows {limits[reached.name]:+g} %"
    )


def _known_of(name: str) -> tuple[float | None, dict[str, float]]:
    """Bytes a token of a validation set, and the shares of the training sets, as this start described them."""
    about = read_file(AppState().log_dir, RUN_FILE)
    shares = {each["prefix"]: each["share"] for each in about.get("training", []) if "share" in each}
    return about.get("validation", {}).get(name, {}).get("bytes_per_token"), shares


def _warn(trainer: pl.Trainer, text: str) -> None:
    print(f"nemo_cpt: warning: {text}", flush=True)
    append_metrics(AppState().log_dir, {"step": trainer.global_step, "time": time.time(), "text": text}, WARNINGS_FILE)


def _on_rank_0(trainer: pl.Trainer, judge: Any) -> str | None:
    """Rank 0's answer, on every rank: it alone is sure to see the files that it wrote."""
    return trainer.strategy.broadcast(judge() if trainer.is_global_zero else None)
