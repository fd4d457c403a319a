"""Hugging Face weights on disk: safetensors files read and written one tensor at a time. Nothing is unpickled."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from nemo_cpt.checkpoint.architecture import read_json
from nemo_cpt.checkpoint.arrays import BLOCK_BYTES, DTYPES, Buffers, bits, cast, read_into
from nemo_cpt.checkpoint.download_record import check_file, read_record
from nemo_cpt.checkpoint.folders import write_pieces
from nemo_cpt.checkpoint.layout import EMBEDDINGS
from nemo_cpt.errors import CptError

_CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SHARD_BYTES = 5_000_000_000  # what transformers' save_pretrained uses
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's data begins, its dtype ("bfloat16", "float16", "float32") and its shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


class HFWeights:
    """The tensors of a Hugging Face folder: `infos` lists them, `read` reads one.

    safetensors files hold no checksums; those that `download` noted in the folder are compared when a file is first
    read.

    Raises:
        CptError: no safetensors files, a shard that is missing, truncated, unreadable or not what was downloaded, a
            tensor that the index names and the shard lacks, or a dtype other than bfloat16, float16 and float32.

    Attributes:
        warnings: what else lies there and is not read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.infos: dict[str, TensorInfo] = {}
        self._buffers = Buffers()
        # What `download` noted; a file is compared once, when it is first read, not when it is opened.
        record = read_record(self.folder)
        self._unchecked = {self.folder / name: file for name, file in record.files.items()} if record else {}
        expected = _weight_map(self.folder)
        self.warnings = tuple(_passed_over(self.folder))
        # Headers alone: a few kB of each shard, from which every size and place is known.
        for path in sorted(set(expected.values())):
            self._read_header(path)
        if missing := [name for name, path in expected.items() if name and name not in self.infos]:
            raise CptError(
                f"{self.folder / _INDEX} lists tensors that its shards lack, {missing[0]} first ({len(missing)} in "
                "all). Download the folder again."
            )

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="np"):  # checks the header against the file's length
                header, data = _parse_header(path)
        except FileNotFoundError:
            raise CptError(f"{path} is missing though the index names it. Download the folder again.") from None
        except (SafetensorError, OSError) as error:
            raise CptError(f"{path} is not a whole safetensors file ({error}). Download it again.") from error
        for name, entry in header.items():
            start = data + entry["data_offsets"][0]
            self.infos[name] = TensorInfo(path, _dtype(entry["dtype"], name, path), tuple(entry["shape"]), start)

    @property
    def dtype(self) -> str:
        """The dtype of the embedding."""
        return self._embedding.dtype

    @property
    def all_dtypes(self) -> list[str]:
        """The dtypes of all tensors, each once."""
        return sorted({info.dtype for info in self.infos.values()})

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding."""
        return self._embedding.shape[0]

    @property
    def _embedding(self) -> TensorInfo:
        return next(self.infos[name] for name in EMBEDDINGS if name in self.infos)

    def read(self, name: str) -> np.ndarray:
        """One tensor, whole."""
        info = self.infos[name]
        return self._fill(np.empty(info.shape, DTYPES[info.dtype]), name, 0)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """One tensor in blocks of rows, of at most 32 MiB each where a row is smaller than that.

        A block is overwritten by the next one.
        """
        info = self.infos[name]
        # Whole rows, so that a block can be cut out and placed by its first row.
        step = max(1, BLOCK_BYTES * info.shape[0] // max(info.nbytes, 1))
        for start in range(0, info.shape[0], step):
            rows = min(step, info.shape[0] - start)
            yield self._fill(self._buffers.take((rows, *info.shape[1:]), DTYPES[info.dtype]), name, start)

    def _fill(self, array: np.ndarray, name: str, row: int) -> np.ndarray:
        info = self.infos[name]
        try:
            # Once a file, ahead of its first tensor: to hash it takes as long as to read it.
            if info.path in self._unchecked:
                check_file(info.path, self._unchecked.pop(info.path))
            read_into(array, info.path, info.start + row * (info.nbytes // info.shape[0]))
        except EOFError:
            raise CptError(f"{info.path} ends within tensor {name}. Download it again.") from None
        except OSError as error:
            raise CptError(f"{info.path}: tensor {name} cannot be read ({error}). Download it again.") from error
        return array


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        # The format: the header's length, the header as JSON, then the data, which offsets are counted from.
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    # The only entry that is no tensor.
    header.pop("__metadata__", None)
    return header, 8 + length


def _dtype(code: str, name: str, path: Path) -> str:
    if code not in _CODES:
        raise CptError(
            f"{path}: tensor {name} has dtype {code}; supported are bfloat16, float16 and float32. "
            "Use the model's unquantized weights."
        )
    return _CODES[code]


def _weight_map(folder: Path) -> dict[str, Path]:
    # Before the index, as transformers looks for them: a folder that was saved into twice holds two models.
    if (folder / _SINGLE).is_file():
        return {"": folder / _SINGLE}  # a single file lists its tensors itself
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or any("/" in str(name) for name in weight_map.values()):
            raise CptError(f"{folder / _INDEX} has no usable weight_map. Download it again.")
        return {name: folder / str(file) for name, file in weight_map.items()}
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise CptError(
            f"{folder} holds pickled weights only (.bin or .pth), which can run code when read. "
            "Get the model's safetensors files."
        )
    raise CptError(f"{folder} holds neither {_INDEX} nor {_SINGLE}. Give the folder of a Hugging Face model.")


def _passed_over(folder: Path) -> Iterator[str]:
    if not ((folder / _SINGLE).is_file() and (folder / _INDEX).is_file()):
        return
    try:
        files = set(read_json(folder / _INDEX)["weight_map"].values())
    except (CptError, KeyError, AttributeError, TypeError):
        files = set()
    if files != {_SINGLE}:  # of a single file there may be an index, too
        yield f"{folder} holds {_SINGLE}, which is read, as by transformers, and {_INDEX}"


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: its name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return TensorInfo(Path(), self.dtype, self.shape).nbytes


def write_weights(
    folder: Path,
    plans: Sequence[TensorPlan],
    load: Callable[[str], Iterable[np.ndarray]],
    shard_bytes: float = SHARD_BYTES,
) -> list[str]:
    """Write tensors into safetensors shards of at most `shard_bytes`, with an index when there are several.

    Args:
        folder: where the files go.
        plans: all tensors, in the order in which they shall lie.
        load: gives a tensor by name, in blocks of rows; called once each, in order, so one block is in memory.
        shard_bytes: the most of a file; a larger tensor has one of its own.

    Returns:
        The names of the weights' files.
    """
    shards = _split(plans, shard_bytes)
    count = len(shards)
    names = [_SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        _write_shard(folder / file_name, shard, load)
    if count > 1:
        weight_map = {plan.name: file for file, shard in zip(names, shards, strict=True) for plan in shard}
        index = {"metadata": {"total_size": sum(plan.nbytes for plan in plans)}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        names.append(_INDEX)
    return names


def _split(plans: Sequence[TensorPlan], shard_bytes: float) -> list[list[TensorPlan]]:
    # Tensors are not cut: one that is larger than a shard has a shard of its own.
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in plans:
        # Not before the first tensor of a shard, or an empty shard would be left.
        if shards[-1] and filled + plan.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(plan)
        filled += plan.nbytes
    return shards


def _write_shard(path: Path, plans: Sequence[TensorPlan], load: Callable[[str], Iterable[np.ndarray]]) -> None:
    with path.open("wb", buffering=0) as file:
        # Sizes were promised here: the checks below see that the blocks keep to them.
        file.write(_header(plans))
        for plan in plans:
            rows = 0
            for block in load(plan.name):
                if block.shape[1:] != plan.shape[1:]:
                    raise CptError(f"{plan.name} has rows of shape {block.shape[1:]}, not {plan.shape[1:]}.")
                write_pieces(file, bits(cast(block, plan.name, plan.dtype).reshape(-1)).data)
                rows += block.shape[0]
            if rows != plan.shape[0]:
                raise CptError(f"{plan.name} has {rows} rows, config.json asks for {plan.shape[0]}.")


def _header(plans: Sequence[TensorPlan]) -> bytes:
    codes = {name: code for code, name in _CODES.items()}
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        entries[plan.name] = {
            "dtype": codes[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.nbytes],
        }
        offset += plan.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Data begin at a multiple of 8 bytes, as the format's own writer lays them: readers map them in place.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
