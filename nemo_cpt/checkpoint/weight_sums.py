"""Checksums of a base's tensors, by which a LoRA run's checkpoint knows the weights that it was trained on.

An import writes them beside the small files of its model; NeMo copies those into each checkpoint of a training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from isal.isal_zlib import crc32

from nemo_cpt.checkpoint.arrays import bits
from nemo_cpt.errors import CptError

_FILE = ".weights.json"


class WeightSums:
    """The CRC-32 of every tensor, by its Hugging Face name, added block by block."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}

    def add(self, name: str, block: np.ndarray) -> None:
        """Take the next rows of a tensor."""
        self._sums[name] = _crc32(block, self._sums.get(name, 0))

    def write(self, folder: Path) -> None:
        """Keep them in a folder."""
        (folder / _FILE).write_text(json.dumps(self._sums, indent=1) + "\n", encoding="utf-8")


def read_sums(folders: Iterable[Path]) -> dict[str, int] | None:
    """The sums that the first of the folders holds; None where none does.

    Raises:
        CptError: they cannot be read.
    """
    for folder in folders:
        if (folder / _FILE).is_file():
            try:
                return dict(json.loads((folder / _FILE).read_bytes()))
            except (OSError, ValueError, TypeError) as error:
                raise CptError(f"{folder / _FILE} cannot be read ({error}). Copy the checkpoint again.") from error
    return None


def checked(
    name: str, blocks: Iterable[np.ndarray], sums: Mapping[str, int] | None, where: Path
) -> Iterator[np.ndarray]:
    """Hand a base's tensor on, block by block, and compare it with its sum at the end.

    Raises:
        CptError: it is not the tensor of the base that the run started from.
    """
    found = 0
    for block in blocks:
        found = _crc32(block, found)
        yield block
    # Only at the end: its blocks have been used by then, but an export that fails leaves nothing behind.
    if sums is not None and sums.get(name) != found:
        raise CptError(
            f"{name} of {where} is not what the adapters were trained on: it is another model of the same shape, or "
            "another revision of it. Give base=, the one that the run started from."
        )


def sum_of(tensor: np.ndarray) -> int:
    """The sum of a whole tensor."""
    return _crc32(tensor, 0)


def _crc32(array: np.ndarray, before: int) -> int:
    return int(crc32(bits(np.ascontiguousarray(array).reshape(-1)).data.cast("B"), before))
