"""Where a run starts: at its own newest complete checkpoint, else at the base's weights."""

import os
from pathlib import Path
from typing import Optional

from nemo import lightning as nl
from nemo.lightning.pytorch.callbacks import ModelCheckpoint
from nemo.utils import AppState

from nemo_cpt.compatibility import check_resumed
from nemo_cpt.errors import exit_with_the_message
from nemo_cpt.training.preconditions import check_base


class ResumeOrStartFromBase(nl.AutoResume):
    """Resume the run from its newest complete checkpoint; without one, restore the base's weights and start afresh.

    NeMo's AutoResume looks at `*-last` alone and gives up when that one is unfinished, although an older checkpoint is
    whole; a run killed while it wrote could not come back. A start from the base restores no optimizer state and no
    schedule; a resumption restores both, and the position in the data.

    Args:
        base: folder of the NeMo checkpoint to continue from.

    Raises:
        CptError: there is neither a checkpoint of this run nor a complete base, or they are of two models.
    """

    def __init__(self, base: Optional[str] = None):  # noqa: UP045  NeMo-Run cannot parse `| None`
        restore = nl.RestoreConfig(path=str(base), load_artifacts=False) if base else None
        super().__init__(
            restore_config=restore, resume_if_exists=True, resume_past_end=True, resume_ignore_no_checkpoint=True
        )

    def _find_trainer_ckpt_path(self) -> Path | None:
        newest = newest_complete_checkpoint(Path(AppState().log_dir, "checkpoints"))
        base = self.restore_config.path if self.restore_config else None
        exit_with_the_message()  # NeMo asks before any callback's setup
        if newest is None:
            check_base(base)
        else:
            check_resumed(newest, base)
        return newest


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end, or None."""
    complete = [path for path in folder.glob("*") if is_complete(path)]
    return max(complete, key=lambda path: os.stat(path / "weights" / "metadata.json").st_mtime_ns, default=None)


def is_complete(checkpoint: Path) -> bool:
    """Whether a training checkpoint was written to its end (NeMo marks one that is being written or removed)."""
    weights = checkpoint / "weights"
    return (weights / "metadata.json").exists() and not ModelCheckpoint.is_checkpoint_unfinished(checkpoint)
