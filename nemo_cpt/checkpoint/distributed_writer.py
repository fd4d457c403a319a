"""Megatron's `torch_dist` checkpoint folders, written one tensor at a time and without a process group.

The format is torch.distributed.checkpoint's: `.metadata` (a pickle: each tensor's shape, dtype and chunks, and each
chunk's file, offset and length), `*.distcp` (chunks, each as torch.save writes it), plus Megatron's `common.pt` and
`metadata.json`. Written so by dist_checkpointing.save of megatron-core 0.15 and read by its load at any TP and PP.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
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

from nemo_cpt.checkpoint.arrays import bits
from nemo_cpt.checkpoint.folders import write_pieces

if TYPE_CHECKING:
    from typing_extensions import Buffer

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
        # One file for all: Megatron reads any number, and names them by rank only when it writes.
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
        # After an error no metadata: the folder then is no checkpoint for anybody.
        if kind is None:
            self._write_metadata()

    def add(self, key: str, piece: np.ndarray, global_shape: Sequence[int], offset: Sequence[int]) -> None:
        """Write one piece of a tensor.

        Args:
            key: the tensor's name.
            piece: contiguous values, of as many axes as `global_shape` or fewer; missing leading axes are taken as 1.
            global_shape: the whole tensor's shape.
            offset: where in it the piece begins.
        """
        # Stacked layers are written one at a time, each as a piece of length 1 along the first axis.
        tensor = _tensor(piece.reshape((1,) * (len(global_shape) - piece.ndim) + piece.shape))
        entry = self._entries.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(global_shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        where = torch.Size(offset)
        entry.chunks.append(ChunkStorageMetadata(where, tensor.shape))
        start = self._file.tell()
        _save(tensor, self._file)
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


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor; PyTorch takes no bfloat16 from numpy by that name."""
    return torch.from_numpy(bits(array)).view(getattr(torch, array.dtype.name))


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


def _save(value: object, file: Any) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:  # closing its archive fails too, and hides why
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
