"""A byte that changed after a checkpoint was written is found by whatever reads the weights, import's own included."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from nemo_cpt.checkpoint.distributed_reader import DistributedReader
from nemo_cpt.checkpoint.nemo_model import nemo_logits
from nemo_cpt.errors import CptError
from tests.support import small_models as models

QKV = "module.decoder.layers.self_attention.linear_qkv.weight"
FC1 = "module.decoder.layers.mlp.linear_fc1.weight"
ADAPTER = "module.decoder.layers.mlp.linear_fc1.adapter.linear_out.weight"
EMBEDDING = "module.embedding.word_embeddings.weight"


def _rot(nemo: Path, key: str) -> None:
    """Flip the lowest bit of a tensor's last value: small, finite, and nothing else would see it."""
    reader = DistributedReader(nemo / "weights")
    values = reader.read(key)
    *_, stored = reader._stored.values()
    end = stored.start + stored.dtype.itemsize * (values.size // len(reader._stored))
    with stored.path.open("r+b") as file:
        file.seek(end - stored.dtype.itemsize)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    import_hf(models.make("llama31", tmp_path / "hf"), tmp_path / "nemo")
    return tmp_path / "nemo"


@pytest.mark.parametrize("key", [QKV, FC1, EMBEDDING])
@pytest.mark.parametrize(
    "action",
    [
        lambda nemo: export_hf(nemo, nemo.parent / "out"),
        lambda nemo: verify(nemo, nemo.parent / "hf", logits=False),
        lambda nemo: nemo_logits(nemo, [[5, 6]]),
    ],
)
def test_in_an_import(action: Callable[[Path], object], key: str, imported: Path) -> None:
    _rot(imported, key)
    with pytest.raises(CptError, match=rf"{key} cannot be read .* not those that were written, by their CRC-32"):
        action(imported)
    assert not (imported.parent / "out").exists()


@pytest.mark.parametrize(
    ("run", "key", "adapter"), [("full", FC1, False), ("lora", ADAPTER, False), ("lora", ADAPTER, True)]
)
def test_in_a_training(run: str, key: str, adapter: bool, nemo_jobs: Path, tmp_path: Path) -> None:
    (checkpoint,) = (nemo_jobs / "runs" / run / "checkpoints").glob("*-last")
    shutil.copytree(checkpoint, tmp_path / "copy")
    _rot(tmp_path / "copy", key)
    with pytest.raises(CptError, match=rf"{key} cannot be read .*CRC-32.* Copy the checkpoint again"):
        export_hf(tmp_path / "copy", tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_in_the_base_of_a_lora_run(nemo_jobs: Path, tmp_path: Path) -> None:
    (checkpoint,) = (nemo_jobs / "runs" / "lora" / "checkpoints").glob("*-last")
    shutil.copytree(nemo_jobs / "nemo", tmp_path / "base")
    _rot(tmp_path / "base", QKV)
    with pytest.raises(CptError, match=rf"base/.*{QKV} cannot be read .*CRC-32"):
        export_hf(checkpoint, tmp_path / "out", base=tmp_path / "base")
