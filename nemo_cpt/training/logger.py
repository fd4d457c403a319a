"""NeMo's logger for a run's folder that has one owner, and that a finished run is left alone in."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from nemo import lightning as nl
from nemo.constants import NEMO_ENV_VARNAME_VERSION
from nemo.utils import AppState
from nemo.utils.get_rank import is_global_rank_zero

from nemo_cpt.errors import CptError, exit_with_the_message
from nemo_cpt.training.changes import check_finished
from nemo_cpt.training.full_disk import say_which_disk_is_full
from nemo_cpt.training.record import deciding_settings
from nemo_cpt.training.run_folder import finished, newest_whole
from nemo_cpt.training.run_lock import RunLock, hold, this_job, wait_until_held_by


class RunLogger(nl.NeMoLogger):
    """NeMo's logger, which first takes the run's folder for this job, or finds that there is nothing left to train.

    Before anything is read or written there, rank 0 locks the folder, until the training has ended (see `run_lock`).

    Raises:
        CptError: another job holds the folder; nothing in it was touched.
    """

    def setup(self, trainer: nl.Trainer, resume_if_exists: bool = False, task_config: Any = None) -> AppState:
        """Lock the folder and set up logging; in a finished run do neither, and let `trainer.fit` only compare."""
        exit_with_the_message()
        folder = self._folder()
        checkpoints = Path(getattr(self.ckpt, "dirpath", None) or folder / "checkpoints")
        # Before the lock: a rerun of what is finished must not need to write, or to wait for anybody.
        if resume_if_exists and (said := finished(checkpoints, trainer.max_steps)):
            return _leave_alone(trainer, folder, checkpoints, said)
        # One owner a job: the other ranks only see to it that it is theirs.
        lock = hold(folder) if is_global_rank_zero() else None
        if lock is None:
            wait_until_held_by(this_job(), folder)
        _guard(trainer, folder, checkpoints, lock)
        return super().setup(trainer, resume_if_exists, task_config)

    def _folder(self) -> Path:
        """The run's folder, by NeMoLogger's rules."""
        if self.explicit_log_dir:
            return Path(self.explicit_log_dir)
        version = self.version or os.environ.get(NEMO_ENV_VARNAME_VERSION) or ""
        return Path(self.log_dir or Path.cwd() / "nemo_experiments", str(self.name or "default"), version)


def _guard(trainer: nl.Trainer, folder: Path, checkpoints: Path, lock: RunLock | None) -> None:
    """Let `trainer.fit` say that a disk is full, end W&B's run, and let go of the folder.

    After an error the lock stays until the process ends: checkpoint writers may still be at work.
    """
    fit = trainer.fit

    def guarded_fit(*args: Any, **kwargs: Any) -> None:
        with say_which_disk_is_full(folder, checkpoints, clear_away=lock is not None), _ending_wandb_runs(trainer):
            fit(*args, **kwargs)
        if lock is not None:
            lock.release()

    # On the instance: NeMo's entry points call `trainer.fit` themselves, after this.
    trainer.fit = guarded_fit


@contextlib.contextmanager
def _ending_wandb_runs(trainer: nl.Trainer) -> Iterator[None]:
    """End W&B's run with the training: the next one in this process would be logged to it, and a forked one lose it."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    except CptError as error:
        exit_code = error.exit_code
        raise
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger._experiment.finish(exit_code=exit_code)


def _leave_alone(trainer: nl.Trainer, folder: Path, checkpoints: Path, said: str) -> AppState:
    state = AppState()
    state.log_dir, state.exp_dir = folder, str(folder.parent)

    def compare(model: Any, datamodule: Any = None, **kwargs: Any) -> None:
        newest = newest_whole(checkpoints)
        if newest is not None:
            check_finished(newest, deciding_settings(model, datamodule, trainer.max_steps, trainer.callbacks))
        if is_global_rank_zero():
            print(f"nemo_cpt: {said}", flush=True)

    # `llm.train` calls it whatever we find, when the model has its optimizer; returning, it ends with exit code 0.
    trainer.fit = compare
    return state
