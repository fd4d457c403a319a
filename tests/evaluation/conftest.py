"""The base and the corpus of the training tests; questions and documents to ask and to measure."""

import json
from pathlib import Path

import pytest

from tests.training.conftest import copy_of_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base_hf`, `base` (NeMo) and `ds/{ja,en}_{train,validation}`."""
    return copy_of_world(tmp_path_factory)


@pytest.fixture(scope="session")
def documents(world: Path) -> list[str]:
    """The Japanese validation documents."""
    lines = (world / "ja_validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
