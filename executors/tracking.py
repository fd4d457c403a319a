"""One W&B run for one training, over requeues, restarts and new submissions."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.atomic_files import make_folder, write_whole

EXPERIMENT = "NEMO_CPT_EXPERIMENT"


def continue_wandb_run(recipe: Any) -> str | None:
    """Give the logger the id noted beside the recipe's checkpoints, and note it there at the first start.

    A run that resumes its checkpoints thus resumes its W&B run, however it was started again; one whose results folder
    was removed starts a new one. An id that the user set, in the environment or on the logger, stands.

    Args:
        recipe: the run.Partial of a recipe; one without a W&B logger is left alone.

    Returns:
        The id, or None where it is not ours to choose.
    """
    log = getattr(recipe, "log", None)
    wandb = getattr(log, "wandb", None)
    given, experiment = os.environ.get("WANDB_RUN_ID"), os.environ.get(EXPERIMENT)
    # What the user chose stands.
    if not wandb or getattr(wandb, "id", None) or getattr(wandb, "version", None) or (given and given != experiment):
        return None
    note = _results(log) / "wandb" / "run_id"  # NeMo moves files, but not folders, away when it resumes
    known = note.read_text().strip() if note.is_file() else ""
    run_id = known or given or uuid.uuid4().hex[:12]
    # One writes; the others of this start have the same id from the environment, or log nothing.
    if not known and _is_first_process():
        make_folder(note.parent)
        write_whole(note, run_id.encode())
    wandb.id = run_id  # not WANDB_RUN_ID: another recipe's run in this process is another one; Lightning resumes it
    return run_id


@contextlib.contextmanager
def in_its_wandb_run(recipe: Any) -> Iterator[None]:
    """`continue_wandb_run` for a while, of a recipe that its user keeps and may train under another name."""
    ours = continue_wandb_run(recipe)
    try:
        yield
    finally:
        if ours:
            del recipe.log.wandb.id


def _results(log: Any) -> Path:
    """The folder that NeMoLogger writes to, by its rules."""
    explicit = getattr(log, "explicit_log_dir", None)
    folder = getattr(log, "log_dir", None) or "nemo_experiments"
    return Path(explicit or Path(folder) / (getattr(log, "name", None) or "default"))


def _is_first_process() -> bool:
    return not any(int(os.environ.get(name, 0)) for name in ("RANK", "SLURM_PROCID"))
