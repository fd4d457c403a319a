"""What is in a run's folder, read without torch or NeMo: its checkpoints, and which of them are whole.

FOLDER/checkpoints/NAME/            weights/, context/ and `run.json`: the step, and how the run was started
FOLDER/checkpoints/NAME-unfinished  NeMo's mark of one that is being written
FOLDER/run/                         who holds the folder (`run_lock`), and a line for each start of it
FOLDER/checkpoints/damaged/         checkpoints that a start set aside
FOLDER/exports/step-N               `exports`
FOLDER/metrics/steps.jsonl          `metrics`
"""

import itertools
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.context import RUN_JSON, UNFINISHED
from nemo_cpt.errors import CptError
from nemo_cpt.training.metrics import read_lines

REMOVED = ".removed-"  # a checkpoint that is being deleted
DAMAGED = "damaged"  # folder of those that a start set aside
STARTS = "run/starts.jsonl"  # of a run's folder
EXPORTS = "exports"  # folder of a run, beside its checkpoints: see `exports`
EXPORTED = ".checkpoint-of-"  # in it: a checkpoint's files, until they are exported
DUE = ".due-"  # in it: the mark of a step that is to be exported, until its checkpoint's files are there


@dataclass(frozen=True)
class Checkpoint:
    """One training checkpoint.

    Attributes:
        path: its folder.
    """

    path: Path

    @property
    def unfinished(self) -> bool:
        """Whether it is being written, or was when its run was killed."""
        return self.path.with_name(self.path.name + UNFINISHED).exists()

    @cached_property
    def fault(self) -> str | None:
        """What is missing of it, None if it is whole: every byte that `.metadata` promises is there.

        The content is not read: damage that keeps the sizes is found by `nemo-cpt verify`.
        """
        from nemo_cpt.checkpoint.distributed_reader import DistributedReader  # needs numpy, which the doctor may miss

        weights = self.path / "weights"
        try:
            DistributedReader(weights).check_sizes()
            json.loads((weights / "metadata.json").read_bytes())
        except CptError as error:
            return str(error).removesuffix(" Copy the checkpoint again.").rstrip(".")
        except ValueError:
            return f"{weights / 'metadata.json'} is no JSON"
        # torch.save writes a zip, whose directory stands at the end: a file that was cut short has none.
        return None if zipfile.is_zipfile(weights / "common.pt") else f"{weights / 'common.pt'} is missing or cut short"

    @cached_property
    def record(self) -> dict[str, Any]:
        """Its `run.json`; empty if it has none."""
        try:
            return json.loads((self.path / RUN_JSON).read_bytes())
        except (OSError, ValueError):
            return {}

    @cached_property
    def step(self) -> int:
        """The optimizer steps that are in it, by its `run.json` or its name; -1 if neither says."""
        named = re.search(r"(?:^|-)steps?=(\d+)", self.path.name)
        # The file before the name, which people change when they copy a checkpoint.
        if "step" in self.record:
            return int(self.record["step"])
        return int(named[1]) if named else -1

    @property
    def validation(self) -> Mapping[str, Any] | None:
        """What its losses are of: the sets' content, and how much of each; None where an older version says nothing."""
        found: Mapping[str, Any] | None = self.record.get("settings", {}).get("validation")
        return found

    @property
    def age_order(self) -> tuple[int, int]:
        """Sorts from old to new: by step, because a copy has other times; the time only breaks ties."""
        return self.step, (self.path / "weights").stat().st_mtime_ns


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a run's `checkpoints` folder, the newest first; neither links to them nor unfinished ones."""
    # Links are left out: NeMo's `-last` may be one, and its target would count twice.
    found = [Checkpoint(path) for path in folder.glob("[!.]*") if (path / "weights").is_dir() and not path.is_symlink()]
    return sorted((each for each in found if not each.unfinished), key=lambda each: each.age_order, reverse=True)


def resumed_from(path: str | Path | None) -> Checkpoint | None:
    """The checkpoint of a trainer's `ckpt_path`, which may name its `weights`; None for a run that begins."""
    found = Path(str(path)) if path else None
    return Checkpoint(found.parent if found.name == "weights" else found) if found else None


def newest_whole(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a run's `checkpoints` folder of which everything is there."""
    return next((each for each in checkpoints(folder) if each.fault is None), None)


def to_resume(folder: Path) -> Checkpoint | None:
    """The checkpoint in a run's `checkpoints` folder that it would go on from; None for a run that has yet to start.

    Raises:
        CptError: there are checkpoints, and none of them is whole.
    """
    newest, damaged = newest_whole(folder), damaged_since(folder)
    if newest is None and damaged:
        faults = "; ".join(f"{each.path.name}: {each.fault}" for each in damaged)
        raise CptError(
            f"no checkpoint of this run in {folder} is whole ({faults}). Copy one of them again; to train anew from "
            f"the base instead, remove {folder}, or give the run another name"
        )
    return newest


def damaged_since(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a run's `checkpoints` folder that are newer than the newest whole one."""
    return list(itertools.takewhile(lambda each: each.fault, checkpoints(folder)))


def based_on(checkpoint: Path, directory: Path) -> Path | None:
    """The run in a folder of runs whose adapters are trained on a checkpoint, and which an export of them reads."""
    from nemo_cpt.checkpoint.lora import LAST, recorded_base  # needs numpy, as above

    for record in directory.glob("*/checkpoints/*/weights/adapter_metadata.json"):
        try:
            named = Path(json.loads(record.read_bytes())["model_ckpt_path"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        # By name first: to find a base wherever it lies takes a look at its files.
        if checkpoint.name.removesuffix(LAST) not in {part.removesuffix(LAST) for part in named.parts[-2:]}:
            continue
        if (base := recorded_base(record.parents[1])) and base.resolve() == checkpoint.resolve():
            return record.parents[3]
    return next((run for run, base in _begun(directory) if base.resolve() == checkpoint.resolve()), None)


def _begun(directory: Path) -> Iterator[tuple[Path, Path]]:
    """The runs of adapters in a folder of runs, with the base of their last start: they need not have saved any yet."""
    for starts in directory.glob(f"*/{STARTS}"):
        try:
            last = read_lines(starts.parents[1], STARTS)[-1]
            if last["settings"]["adapters"]["peft"] and last["base"]:
                yield starts.parents[1], Path(last["base"])
        except (OSError, KeyError, TypeError, IndexError):
            continue


def finished(folder: Path, max_steps: int, exporting: bool = True) -> str | None:
    """What to say of a run whose checkpoints in `folder` have reached `max_steps`; None if there is something to do.

    Args:
        folder: of its checkpoints.
        max_steps: of the start that asks.
        exporting: whether that start exports along the way: only then it makes the exports that the run still owes.
    """
    newest = newest_whole(folder)
    # `validation_pending`: stopped between its last step and the validation of it, which a rerun still owes.
    if newest is None or not 0 < max_steps <= newest.step or newest.record.get("validation_pending"):
        return None
    # Killed before its last exports were made, which a rerun does.
    if exporting and any(any(folder.with_name(EXPORTS).glob(f"{owed}*")) for owed in (EXPORTED, DUE)):
        return None
    return (
        f"the run is finished: {newest.path} has step {newest.step} of max_steps {max_steps}. Nothing to do; "
        "to train on, give a larger max_steps, and extend=rewarm, stretch or keep: what becomes of the learning rate"
    )
