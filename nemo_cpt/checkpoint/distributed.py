"""Megatron's `torch_dist` checkpoint folders, read and written one tensor at a time and without a process group.

The format is torch.distributed.checkpoint's: `.metadata` (a pickle: each tensor's shape, dtype and chunks, and each
chunk's file, offset and length), `*.distcp` (chunks, each as torch.save writes it), plus Megatron's `common.pt` and
`metadata.json`. Written so by dist_checkpointing.save of megatron-core 0.15 and read by its load at any TP and PP.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, BinaryIO, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

from nemo_cpt.checkpoint.files import write_pieces
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK_BYTES = (
    256 * 2**20
)  # a reader loads whole chunks, so a rank's share of a large embedding need not cost all of it
_DATA_FILE = "__0_0.distcp"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class DistributedWriter:
    """Writes a checkpoint's `weights` folder; use it as a context manager, the metadata follows at its end."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._file = _InPieces((folder / _DATA_FILE).open("wb", buffering=0))
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._empty_state = _saved([None])

    def __enter__(self) -> DistributedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._write_metadata()

    def add(self, key: str, tensor: torch.Tensor, global_shape: Sequence[int], offset: Sequence[int]) -> None:
        """Write one piece of a tensor.

        Args:
            key: the tensor's name.
            tensor: the piece, with storage of its own (torch.save writes a view's whole storage), of as many axes as
                `global_shape` or fewer; missing leading axes are taken as 1.
            global_shape: the whole tensor's shape.
            offset: where in it the piece begins.
        """
        tensor = tensor.view((1,) * (len(global_shape) - tensor.dim()) + tuple(tensor.shape))
        entry = self._entries.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(global_shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        where = torch.Size(offset)
        entry.chunks.append(ChunkStorageMetadata(where, tensor.shape))
        start = self._file.tell()
        _save_without_checksum(tensor, self._file)
        self._places[MetadataIndex(key, where)] = _StorageInfo(_DATA_FILE, start, self._file.tell() - start)

    def add_empty_state(self, key: str) -> None:
        """Write an object that holds nothing, such as a module's `_extra_state` outside fp8 training."""
        self._entries[key] = BytesStorageMetadata()
        start = self._file.tell()
        self._file.write(self._empty_state)
        self._places[MetadataIndex(key)] = _StorageInfo(_DATA_FILE, start, self._file.tell() - start)

    def _write_metadata(self) -> None:
        metadata = Metadata(self._entries, storage_data=self._places, storage_meta=StorageMeta())
        metadata.mcore_data = {}  # megatron-core looks for it
        common = {"epoch": 0, "global_step": 0, "state_dict": {}, "content_metadata": dict(_CONTENT)}
        torch.save(common, self._folder / "common.pt")
        (self._folder / ".metadata").write_bytes(pickle.dumps(metadata))
        # Last, for Megatron takes a folder without it for an unfinished checkpoint.
        (self._folder / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")


# How sharded_state_dict laid the tensors out: what NeMo 2.7 writes here and MegatronStrategy reads back.
_CONTENT = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "dp_reshardable",
}


class _InPieces(io.RawIOBase):
    """A file that writes a little at a time, see `write_pieces`."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file

    def write(self, data: Buffer) -> int:
        return write_pieces(self._file, data)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _save_without_checksum(value: object, file: Any) -> None:
    before = get_crc32_options()
    set_crc32_options(False)  # three times as fast, and torch.load does not look at it
    try:
        torch.save(value, file)
    except RuntimeError as error:  # closing its archive fails too, and hides why
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        set_crc32_options(before)


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _MetadataUnpickler(pickle.Unpickler):
    """Builds torch's and Megatron's checkpoint metadata and nothing else: no other name in the pickle is looked up."""

    _ALLOWED: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem",
                                                 "WriteItemType"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64",
                  "bool", "float8_e4m3fn", "float8_e5m2", "uint16", "strided"},
        "collections": {"OrderedDict"},
        "builtins": {"set", "frozenset", "slice"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron.core.dist_checkpointing.strategies") and name in (
            "MCoreMetadata",
            "MCoreSavePlan",
        ):
            return _Plain
        if name not in self._ALLOWED.get(module, ()):
            raise CptError(
                f"The checkpoint's .metadata refers to {module}.{name}, which no Megatron checkpoint does. "
                "It was not opened; do not trust this file."
            )
        return super().find_class(module, name)


class _Plain:
    """Stands in for Megatron's dataclasses of metadata, which add no behaviour that reading needs."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class DistributedReader:
    """Reads tensors from a checkpoint's `weights` folder.

    Attributes:
        shapes: each tensor's whole shape, by name.
        dtypes: each tensor's dtype, by name.

    Raises:
        CptError: the folder is no finished torch_dist checkpoint, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "metadata.json").is_file() or not (folder / ".metadata").is_file():
            raise CptError(
                f"{folder} is no finished checkpoint: metadata.json or .metadata is missing. "
                "Give a NeMo checkpoint whose saving ended, the folder that holds `weights` and `context`."
            )
        metadata = self._read_metadata()
        self._places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.shapes[key], self._chunks[key] = tuple(entry.size), list(entry.chunks)
                self.dtypes[key] = entry.properties.dtype

    def _read_metadata(self) -> Any:
        path = self.folder / ".metadata"
        try:
            with path.open("rb") as file:
                return _MetadataUnpickler(file).load()
        except CptError:
            raise
        except Exception as error:
            raise CptError(f"{path} cannot be read ({error!r}). Copy the checkpoint again.") from error

    def has(self, key: str, layer: int | None = None) -> bool:
        """Whether a tensor is there, and in it this layer, of which a LoRA run may have adapted some only."""
        if layer is None:
            return key in self.shapes
        chunks = self._chunks.get(key, ())
        return any(chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0] for chunk in chunks)

    def read(self, key: str, layer: int | None = None, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """One tensor, or one layer's share of a stacked one.

        Args:
            key: the tensor's name.
            layer: index along the leading axis, which is then dropped.
            rows: start and stop along the first (then leading) axis; None means all.

        Returns:
            A new contiguous tensor in the checkpoint's dtype.
        """
        shape = self.shapes[key]
        lead = () if layer is None else ((layer, layer + 1),)
        bounds = [*lead, *((0, size) for size in shape[len(lead) :])]
        if rows is not None:
            bounds[len(lead)] = rows
        lengths = [stop - start for start, stop in bounds]
        for chunk in self._chunks[key]:
            if list(chunk.sizes) == lengths and list(chunk.offsets) == [start for start, _ in bounds]:
                whole = self._load(key, chunk)
                return whole if layer is None else whole[0]
        result = torch.empty(lengths, dtype=self.dtypes[key])
        covered = sum(self._copy_overlap(key, chunk, bounds, result) for chunk in self._chunks[key])
        if covered != result.numel():
            raise CptError(f"{self.folder}: {key} covers {covered} of {result.numel()} values. Copy it again.")
        return result if layer is None else result[0]

    def row_blocks(self, key: str, layer: int | None, start: int, stop: int) -> list[tuple[int, int]]:
        """The rows from `start` to `stop` of a tensor (or a layer of it), cut where its chunks are.

        A chunk is read as a whole, so reading along these cuts reads nothing twice.
        """
        axis = 0 if layer is None else 1
        cuts = {start, stop}
        for chunk in self._chunks[key]:
            if layer is None or chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.sizes[0]:
                cuts |= {chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]}
        inside = sorted(cut for cut in cuts if start <= cut <= stop)
        return list(pairwise(inside))

    def _copy_overlap(
        self, key: str, chunk: ChunkStorageMetadata, bounds: Sequence[tuple[int, int]], result: torch.Tensor
    ) -> int:
        inside, target = [], []
        for (start, stop), offset, size in zip(bounds, chunk.offsets, chunk.sizes, strict=True):
            low, high = max(start, offset), min(stop, offset + size)
            if low >= high:
                return 0
            inside.append(slice(low - offset, high - offset))
            target.append(slice(low - start, high - start))
        piece = self._load(key, chunk)[tuple(inside)]
        result[tuple(target)] = piece
        return piece.numel()

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._places[key, tuple(chunk.offsets)]
        path = self.folder / Path(place.relative_path).name
        try:
            with path.open("rb") as file:
                return torch.load(_Slice(file, place.offset, place.length), map_location="cpu", weights_only=True)
        except Exception as error:
            raise CptError(f"{path}: {key} cannot be read ({error!r}). Copy the checkpoint again.") from error


class _Slice(io.RawIOBase):
    """A part of a file as a file of its own; what a reader asks for beyond the part does not exist."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count
