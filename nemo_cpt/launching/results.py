"""What runs there are, and the checkpoints of a run: listed and thinned out, without importing torch or NeMo-Run."""

import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nemo_cpt import catalog
from nemo_cpt.checkpoint.context import UNFINISHED
from nemo_cpt.errors import CptError
from nemo_cpt.training.metrics import RUN_FILE, read_file, read_metrics
from nemo_cpt.training.run_folder import DAMAGED, REMOVED, Checkpoint, based_on, checkpoints, finished, newest_whole
from nemo_cpt.training.run_lock import RunLock, check_free

DIRECTORY = Path("results")  # the recipes' own
_LOSS = "val_loss"
_LOSS_IN_NAME = re.compile(rf"(?:^|-){_LOSS}=(-?[0-9.]+)")


@dataclass(frozen=True)
class Run:
    """One run's folder.

    Attributes:
        folder: where it is.
    """

    folder: Path

    @cached_property
    def newest(self) -> Checkpoint | None:
        """The checkpoint that it would go on from, and that `export` takes."""
        return newest_whole(self.folder / "checkpoints")

    @cached_property
    def running(self) -> bool:
        """Whether a job holds it."""
        try:
            check_free(self.folder)
        except CptError:
            return True
        return False

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """What was measured, a dict a step."""
        return read_metrics(self.folder)

    @property
    def step(self) -> int:
        """The optimizer steps that are done: of a job that runs now those measured, else those that were saved."""
        saved = self.newest.step if self.newest else 0
        # Steps measured after the last save are lost when a run is resumed; of one that runs they are done.
        return max(saved, int(self.metrics[-1]["step"])) if self.running and self.metrics else saved

    @property
    def max_steps(self) -> int | None:
        """The steps that it was to train, by its last start, else by its newest checkpoint; None where neither says."""
        # The start first: of a run that was extended the checkpoints of before say the old number.
        if described := read_file(self.folder, RUN_FILE).get("max_steps"):
            return int(described)
        return self.newest.record.get("settings", {}).get("schedule", {}).get("max_steps") if self.newest else None

    @property
    def state(self) -> str:
        """`running`, `finished`, `stopped`, or `nothing saved` where no checkpoint is whole."""
        if self.running:
            return "running"
        if self.newest is None:
            return "nothing saved"
        return "finished" if finished(self.folder / "checkpoints", self.max_steps or 0) else "stopped"

    def losses(self, step: int | None = None) -> dict[str, float]:
        """Each validation set's loss at a step, at the last validation if none is given; empty if there was none.

        A loss that was NaN or infinite, which the file holds as null, is NaN.
        """
        found = [line for line in self.metrics if any(name.startswith(f"{_LOSS}_") for name in line)]
        chosen = found[-1:] if step is None else [line for line in found if line["step"] == step]
        return {
            name.removeprefix(f"{_LOSS}_"): math.nan if value is None else value
            for line in chosen
            for name, value in line.items()
            if name.startswith(f"{_LOSS}_")
        }

    def best_first(self, of: Iterable[Checkpoint]) -> list[Checkpoint]:
        """Checkpoints by their validation loss, the newer before the older.

        Those without one come last, and those with one of NaN, or of other samples than the newest checkpoint's.
        """
        now = self.newest.validation if self.newest else None

        def rank(checkpoint: Checkpoint) -> tuple[float, int]:
            named = _LOSS_IN_NAME.search(checkpoint.path.name)
            losses = self.losses(checkpoint.step)
            # In its name as it was saved; else from the metrics, for checkpoints between two validations.
            loss = float(named[1].rstrip(".")) if named else sum(losses.values()) / max(len(losses), 1)
            unknown = math.isnan(loss) or not (named or losses) or checkpoint.validation not in (None, now)
            return (math.inf if unknown else loss), -checkpoint.step

        return sorted(of, key=rank)


@dataclass(frozen=True)
class Removal:
    """What thinning a run out takes away.

    Attributes:
        path: a checkpoint's folder.
        why: it goes.
        size: its bytes.
    """

    path: Path
    why: str
    size: int


def runs(directory: Path = DIRECTORY) -> list[Run]:
    """The runs under a folder, by name.

    Raises:
        CptError: there is no such folder, or it holds no run.
    """
    if not directory.is_dir():
        raise CptError(f"there is no folder {directory} with runs; --directory names the recipe's directory=")
    found = [Run(path) for path in sorted(directory.iterdir()) if _is_run(path)]
    if not found:
        advice = f": {directory} is one itself, `nemo-cpt ls {directory}`" if _is_run(directory) else ""
        raise CptError(f"{directory} holds no run{advice}; --directory names the recipe's directory=")
    return found


