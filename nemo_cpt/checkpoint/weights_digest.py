"""What tells the weights that a run began with from others', wherever they lie now. Imports no numpy until it reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_cpt.checkpoint.context import HF_FOLDER
from nemo_cpt.checkpoint.provenance import trainings_of

BASE_WEIGHTS = "base_weights"  # in a checkpoint's record: `weights_digest` of the base that its run began with


def base_weights_of(checkpoint: Path) -> str | None:
    """The `weights_digest` of the base that a checkpoint's run began with; None where an older version wrote it."""
    trainings = trainings_of(checkpoint)
    return trainings[-1].get(BASE_WEIGHTS) if trainings else None


def weights_digest(base: Path) -> str:
    """What tells a base's weights from others': the same for a copy of it, and for another import of one model."""
    # A training's checkpoint carries the sums of its own base: its files are looked at.
    sums = sums_of(base)
    return _digest(sorted(sums.items()) if sums else samples(base))


def are_of_the_base(sums: Mapping[str, int], checkpoint: Path) -> bool:
    """Whether the sums that a checkpoint carries are those of the base that its run began with.

    A run that began with another training's checkpoint carries those of that training's base.
    """
    began_with = base_weights_of(checkpoint)
    if began_with is not None:
        return began_with == _digest(sorted(sums.items()))
    return len(trainings_of(checkpoint)) < 2  # an older version's


def sums_of(base: Path) -> dict[str, int] | None:
    """The checksums of an import's tensors; None for an import of 0.1.0, and for a training's checkpoint."""
    from nemo_cpt.checkpoint.weight_sums import read_sums

    return read_sums([base / HF_FOLDER])


def samples(base: Path) -> list[tuple[str, str]]:
    """The digests of samples of a checkpoint's files, by their names."""
    from nemo_cpt.corpus.dataset.index import sample_digest

    return [(path.name, sample_digest(path)) for path in sorted(base.glob("weights/*.distcp"))]


def _digest(known: Sequence[tuple[str, int]] | Sequence[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
