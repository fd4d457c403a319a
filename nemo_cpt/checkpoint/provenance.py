"""Where a model comes from: the base on the hub, and the trainings since; a hidden file that goes with its small files.

An import, a training, a merge and an export each hand it on, so that what is published can say what it is. It stays on
this machine: runs name their files by their paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.context import RUN_JSON
from nemo_cpt.checkpoint.download_record import read_record
from nemo_cpt.records import restored

BEFORE = "before"  # in run.json: the records of the trainings that led to the checkpoint that the run started from
_FILE = ".provenance.json"


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from.

    Attributes:
        repo_id: the base's name on the hub; None where it was not downloaded with `download`.
        commit: of the revision that was downloaded.
        trainings: what was recorded of each training since, as its checkpoint's `run.json` has it, the first one first.
        from_scratch: the first training began with random weights.
    """

    repo_id: str | None = None
    commit: str | None = None
    trainings: Sequence[Mapping[str, Any]] = ()
    from_scratch: bool = False


def read_provenance(folder: Path) -> Provenance:
    """Where the model of a Hugging Face folder comes from, as far as that is known."""
    try:
        return restored(Provenance, json.loads((folder / _FILE).read_bytes()))
    except FileNotFoundError:
        downloaded = read_record(folder)
        return Provenance(downloaded.repo_id, downloaded.commit) if downloaded else Provenance()
    except (ValueError, TypeError):
        return Provenance()


def hand_on(source: Path, dest: Path, checkpoint: Path | None = None) -> None:
    """Let a folder say where its model comes from: where the source's does, and from the training of a checkpoint."""
    known = read_provenance(source)
    own = trainings_of(checkpoint) if checkpoint else []
    found = replace(known, trainings=[*known.trainings, *own])
    if found != Provenance(trainings=[]):
        write_provenance(dest, found)


def write_provenance(folder: Path, known: Provenance) -> None:
    """Let a folder say where its model comes from."""
    (folder / _FILE).write_text(json.dumps(asdict(known), indent=1) + "\n", encoding="utf-8")


def trainings_of(checkpoint: Path) -> list[Mapping[str, Any]]:
    """The trainings that led to a checkpoint, its own last; empty for one that was imported or merged."""
    try:
        record = json.loads((checkpoint / RUN_JSON).read_bytes())
        # Flat, not nested: each record once, in the order of the trainings.
        return [*record.pop(BEFORE, []), record]
    except (OSError, ValueError, AttributeError, TypeError):
        return []
