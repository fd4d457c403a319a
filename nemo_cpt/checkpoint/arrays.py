"""Weights as numpy arrays, bfloat16 among them: importing PyTorch takes longer than reading a gigabyte of weights."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from nemo_cpt.errors import CptError

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
BLOCK_BYTES = 32 * 2**20
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # all their bits are set in NaN, infinity
_CHECKED_AT_ONCE = 2**19  # values, so that they stay in the processor's cache


class Buffers:
    """Memory that is used again: new memory costs as much time as reading a file into it."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[tuple[int, ...], np.dtype], np.ndarray] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with any contents; the next one of its shape and dtype is the same memory."""
        if (shape, dtype) not in self._arrays:
            # Few shapes alternate within a model; more would keep whole tensors alive.
            if len(self._arrays) >= 4:
                self._arrays.pop(next(iter(self._arrays)))
            self._arrays[shape, dtype] = np.empty(shape, dtype)
        return self._arrays[shape, dtype]


def read_into(array: np.ndarray, path: Path, start: int) -> None:
    """Fill a contiguous array with the bytes of a file from `start`.

    Read, not mapped: a mapped file's pages count as resident memory, and faulting them in takes longer.

    Raises:
        OSError: it cannot be read.
        EOFError: it ends before.
    """
    # As integers first: NumPy gives no buffer of bfloat16, which is not a type of its own.
    rest = bits(array.reshape(-1)).data.cast("B")
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while rest and (count := file.readinto(rest)):  # the kernel reads no more than 2 GiB at once
            rest = rest[count:]
    if rest:
        raise EOFError(f"the file ends {len(rest)} bytes early")


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers."""
    return array.view(np.dtype(f"u{array.itemsize}"))


def not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    exponent = _EXPONENTS[array.dtype.name]
    values = bits(np.ascontiguousarray(array).reshape(-1))
    found = 0
    for start in range(0, values.size, _CHECKED_AT_ONCE):
        # By the bits, which costs the same for every dtype; bfloat16 is none of NumPy's own.
        exponents = values[start : start + _CHECKED_AT_ONCE] & exponent
        if exponents.max() == exponent:
            found += int((exponents == exponent).sum())
    return found


def check_finite(array: np.ndarray, name: str, where: str | Path) -> None:
    """Raise CptError when a weight is NaN or infinite."""
    if bad := not_finite(array):
        raise CptError(
            f"{where}: tensor {name} has {bad} of {array.size} values that are NaN or infinite. "
            "The weights are damaged, or the training that made them diverged."
        )


def cast(array: np.ndarray, name: str, dtype: str) -> np.ndarray:
    """The values in another dtype, contiguous, rounded to the nearest (the same memory where nothing changes).

    Raises:
        CptError: a value lies beyond float16.
    """
    # Overflow is looked for below, with the tensor's name in the message.
    with np.errstate(over="ignore"):
        result = array.astype(DTYPES[dtype], order="C", copy=False)
    if dtype == "float16" and result.dtype != array.dtype and not_finite(result):
        raise CptError(f"{name} has values beyond float16's 65504; choose bfloat16 or float32.")
    return result
