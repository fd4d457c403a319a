"""Where a run starts: at its own newest whole checkpoint, else at the base's weights; and what it makes of changes."""

import copy
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
from nemo import lightning as nl
from nemo.utils import AppState
from torch.optim.lr_scheduler import _enable_get_lr_call

from nemo_cpt.checkpoint.folders import copy_small_files
from nemo_cpt.checkpoint.lora import recorded_base
from nemo_cpt.checkpoint.weights_digest import base_weights_of
from nemo_cpt.compatibility import check_resumed
from nemo_cpt.errors import CptError, exit_with_the_message
from nemo_cpt.training import run_lock
from nemo_cpt.training.changes import Change, changes, check_goes_on, listed
from nemo_cpt.training.datasets import in_another_order
from nemo_cpt.training.metrics import append_metrics
from nemo_cpt.training.options import check_extend
from nemo_cpt.training.preconditions import check_base
from nemo_cpt.training.record import settings_of, validated_otherwise
from nemo_cpt.training.run_folder import STARTS, Checkpoint, damaged_since, newest_whole, resumed_from, to_resume

KEPT_TOKENIZER = f"{run_lock.FOLDER}/hf"  # in the run's folder


class ResumeOrStartFromBase(nl.AutoResume):
    """Resume the run from its newest whole checkpoint; without one, restore the base's weights and start afresh.

    NeMo's AutoResume looks at `*-last` alone, by its time, and gives up when that one is unfinished, although an older
    checkpoint is whole. A start from the base restores no optimizer state and no schedule; a resumption restores both,
    and the position in the data. What is different from how the checkpoint's run was started is said, or refused.

    Args:
        base: folder of the NeMo checkpoint to continue from. A run that trains every weight needs it for its first
            start only.
        extend: what becomes of the learning rate when `max_steps`, `lr`, `min_lr` or `warmup_steps` are not those of
            the checkpoint; None refuses such a change.
            "rewarm": a new warmup to `lr` and decay to `min_lr` over the steps that are left. Re-warming and
            re-decaying is what training on after the end of a schedule wants (Gupta et al., arXiv 2308.04014; Ibrahim
            et al., arXiv 2403.08763).
            "stretch": the new schedule as if it had been so from the start. For a run that is far from its end: a
            cosine should be as long as the training (Hoffmann et al., arXiv 2203.15556). After the end the rate jumps
            up without a warmup.
            "keep": the old schedule; past its end the rate stays at the old `min_lr`.
            Further resumptions with the same settings go on with what was chosen.
            The data go on behind the samples that were trained. Megatron draws the order of a dataset for all passes
            over it that `max_steps` needs: within one pass the order stays; beyond, it is drawn anew where their number
            changes, or where the last one grows over four fifths of a pass, and what is left may then repeat documents
            that were trained and leave out others, which is said.

    Raises:
        CptError: there is neither a checkpoint of this run nor a complete base, or they are of two models; all
            checkpoints are damaged; a setting changed that a resumption cannot take.
    """

    def __init__(self, base: Optional[str] = None, extend: Optional[str] = None):  # noqa: UP045  for NeMo-Run's parser
        check_extend(extend)
        # Without artifacts: the recipe gives the tokenizer, and NeMo would overwrite it with the base's.
        restore = nl.RestoreConfig(path=str(base), load_artifacts=False) if base else None
        super().__init__(
            restore_config=restore, resume_if_exists=True, resume_past_end=True, resume_ignore_no_checkpoint=True
        )
        self.base, self.extend = base, extend
        self._checkpoints = Path()

    def setup(self, trainer: pl.Trainer, model: Any = None) -> None:
        """Choose the checkpoint, and have the trainer compare it with this start before the model is built."""
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        self._checkpoints = Path(folder or Path(AppState().log_dir, "checkpoints"))
        super().setup(trainer, model)
        # First: a resumption that is refused must not have touched anything, and others read what it changes.
        trainer.callbacks = [_Resumption(self.extend, self.base), *trainer.callbacks]

    def _find_trainer_ckpt_path(self) -> Path | None:
        base = self.restore_config.path if self.restore_config else None
        exit_with_the_message()  # NeMo asks before any callback's setup
        # By what is whole, not by NeMo's `-last`.
        newest = to_resume(self._checkpoints)
        if newest is None:
            check_base(base)
            return None
        for each in damaged_since(self._checkpoints):
            _say(f"{each.path.name} is damaged ({each.fault}); resuming from {newest.path.name}")
        check_resumed(newest.path, base)
        return newest.path

    def _get_base_model_path_for_adapter(self, adapter_meta_path: Path, model: Any) -> Path:
        checkpoint = adapter_meta_path.parents[1]
        named = Path(self.restore_config.path) if self.restore_config else None
        # `check_resumed` has compared their weights, where the checkpoint knows those that it began with.
        found = recorded_base(checkpoint) or (named if base_weights_of(checkpoint) else None)
        if found and found.exists():
            return found
        base = super()._get_base_model_path_for_adapter(adapter_meta_path, model)
        raise CptError(f"this run trains adapters, and needs its base in {base} to go on. Put it back there")


def check_start(recipe: Any) -> None:
    """Raise CptError unless a recipe's run has something to start from: a whole checkpoint of its own, or its base.

    Args:
        recipe: the `run.Partial` of a recipe function.
    """
    log, base = recipe.log, getattr(recipe.resume, "base", None)
    folder = Path(getattr(log, "log_dir", None) or "nemo_experiments", str(getattr(log, "name", None) or "default"))
    trains_adapters = getattr(recipe, "peft", None) is not None  # whose checkpoints do not hold the base
    if trains_adapters or newest_whole(folder / "checkpoints") is None:
        check_base(base)


