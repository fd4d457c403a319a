"""Tensors in files of torch.save, read without PyTorch, are those that torch.load gives."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.checkpoint.arrays import DTYPES as WEIGHTS
from nemo_cpt.checkpoint.arrays import bits, cast, not_finite
from nemo_cpt.checkpoint.torch_archive import stored_tensor
from nemo_cpt.errors import CptError

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _archive(value: object, path: Path, before: int = 0) -> int:
    """Write what torch.save writes behind `before` other bytes; return its length."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(bytes(before) + buffer.getvalue() + b"what follows")
    return len(buffer.getvalue())


def _same(array: np.ndarray, tensor: torch.Tensor) -> bool:
    integers = torch.int16 if tensor.itemsize == 2 else torch.int32
    expected = tensor.contiguous().view(integers).numpy()
    return array.shape == expected.shape and np.array_equal(bits(array), expected.view(bits(array).dtype))


@st.composite
def _tensors_and_boxes(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[slice, ...]]:
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    tensor = torch.randn(shape, dtype=torch.float32).to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()):
        tensor = torch.stack([tensor, tensor])[1]  # a view into a larger storage
    starts = [draw(st.integers(0, size - 1)) for size in tensor.shape]
    stops = [draw(st.integers(start + 1, size)) for start, size in zip(starts, tensor.shape, strict=True)]
    return tensor, tuple(map(slice, starts, stops))


@settings(max_examples=150, deadline=None)
@given(_tensors_and_boxes(), st.integers(0, 70))
def test_any_part_of_any_tensor(tmp_path_factory: pytest.TempPathFactory, drawn: tuple, before: int) -> None:
    tensor, where = drawn
    path = tmp_path_factory.getbasetemp() / "archive"
    stored = stored_tensor(path, before, _archive(tensor, path, before))
    assert (stored.shape, stored.dtype.name) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    assert _same(stored.read(where), tensor[where])


def test_a_parameter(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    stored = stored_tensor(tmp_path / "file", 0, _archive(weight, tmp_path / "file"))
    assert _same(stored.read((slice(0, 3), slice(0, 4))), weight.detach())


@pytest.mark.parametrize("value", [torch.arange(4), {"a": torch.zeros(1)}, torch.nn.Linear(1, 1)])
def test_what_is_no_weight(tmp_path: Path, value: object) -> None:
    with pytest.raises((CptError, TypeError)):
        stored_tensor(tmp_path / "file", 0, _archive(value, tmp_path / "file"))


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_code_in_the_pickle_does_not_run(tmp_path: Path) -> None:
    length = _archive(_Bomb(tmp_path / "ran"), tmp_path / "file")
    with pytest.raises(CptError, match="do not trust this file"):
        stored_tensor(tmp_path / "file", 0, length)
    pickle.loads(pickle.dumps(_Bomb(tmp_path / "ran")))  # it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_file(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "file"
    length = _archive(torch.randn(30_000), path)
    stored = stored_tensor(path, 0, length)
    path.write_bytes(path.read_bytes()[: int(keep * length)])
    with pytest.raises(EOFError, match="bytes early"):
        stored.read((slice(0, 30_000),))
    with pytest.raises(zipfile.BadZipFile):
        stored_tensor(path, 0, int(keep * length))


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.sampled_from(["bfloat16", "float32"]))
def test_casts_round_as_pytorch_does(values: list[float], dtype: str) -> None:
    array = np.array(values, np.float32)
    assert _same(cast(array, "weight", dtype), torch.from_numpy(array).to(getattr(torch, dtype)))


def test_a_value_beyond_float16() -> None:
    assert _same(cast(np.array([65504.0, -1e-7], np.float32), "w", "float16"), torch.tensor([65504.0, -1e-7]).half())
    with pytest.raises(CptError, match="w has values beyond float16"):
        cast(np.array([70000.0], np.float32), "w", "float16")


@settings(deadline=None)
@given(st.lists(st.floats(width=16), min_size=1), st.sampled_from(DTYPES))
def test_not_finite(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values).to(dtype)
    array = (tensor.view(torch.int16) if tensor.itemsize == 2 else tensor).numpy()
    array = array.view(WEIGHTS[str(dtype).removeprefix("torch.")])
    assert not_finite(array) == int((~torch.isfinite(tensor)).sum())
    assert not_finite(np.tile(array, 2**20 // len(values) + 1)) == not_finite(array) * (2**20 // len(values) + 1)
