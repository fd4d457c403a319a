"""Patches of what Lightning 2.4 and NeMo 2.7 count wrongly in a run that was resumed. `patches.apply` calls them."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from nemo.lightning.pytorch.trainer import NoValOnRestartTrainingLoop

from nemo_cpt.training.patching import replace


def validate_by_global_step() -> None:
    """Validate after every `val_check_interval` optimizer steps and at the end, however often the run was stopped.

    Lightning 2.4.0 (`loops/training_epoch_loop.py`) counts batches instead. A checkpoint that is written within the
    hooks of a batch holds a count that lacks this batch, so that after each such stop everything comes one step later,
    and the last validation, with the checkpoint that NeMo 2.7.3 leaves to it, not at all
    (https://github.com/Lightning-AI/pytorch-lightning/issues/18060). NeMo's loop (`lightning/pytorch/trainer.py`) skips
    the validation of the step that it resumes at, be it done or not: here it is skipped only if it was done.
    """
    # On the class: Lightning makes the loop in the trainer's constructor, before a patch could see the instance.
    _TrainingEpochLoop.validated_step = 0
    replace(_TrainingEpochLoop, "reset", _count_global_steps)
    replace(_TrainingEpochLoop, "on_save_checkpoint", _save_validated_step)
    replace(_TrainingEpochLoop, "on_load_checkpoint", _load_validated_step)
    replace(_EvaluationLoop, "on_run_end", _note_validated_step)
    replace(NoValOnRestartTrainingLoop, "_should_check_val_fx", _validate_when_due)
    validate_the_end()


def validate_the_end() -> None:
    """Let a run that was stopped within its last validation do it when it is resumed.

    Lightning 2.4.0 (`loops/fit_loop.py`) leaves `fit` at once where `max_steps` is reached.
    """
    # `replace` is for functions; `done` is a property.
    if not hasattr(_FitLoop, "done_by_steps"):
        _FitLoop.done_by_steps = _FitLoop.done
        _FitLoop.done = property(lambda self: not _resumes_with_validation(self.epoch_loop) and self.done_by_steps)


def _resumes_with_validation(loop: Any) -> bool:
    return loop.restarting and loop._should_check_val_fx(None)


def _count_global_steps(reset: Callable[[Any], None]) -> Callable[[Any], None]:
    def reset_to_global_step(self: Any) -> None:
        resumes = self.restarting
        reset(self)
        if not resumes:
            return
        # The batch within whose hooks the checkpoint was written: its step is done, its count is not.
        behind = self.global_step - self.batch_progress.total.completed
        for progress in (self.batch_progress.total, self.batch_progress.current):
            progress.completed += behind
            progress.ready = progress.started = progress.processed = progress.completed
        pending = self._should_check_val_fx(None)
        self._batches_that_stepped = self.global_step - pending  # the loggers' step: a validation has its batch's
        self.val_loop.restarting = False  # one that was cut short begins anew

    return reset_to_global_step


def _save_validated_step(save: Callable[[Any], dict]) -> Callable[[Any], dict]:
    return lambda self: save(self) | {"validated_step": self.validated_step}


def _load_validated_step(load: Callable[[Any, dict], None]) -> Callable[[Any, dict], None]:
    def load_validated_step(self: Any, state: dict) -> None:
        load(self, state)
        # One that was written without this patch does not say; most are written when their validation is done.
        self.validated_step = state.get("validated_step")

    return load_validated_step


def _note_validated_step(end: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def end_and_note(self: Any) -> Any:
        # The validation before the first step is not one of a step.
        if not self.trainer.sanity_checking:
            self.trainer.fit_loop.epoch_loop.validated_step = self.trainer.global_step
        return end(self)

    return end_and_note


def _validate_when_due(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def validates_now(self: Any, data_fetcher: Any) -> bool:
        step, last, validated = self.global_step, self.trainer.max_steps, self.validated_step
        # A checkpoint of before this patch: taken as validated, as NeMo takes every one.
        if validated is None:
            validated = step if self.restarting else 0
        due = step % self.trainer.val_check_batch == 0 or 0 < last <= step
        return bool(self._should_check_val_epoch() and due and step != validated)

    return validates_now