class _Resumption(pl.Callback):
    """Compares a checkpoint's run with this start of it, and changes the schedule if that was asked for."""

    def __init__(self, extend: str | None, base: str | None) -> None:
        self.extend, self.base = extend, base
        self._new_state: dict[str, Any] | None = None  # of the scheduler, where the schedule changes

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare, and write down this start."""
        settings, checkpoint = settings_of(trainer), resumed_from(trainer.ckpt_path)
        if trainer.is_global_zero:
            _write_down(Path(AppState().log_dir), settings, checkpoint, self.base)
        if checkpoint is None or "settings" not in checkpoint.record:
            return
        changed = changes(checkpoint.record["settings"], settings)
        check_goes_on(checkpoint, changed, self.extend)
        if self.extend != "keep" and any(each.group == "schedule" for each in changed):
            self._note_new_schedule(trainer, checkpoint.step)
        if changed:
            how = f", extend={self.extend}" if any(each.group == "schedule" for each in changed) else ""
            _say(f"resumed at step {checkpoint.step} with {listed(changed)}{how}")
        for each in changed:
            if each.name == "max_steps":
                _tell_of_another_order(trainer, each)
        if others := validated_otherwise(trainer):
            _say(f"from here on losses of {', '.join(others)} are of other samples, and not compared with those before")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the tokenizer, once no other callback's setup has refused this start with it."""
        if trainer.is_global_zero:
            _keep_tokenizer(trainer, Path(AppState().log_dir, KEPT_TOKENIZER))

    def _note_new_schedule(self, trainer: pl.Trainer, done: int) -> None:
        """Have the scheduler that the trainer makes noted down, before a checkpoint's state is loaded into it."""
        module = trainer.lightning_module.optim.lr_scheduler
        make, rewarms = module.scheduler, self.extend == "rewarm"
        steps = trainer.max_steps - done if rewarms else trainer.max_steps
        if rewarms and getattr(module, "warmup_steps", 0) >= steps:
            raise CptError(
                f"extend=rewarm: warmup_steps {module.warmup_steps} is not below the {steps} steps that are left of "
                f"max_steps {trainer.max_steps}: give a smaller one, or more steps"
            )

        def noted(*args: Any) -> Any:
            # By now NeMo has given it the trainer's max_steps.
            module.max_steps = steps
            made = make(*args)
            # One step more than epochs: the constructor of PyTorch's schedulers takes a step.
            position = {} if rewarms else {"last_epoch": done, "_step_count": done + 1}
            self._new_state = copy.deepcopy(made["lr_scheduler"]["scheduler"].state_dict()) | position
            return made

        module.scheduler = noted

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Put the new schedule in the place of the old one, and let the first step have its rate."""
        if self._new_state is None:
            return
        # No earlier: NeMo restores the optimizer and the schedule of adapters when the first epoch has begun.
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        scheduler.load_state_dict(self._new_state)
        self._new_state = None
        with _enable_get_lr_call(scheduler):
            rates = scheduler.get_lr()
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            # The scheduler sets a rate only after a step: the first one would still have the old schedule's.
            group["lr"] = rate
        scheduler._last_lr = rates


def _tell_of_another_order(trainer: pl.Trainer, steps: Change) -> None:
    """Say where what is left of a text no longer is what the run has not yet seen; see `ResumeOrStartFromBase`."""
    texts = getattr(trainer.datamodule, "training_texts", None)
    if names := in_another_order(texts, steps.was / steps.now) if texts is not None else []:
        _say(
            f"warning: Megatron draws another order of {', '.join(names)} for {steps.now} steps than for {steps.was}: "
            "what is left of a pass repeats texts that were trained, and leaves out others"
        )


def _write_down(folder: Path, settings: dict[str, Any], checkpoint: Checkpoint | None, base: str | None) -> None:
    """One line a start, for whoever wants to know how a run came about."""
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "resumed_from": checkpoint.path.name if checkpoint else None,
        "base": base and str(Path(base).absolute()),
        "settings": settings,
    }
    append_metrics(folder, start, STARTS)


def _keep_tokenizer(trainer: pl.Trainer, kept: Path) -> None:
    """Copy the tokenizer's folder into the run's, and let checkpoints take theirs from there.

    NeMo copies it from its source into each checkpoint, and only warns if it is gone; an export needs it.
    """
    tokenizer = getattr(trainer.lightning_module.__io__, "tokenizer", None)
    source = getattr(tokenizer, "pretrained_model_name", None)
    if tokenizer is None or source is None or not Path(source).is_dir():  # a name on the hub
        return
    if not (kept.is_dir() and kept.samefile(source)):
        # Beside and renamed: a job that is killed in the copy leaves no half tokenizer for the next one.
        partial = kept.with_name(f"{kept.name}.part")
        for left_before in (partial, kept):
            shutil.rmtree(left_before, ignore_errors=True)
        # Of a model's folder not the weights, and no folder: NeMo copies file by file, and would end at it.
        copy_small_files(source, partial, in_checkpoint=True)
        for note in (path for path in Path(source).glob(".*") if path.is_file()):  # where its model comes from, sums
            shutil.copyfile(note, partial / note.name)
        partial.rename(kept)
    tokenizer.pretrained_model_name = str(kept)


def _say(message: str) -> None:
    from nemo.utils.get_rank import is_global_rank_zero

    if is_global_rank_zero():
        print(f"nemo_cpt: {message}", flush=True)
