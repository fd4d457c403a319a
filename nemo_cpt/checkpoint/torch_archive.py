"""Where a tensor's values lie in what `torch.save` wrote, found without PyTorch and without running the pickle's code.

The format is a ZIP archive, nothing of it compressed: `data.pkl` says how tensors are made from storages, and
`data/<number>` is a storage's bytes (torch/serialization.py, _save).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal.isal_zlib import crc32

from nemo_cpt.checkpoint.arrays import DTYPES, read_into
from nemo_cpt.errors import CptError

_LOCAL_HEADER = struct.Struct("<26xHH")  # of the name's and the extra field's lengths (PKWARE's APPNOTE, 4.3.7)
_CHECKED_AT_ONCE = 2**20  # bytes, so that they stay in the processor's cache
_STORAGES = {"BFloat16Storage": "bfloat16", "HalfStorage": "float16", "FloatStorage": "float32"}
Memory = Callable[[tuple[int, ...], np.dtype], np.ndarray]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its first value's place in bytes, its dtype and shape, and its strides in values."""

    path: Path
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, where: tuple[slice, ...], memory: Memory = np.empty) -> np.ndarray:
        """The values at `where`, a slice with start and stop for each axis.

        Only the rows asked for are read, along the first axis that is longer than 1.

        Args:
            where: a slice with start and stop for each axis.
            memory: gives the array, from shape and dtype, that is read into.
        """
        # A transposed or sliced tensor, which Megatron hardly saves: read whole, and put in order.
        if self.strides != _contiguous(self.shape):
            return np.ascontiguousarray(self._all()[where])
        # Rows along this axis lie one after the other in the file, so that one read gets them.
        along = next((axis for axis, size in enumerate(self.shape) if size > 1), 0)
        shape = list(self.shape)
        shape[along] = where[along].stop - where[along].start
        rows = memory(tuple(shape), self.dtype)
        read_into(rows, self.path, self.start + where[along].start * self.strides[along] * self.dtype.itemsize)
        rest = (*where[:along], slice(None), *where[along + 1 :])
        return np.ascontiguousarray(rows[rest])

    def _all(self) -> np.ndarray:
        # Values from the first to the last one, gaps included.
        reach = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        values = np.empty(reach, self.dtype)
        read_into(values, self.path, self.start)
        return np.ndarray(self.shape, self.dtype, values, strides=[each * self.dtype.itemsize for each in self.strides])


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def stored_tensor(path: Path, start: int, length: int) -> StoredTensor:
    """Find the one tensor of an archive that lies in `path` from byte `start` on, `length` bytes long.

    The bytes are compared with the checksums that `torch.save` wrote of them, all of the tensor's at once.

    Raises:
        CptError: its pickle asks for anything else than a tensor.
        Exception: the archive is damaged.
    """
    with path.open("rb") as file:
        part = _Part(file, start, length)
        # Without the archive's own name in front, which is the file's, or "archive".
        entries = {entry.filename.partition("/")[2]: entry for entry in zipfile.ZipFile(part).infolist()}
        pickled = entries["data.pkl"]
        # Before it is unpickled.
        _check_bytes(part, pickled)
        part.seek(_data_start(part, pickled))
        tensor = _TensorUnpickler(io.BytesIO(part.read(pickled.file_size)), path).load()
        if not isinstance(tensor, _Tensor):
            raise TypeError(f"a {type(tensor).__name__} is there, no tensor")
        storage = entries[f"data/{tensor.storage.key}"]
        if storage.compress_type != zipfile.ZIP_STORED:
            raise ValueError("the archive is compressed")
        _check_bytes(part, storage)
        first = _data_start(part, storage) + tensor.offset * tensor.storage.dtype.itemsize
    return StoredTensor(path, start + first, tensor.storage.dtype, tensor.shape, tensor.strides)


def _check_bytes(archive: _Part, entry: zipfile.ZipInfo) -> None:
    """Compare an entry's bytes with its CRC-32, which is 0 where whoever wrote the archive left it out."""
    if not entry.CRC:
        return
    archive.seek(_data_start(archive, entry))
    found, rest, memory = 0, entry.file_size, memoryview(bytearray(min(entry.file_size, _CHECKED_AT_ONCE)))
    while rest and (count := archive.readinto(memory[:rest])):
        found, rest = crc32(memory[:count], found), rest - count
    if rest or found != entry.CRC:
        raise ValueError(f"the bytes of {entry.filename} are not those that were written, by their CRC-32")


def _data_start(archive: io.RawIOBase, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, behind its local header; `zipfile` itself insists on checksums left out here."""
    archive.seek(entry.header_offset)
    name, extra = _LOCAL_HEADER.unpack(archive.read(_LOCAL_HEADER.size))
    return entry.header_offset + _LOCAL_HEADER.size + name + extra


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: _Tensor(
        storage, offset, tuple(shape), tuple(strides)
    ),
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("collections", "OrderedDict"): OrderedDict,
}


class _TensorUnpickler(pickle.Unpickler):
    """Reads the description of a tensor; no name in the pickle is looked up."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return DTYPES[_STORAGES[name]]
        # A pickle's names are calls: nothing that is not listed is even looked up.
        if (module, name) not in _KNOWN:
            raise CptError(
                f"A tensor in {self._path} is made by {module}.{name}, which no Megatron checkpoint of bfloat16, "
                "float16 or float32 weights does. It was not opened; do not trust this file."
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(str(key), dtype)


class _Part(io.RawIOBase):
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
        # zipfile looks for the end of the archive first, from the back: the part must seem to end where it does.
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count