def run(name: str | os.PathLike[str], directory: Path = DIRECTORY) -> Run:
    """A run by its name under `directory`, or by its folder.

    Raises:
        CptError: there is none, with the nearest names; or the folder holds none.
    """
    # A name first: a folder of that name in the current one is rarely a run.
    found = next((path for path in (directory / name, Path(name)) if _is_run(path)), None)
    if found is None:
        if folder := next((path for path in (directory / name, Path(name)) if path.is_dir()), None):
            raise CptError(f"{folder} holds no run: a run's folder has checkpoints or metrics in it{_runs_in(folder)}")
        names = [each.folder.name for each in runs(directory)]
        raise CptError(f"there is no run {str(name)!r} in {directory}; {catalog.nearest(str(name), names)}")
    return Run(found)


def _runs_in(folder: Path) -> str:
    names = [path.name for path in sorted(folder.iterdir()) if _is_run(path)]
    return f"; it is a folder of runs: name one of {', '.join(names[:5])} with --directory {folder}" if names else ""


def checkpoint_folder(source: Path) -> Path:
    """The checkpoint that a path names: itself, or of a run's folder its newest whole one.

    Raises:
        CptError: the run has none that is whole.
    """
    if not _is_run(source):
        return source
    newest = Run(source).newest
    if newest is None:
        raise CptError(f"{source} is a run without a whole checkpoint; `nemo-cpt ls {source}` lists what it has")
    return newest.path


def every_checkpoint(run: Run) -> list[tuple[Checkpoint, str]]:
    """A run's checkpoints, the newest first, each with its state: whole, unfinished, damaged or set aside."""
    folder = run.folder / "checkpoints"
    found = [(each, each.fault or "whole") for each in checkpoints(folder)]
    # `checkpoints` leaves these out: nothing can be done with them but to remove them.
    found += [(each, "unfinished") for each in map(Checkpoint, _folders(folder)) if each.unfinished]
    return found + [(Checkpoint(path), "set aside as damaged") for path in _folders(folder / DAMAGED)]


def size(folder: Path) -> int:
    """Bytes of the files in a folder; what is removed meanwhile counts nothing."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                # lstat: a link counts for itself, not for the checkpoint that it names.
                found += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return found


def to_remove(run: Run, keep: int) -> list[Removal]:
    """What goes where a run keeps `keep` checkpoints: its newest whole one, and of the others those with the best loss.

    Raises:
        CptError: `keep` is below 1, no checkpoint is whole, a job holds the run, or another run is based on one that
            would go.
    """
    if keep < 1:
        raise CptError(f"--keep {keep}: give 1 or more; the newest whole checkpoint always stays")
    check_free(run.folder)
    if run.newest is None:
        raise CptError(f"{run.folder} has no whole checkpoint: nothing of it is removed")
    whole = [each for each, state in every_checkpoint(run) if state == "whole" and each.path != run.newest.path]
    kept = {run.newest.path, *(each.path for each in run.best_first(whole)[: keep - 1])}
    others = [(each.path, state) for each, state in every_checkpoint(run) if each.path not in kept]
    for path, _ in others:
        # Adapters are worth nothing without the weights that they were trained on.
        if user := based_on(path, run.folder.parent):
            raise CptError(f"{path} is the base of {user}: export that run first, or keep more (--keep)")
    return [Removal(path, "beyond --keep" if state == "whole" else state, size(path)) for path, state in others]


def remove(run: Run, keep: int) -> list[Removal]:
    """Thin a run out as `to_remove` says, holding it meanwhile.

    Each checkpoint is renamed first, so that a kill leaves no half one under its name; the next start of the run, or
    of this, clears away what is left of it.

    Raises:
        CptError: as `to_remove`.
    """
    to_remove(run, keep)  # refused without touching the run's folder
    lock = RunLock(run.folder)
    lock.acquire()
    try:
        fresh = Run(run.folder)  # a job may have saved, and ended, since
        removals = to_remove(fresh, keep)
        for removal in removals:
            _remove(removal.path, run.folder / "checkpoints")
        for path in (run.folder / "checkpoints").iterdir():
            if path.name.startswith(REMOVED):
                shutil.rmtree(path)
            elif path.is_symlink() and not path.exists():
                path.unlink()
    finally:
        lock.release()
    return removals


def _remove(path: Path, folder: Path) -> None:
    path.rename(folder / f"{REMOVED}{uuid.uuid4().hex}")
    path.with_name(path.name + UNFINISHED).unlink(missing_ok=True)


def _folders(folder: Path) -> Sequence[Path]:
    """Folders of checkpoints, complete or not: neither hidden ones nor links."""
    named = (path for path in folder.glob("[!.]*") if path.is_dir() and not path.is_symlink())
    return sorted(path for path in named if path.name != DAMAGED)


def _is_run(path: Path) -> bool:
    return any((path / part).is_dir() for part in ("checkpoints", "metrics"))
