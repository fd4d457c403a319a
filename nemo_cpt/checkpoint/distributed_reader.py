"""Megatron's `torch_dist` checkpoint folders, read a few rows of a tensor at a time and without PyTorch.

`distributed_writer` describes the format.
"""

from __future__ import annotations

import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nemo_cpt.checkpoint.arrays import BLOCK_BYTES, DTYPES, Buffers
from nemo_cpt.checkpoint.torch_archive import Memory, StoredTensor, stored_tensor
from nemo_cpt.errors import CptError


@dataclass(frozen=True)
class _Chunk:
    """A piece of a tensor that was stored by itself: where in the tensor it begins, and its shape."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def holds_layer(self, layer: int) -> bool:
        return self.offsets[0] <= layer < self.offsets[0] + self.sizes[0]

    def overlap(self, bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """What the chunk has of a box, start and stop along each axis of the tensor; empty where it has nothing."""
        box = [
            (max(start, offset), min(stop, offset + size))
            for (start, stop), offset, size in zip(bounds, self.offsets, self.sizes, strict=True)
        ]
        return box if all(low < high for low, high in box) else []


class DistributedReader:
    """Reads tensors from a checkpoint's `weights` folder.

    Attributes:
        shapes: each tensor's whole shape, by name.
        dtypes: each tensor's dtype, by name; those of PyTorch that are no weights' are left out.

    Raises:
        CptError: the folder is no finished torch_dist checkpoint, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The two that are written last; see `DistributedWriter`.
        if not (folder / "metadata.json").is_file() or not (folder / ".metadata").is_file():
            raise CptError(
                f"{folder} is no finished checkpoint: metadata.json or .metadata is missing. "
                "Give a NeMo checkpoint whose saving ended, the folder that holds `weights` and `context`."
            )
        self._chunks: dict[str, list[_Chunk]] = {}
        self._stored: dict[tuple[str, tuple[int, ...]], StoredTensor] = {}
        self._buffers = Buffers()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        try:
            self._read_metadata(folder / ".metadata")
        except CptError:
            raise
        except Exception as error:
            raise CptError(f"{folder / '.metadata'} cannot be read ({error!r}). Copy the checkpoint again.") from error

    def _read_metadata(self, path: Path) -> None:
        with path.open("rb") as file:
            # A pickle may call anything: this one can call nothing but the stand-ins below.
            metadata = _MetadataUnpickler(file).load()
        places = metadata.storage_data.items()
        # An object has no offset, and stands under its name alone.
        self._places = {(index.fqn, tuple(getattr(index, "offset", None) or ())): place for index, place in places}
        for key, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks"):  # an object, not a tensor
                continue
            self.shapes[key] = entry.size
            self._chunks[key] = [_Chunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
            if entry.properties.dtype in DTYPES:
                self.dtypes[key] = DTYPES[entry.properties.dtype]

    def check_sizes(self) -> None:
        """Raise CptError if a file is missing, or shorter than what `.metadata` says is in it."""
        needed: dict[str, int] = {}
        for place in self._places.values():
            # The name alone: a path in the metadata must not lead out of the folder.
            name = Path(place.relative_path).name
            # Many tensors share a file; what reaches furthest decides its size.
            needed[name] = max(needed.get(name, 0), place.offset + place.length)
        for name, size in needed.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else 0
            if found < size:
                raise CptError(f"{path} holds {found} of at least {size} bytes. Copy the checkpoint again.")

    def has(self, key: str, layer: int | None = None) -> bool:
        """Whether a tensor is there, and in it this layer, of which a LoRA run may have adapted some only."""
        if layer is None:
            return key in self.shapes
        return any(chunk.holds_layer(layer) for chunk in self._chunks.get(key, ()))

    def pieces(self, key: str, axis: int) -> int:
        """Into how many a tensor is cut along an axis, as by tensor-parallel ranks."""
        # By where they begin: pieces that lie beside each other along other axes begin at one place along this.
        return len({chunk.offsets[axis] for chunk in self._chunks[key]})

    def read(
        self, key: str, layer: int | None = None, rows: tuple[int, int] | None = None, memory: Memory = np.empty
    ) -> np.ndarray:
        """One tensor, or one layer's share of a stacked one.

        Args:
            key: the tensor's name.
            layer: index along the leading axis, which is then dropped.
            rows: start and stop along the first (then leading) axis; None means all.
            memory: gives the array to fill, from shape and dtype.

        Returns:
            A contiguous array in the checkpoint's dtype.
        """
        shape = self.shapes[key]
        # Megatron stacks the layers of one kind along a leading axis.
        lead = () if layer is None else ((layer, layer + 1),)
        bounds = [*lead, *((0, size) for size in shape[len(lead) :])]
        if rows is not None:
            bounds[len(lead)] = rows
        result = self._read_box(key, bounds, memory)
        return result if layer is None else result[0]

    def _read_box(self, key: str, bounds: Sequence[tuple[int, int]], memory: Memory) -> np.ndarray:
        overlaps = [(chunk, chunk.overlap(bounds)) for chunk in self._chunks[key]]
        lengths = tuple(stop - start for start, stop in bounds)
        inside = [(chunk, box) for chunk, box in overlaps if box]
        covered = sum(prod(high - low for low, high in box) for _, box in inside)
        # Chunks do not overlap: equal counts mean that every value is there, once.
        if covered != prod(lengths):
            raise CptError(f"{self.folder}: {key} covers {covered} of {prod(lengths)} values. Copy it again.")
        # The common case, without a copy: what was read is the answer.
        if len(inside) == 1:
            return self._load(key, *inside[0], memory)
        result = memory(lengths, self.dtypes[key])
        starts = [start for start, _ in bounds]
        for chunk, box in inside:
            result[_slices(box, starts)] = self._load(key, chunk, box, np.empty)
        return result

    def blocks(self, key: str, layer: int | None, start: int, stop: int) -> Iterator[np.ndarray]:
        """The rows from `start` to `stop` of a tensor (or a layer of it), in blocks of at most 32 MiB.

        A block is overwritten by the next one.
        """
        axis = 0 if layer is None else 1
        row_bytes = prod(self.shapes[key][axis + 1 :]) * self.dtypes[key].itemsize
        cuts = {start, stop, *range(start, stop, max(1, BLOCK_BYTES // row_bytes))}
        for chunk in self._chunks[key]:  # so that no block is put together from several chunks
            if layer is None or chunk.holds_layer(layer):
                cuts |= {chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]}
        for rows in pairwise(sorted(cut for cut in cuts if start <= cut <= stop)):
            yield self.read(key, layer, rows, self._buffers.take)

    def _load(self, key: str, chunk: _Chunk, box: list[tuple[int, int]], memory: Memory) -> np.ndarray:
        place = self._places[key, chunk.offsets]
        path = self.folder / Path(place.relative_path).name
        try:
            # Its archive is opened and its checksum compared once, whatever the number of blocks.
            if (key, chunk.offsets) not in self._stored:
                self._stored[key, chunk.offsets] = stored_tensor(path, place.offset, place.length)
            stored = self._stored[key, chunk.offsets]
            if stored.shape != chunk.sizes or stored.dtype != self.dtypes[key]:
                raise ValueError(f"a {stored.dtype} tensor of shape {stored.shape} is there")
            return stored.read(_slices(box, chunk.offsets), memory)
        except CptError:
            raise
        except Exception as error:
            raise CptError(f"{path}: {key} cannot be read ({error!r}). Copy the checkpoint again.") from error


def _slices(box: Sequence[tuple[int, int]], starts: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(low - start, high - start) for (low, high), start in zip(box, starts, strict=True))


class _Plain:
    """Stands in for a class of metadata: it keeps the state that the pickle gives it."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)


class _Properties(_Plain):
    """`torch.distributed.checkpoint.metadata.TensorProperties`, whose state is a tuple."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch's and Megatron's checkpoint metadata into stand-ins: no other name in the pickle is looked up.

    A dtype becomes its name, a size a tuple.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron.core.dist_checkpointing.strategies") and name in _MEGATRON_CLASSES:
            return _Plain
        if module == "torch" and name in _DTYPE_NAMES:
            return name
        if (module, name) not in _KNOWN:
            raise CptError(
                f"The checkpoint's .metadata refers to {module}.{name}, which no Megatron checkpoint does. "
                "It was not opened; do not trust this file."
            )
        return _KNOWN[module, name]


_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_MEGATRON_CLASSES = ("MCoreMetadata", "MCoreSavePlan")
_DTYPE_NAMES = {
    "bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool", "float8_e4m3fn",
    "float8_e5m2", "uint16", "strided",
}  # fmt: skip
_KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    (_METADATA, "TensorProperties"): _Properties,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Plain,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
} | {
    (module, name): _Plain
    for module, names in {
        _METADATA: ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        _PLANNER: ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
        _FILESYSTEM: ("_StorageInfo", "_StoragePrefix"),
    }.items()
    for name in names
}  # fmt: skip
