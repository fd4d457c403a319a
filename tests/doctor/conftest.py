"""A small base, datasets of its vocabulary and of another, and machines whose GPUs only the driver tells of."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

TINY = {  # the shape of nemo_cpt.recipes.tiny.model
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
H100 = "0, GPU-11111111-aaaa, 81559, 81079, Disabled, 550.54.15, NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, `base` (NeMo), `deeper` (another model), `ds/` (ja, en, held_out; other's vocabulary)."""
    from nemo_cpt.checkpoint import import_hf
    from nemo_cpt.corpus import prepare
    from tests.support import small_models

    folder = tmp_path_factory.mktemp("doctor")
    import_hf(small_models.make("llama31", folder / "hf", **TINY), folder / "base")
    small_models.make("llama31", folder / "other_hf", **TINY)
    deeper = small_models.make("llama31", folder / "deeper_hf", **TINY | {"num_hidden_layers": 5})
    import_hf(deeper, folder / "deeper")
    content = json.loads((folder / "other_hf" / "tokenizer.json").read_text())
    content["model"]["vocab"]["one_more"] = len(content["model"]["vocab"])
    (folder / "other_hf" / "tokenizer.json").write_text(json.dumps(content))
    words = list(content["model"]["vocab"])[5:60]
    for name, tokenizer in {"ja": "hf", "en": "hf", "held_out": "hf", "other": "other_hf"}.items():
        words = words[1:] + words[:1]
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": " ".join(words)}) + "\n")
        prepare(folder / f"{name}.jsonl", folder / "ds" / name, folder / tokenizer, workers=1, quiet=True)
    return folder


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call it with what NVIDIA's library shall tell: GPUs, processes, CUDA; or its error (support/fake_nvml.py)."""
    folder = tmp_path / "nvidia"
    folder.mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    shutil.copy(TESTS / "support" / "fake_nvml.py", folder / "pynvml.py")

    def make(gpus: str = H100, processes: str = "", cuda: str = "12.4", error: str = "") -> None:
        for name, text in {"gpus": gpus, "processes": processes, "cuda": cuda, "error": error}.items():
            (folder / name).write_text(text + "\n" if text else "")

    yield make
    sys.modules.pop("pynvml", None)
