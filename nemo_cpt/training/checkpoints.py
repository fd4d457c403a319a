"""When a run's checkpoints are written and removed."""

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.io.pl import TrainerContext
from nemo.utils import AppState, logging
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO

from nemo_cpt.checkpoint.context import RUN_JSON
from nemo_cpt.errors import CptError
from nemo_cpt.training.metrics import RUN_FILE, read_file, validation_losses
from nemo_cpt.training.record import record_of, settings_of
from nemo_cpt.training.run_folder import DAMAGED, REMOVED, Checkpoint, based_on, damaged_since
from nemo_cpt.training.run_lock import check_held

OTHER_SAMPLES = 1e6  # added to a loss that is not to be compared: above any of this start's


class RunCheckpoint(nl.ModelCheckpoint):
    """NeMo's ModelCheckpoint, which also writes where nothing is validated, and always the end of a run.

    A checkpoint is written every `save_every` steps and at the last one; at a step that is validated, after it. The
    `save_top_k` best ones are kept, by the loss of the validation at their step, and always the newest one. A run
    without validation keeps the newest `save_top_k`.

    Args:
        save_every: steps between checkpoints; the trainer's `val_check_interval` when None.
        **kwargs: see NeMo's `ModelCheckpoint`.
    """

    monitor: str | None
    always_save_context: bool
    best_k_models: dict[str, torch.Tensor]

    def __init__(self, save_every: Optional[int] = None, **kwargs: Any) -> None:  # noqa: UP045  NeMo-Run cannot parse it
        if save_every is not None and save_every < 1:
            raise CptError(f"save_every is {save_every}: give the steps between checkpoints, 1 or more")
        super().__init__(**kwargs)
        self.save_every = save_every
        self.writes_context, self.always_save_context = self.always_save_context, False  # see _save_checkpoint
        self.validates = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle when to save, and clear away what a killed job left half-written, half-removed or damaged."""
        self._fit_to_validation(trainer)
        if trainer.is_global_zero:
            # Before anything is removed: a job that was suspended for long may have lost the folder to its successor.
            check_held(Path(AppState().log_dir))
            self._clear_away(Path(self.dirpath))
        super().setup(trainer, pl_module, stage)

    def _fit_to_validation(self, trainer: pl.Trainer) -> None:
        if isinstance(trainer.val_check_interval, int) and 0 < trainer.max_steps < trainer.val_check_interval:
            if trainer.is_global_zero:
                print(
                    f"nemo_cpt: val_check_interval {trainer.val_check_interval} is above max_steps {trainer.max_steps}"
                    ": validating and saving once, at the end",
                    flush=True,
                )
            # Lightning refuses an interval that lies above the number of batches.
            trainer.val_check_interval = trainer.max_steps
        self.validates = bool(trainer.limit_val_batches and getattr(trainer.datamodule, "validation_names", True))
        # A loss that is never measured: nothing would ever be saved. By steps, the newest are the best.
        if not self.validates and (self.monitor or "").startswith("val_"):
            self.monitor, self.mode, self.kth_value = "steps", "max", torch.tensor(-torch.inf)

    def _clear_away(self, folder: Path) -> None:
        for removed in folder.glob(f"{REMOVED}*"):
            shutil.rmtree(removed, ignore_errors=True)
        for damaged in damaged_since(folder):
            (folder / DAMAGED).mkdir(exist_ok=True)
            damaged.path.rename(folder / DAMAGED / f"{damaged.path.name}-{uuid.uuid4().hex[:8]}")
        for link in folder.glob("*"):
            # NeMo's `-last` may link to a checkpoint that was just set aside, and would be taken for one that is there.
            if link.is_symlink() and not link.exists():
                link.unlink()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the checkpoints that are there, by their names; those that were loaded may be of another folder."""
        super().on_train_start(trainer, pl_module)
        self._rank_last_unless_validated_on(settings_of(trainer)["validation"])
        last = [Checkpoint(path) for path in Path(self.dirpath).glob("[!.]*-last") if path.exists()]
        last.sort(key=lambda each: each.age_order)
        self.last_model_path = str(last[-1].path) if last else ""
        for each in last[:-1]:
            self._remove_checkpoint(trainer, str(each.path), override_async=True)

    def _rank_last_unless_validated_on(self, validation: Mapping[str, Any]) -> None:
        """Let checkpoints whose losses are of other samples give way to the next ones, the worst of them first."""
        validations = {path: Checkpoint(Path(path)).validation for path in self.best_k_models}
        others = [path for path, was in validations.items() if was not in (None, validation)]
        if others and (self.monitor or "").startswith("val_"):
            self.best_k_models |= {path: self.best_k_models[path].double() + OTHER_SAMPLES for path in others}
            self._remove_invalid_entries_from_topk()  # which looks for the worst anew

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Save where this step is due and no validation follows, whose end would save."""
        # Where one follows, its loss belongs into the name, and on_validation_end saves.
        if self._due(trainer) and not self._validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation, if its step is due."""
        if self._due(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end, wherever it came. NeMo's counts on the last validation where the interval divides the step."""
        # Twice: `_save` may find nothing to do where only the best are kept, and the end has to be on disk all the
        # same.
        if not self._should_skip_saving_checkpoint(trainer):
            self._save(trainer)
        if not self._should_skip_saving_checkpoint(trainer):
            save_last(self, trainer)

    def _validation_follows(self, trainer: pl.Trainer) -> bool:
        return self.validates and trainer.fit_loop.epoch_loop._should_check_val_fx(None)

    def _due(self, trainer: pl.Trainer) -> bool:
        if self._should_skip_saving_checkpoint(trainer):
            return False
        step = trainer.global_step
        # By the global step, which a resumed run counts on; Lightning counts batches since the start.
        return step % (self.save_every or trainer.val_check_batch) == 0 or 0 < trainer.max_steps <= step

    def _save(self, trainer: pl.Trainer) -> None:
        measured = self._monitor_candidates(trainer)
        if self.monitor in measured:
            self._save_topk_checkpoint(trainer, measured)
        # After the top-k: the newest is always kept, whatever its loss.
        self._save_last_checkpoint(trainer, measured)

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        """What was measured at this very step: not the loss of an earlier validation. NeMo's `step` is one less."""
        measured = super()._monitor_candidates(trainer)
        if trainer.fit_loop.epoch_loop.validated_step != trainer.global_step:
            measured = {name: value for name, value in measured.items() if not name.startswith("val_")}
        return measured | {"steps": torch.tensor(float(trainer.global_step))}

    def format_checkpoint_name(
        self, metrics: dict[str, torch.Tensor], filename: str | None = None, ver: int | None = None
    ) -> str:
        """A name without what was not measured, of which Lightning writes a 0."""
        fields = re.compile(r"-?\{(\w+)[^}]*\}")
        name = fields.sub(lambda field: field[0] if field[1] in metrics else "", filename or self.filename)
        return super().format_checkpoint_name(metrics, name.lstrip("-"), ver)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write a checkpoint with its `run.json`, unless another job took the run's folder.

        The context that an export needs is written first: NeMo writes it last, and where a full disk has no room for it
        warns, and calls the checkpoint finished.
        """
        if trainer.is_global_zero:
            check_held(Path(AppState().log_dir))
            # Before the first byte: from here to its removal nobody takes the folder for a checkpoint.
            self.set_checkpoint_unfinished_marker(filepath)
            folder = ckpt_to_dir(filepath)
            folder.mkdir(parents=True, exist_ok=True)
            described = read_file(AppState().log_dir, RUN_FILE)
            record = record_of(trainer) | {
                "validation_pending": self._validation_follows(trainer),
                "losses": validation_losses(AppState().log_dir),
                **{name: described.get(name) for name in ("launched", "versions")},
            }
            (folder / RUN_JSON).write_text(json.dumps(record, indent=1))
            if self.writes_context:
                _write_context(trainer, folder)
        super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str, override_async: bool = False) -> None:
        """Remove a checkpoint by renaming it first: a job that is killed meanwhile leaves no half one."""
        if self.async_save and not override_async:
            return super()._remove_checkpoint(trainer, filepath)  # which keeps it until the new one is written
        folder = ckpt_to_dir(filepath)
        if not trainer.is_global_zero or not os.path.lexists(folder):
            return None
        if folder.is_symlink():
            return folder.unlink()
        if self._is_needed(folder):
            return None
        # A rename is one step for every reader; removing tens of GB of files is not.
        removed = folder.rename(folder.with_name(REMOVED + uuid.uuid4().hex))
        # In a thread: removing tens of GB takes a while, in which the training can go on.
        remover = threading.Thread(target=shutil.rmtree, args=(removed, True))
        remover.start()
        if not self.async_save:
            remover.join()
        return None

    def _is_needed(self, checkpoint: Path) -> bool:
        """Whether adapters of a run beside this one were trained on a checkpoint: without it they are worth nothing."""
        user = based_on(checkpoint, checkpoint.parents[2])
        if user:
            print(f"nemo_cpt: {checkpoint.name} is kept beyond save_top_k: it is the base of {user}", flush=True)
        return user is not None

    def nemo_topk_check_previous_run(self) -> None:
        """Find the kept checkpoints and their values by their names, and remove those beyond `save_top_k`.

        NeMo's looks for the values in the whole path, and may remove the newest, which the run resumes from.
        """
        value = re.compile(rf"(?:^|-){self.monitor}=(-?[0-9.]+)")
        found = {path: value.search(path.name) for path in self._saved_checkpoint_paths if not path.is_symlink()}
        # A run's own names end with a value: what somebody copied beside them is not thinned.
        own = re.compile(r"=-?\d+(?:\.\d+)?$")
        kept = {path: float(match[1]) for path, match in found.items() if match and own.search(path.name)}
        ranked = sorted(kept, key=kept.__getitem__, reverse=self.mode == "max")
        newest = max(ranked, key=lambda path: Checkpoint(path).age_order, default=None)
        for path in ranked[self.save_top_k :]:
            if path != newest and not self._is_needed(path):
                self._del_model_without_trainer(str(path))
        # Of more than save_top_k Lightning would never again remove one.
        self.best_k_models = {str(path): torch.tensor(kept[path]) for path in ranked[: self.save_top_k]}
        self._remove_invalid_entries_from_topk()


def _write_context(trainer: pl.Trainer, folder: Path) -> None:
    try:
        TrainerContext.from_trainer(trainer).io_dump(folder / "context", yaml_attrs=["model"])
    except OSError:
        raise
    except Exception as error:  # as NeMo: of what cannot be serialized an export alone wants to know
        logging.warning(f"Failed to dump training context for checkpoint {folder}: {error}")


def save_last(checkpoint: nl.ModelCheckpoint, trainer: pl.Trainer) -> None:
    """Write the `-last` checkpoint of this step, also where the run keeps none at other times."""
    measured = checkpoint._monitor_candidates(trainer)
    if checkpoint.save_last:
        checkpoint._save_last_checkpoint(trainer, measured)
    else:
        checkpoint._save_checkpoint(
            trainer, checkpoint.format_checkpoint_name(measured, checkpoint.CHECKPOINT_NAME_LAST)
        )


def save_now(trainer: pl.Trainer) -> None:
    """Have this step on disk: saved unless it is, and waited for.

    Raises:
        CptError: it is not, and cannot be.
    """
    checkpoint = trainer.checkpoint_callback
    if checkpoint is None:
        raise CptError("the run keeps no checkpoints (log.ckpt is None): what was trained since its start is lost")
    if checkpoint._last_global_step_saved != trainer.global_step:
        save_last(checkpoint, trainer)
    if isinstance(trainer.strategy.checkpoint_io, AsyncFinalizableCheckpointIO):
        trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
    # Looked at on the disk: NeMo's save may only warn, and a stop must not be reported as saved when it was not.
    saved = Checkpoint(ckpt_to_dir(checkpoint._last_checkpoint_saved))
    fault = trainer.strategy.broadcast("it is unfinished" if saved.unfinished else saved.fault)
    if fault:
        raise CptError(f"step {trainer.global_step} could not be saved: {fault}")
