"""The loss of a model is refused on text that was tokenized for another."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.loss import language_model_loss


def test_text_of_another_tokenizer(world: Path, tmp_path: Path) -> None:
    model, tokenizer = (each.from_pretrained(world / "base_hf") for each in (AutoModelForCausalLM, AutoTokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CptError, match=r"which is not the base's \(512 tokens against 513\)"):
        language_model_loss(tmp_path, str(world / "ds/ja_validation"), seq_length=64, samples=2)


def test_an_id_beyond_the_rows(world: Path, tmp_path: Path) -> None:
    for end in (".idx", ".bin"):  # without a manifest that would know of it
        shutil.copy(world / f"ds/ja_validation_text_document{end}", tmp_path / f"ja_text_document{end}")
    model = AutoModelForCausalLM.from_pretrained(world / "base_hf")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "hf")
    for path in (world / "base_hf").glob("*token*"):
        shutil.copy(path, tmp_path / "hf")
    with pytest.raises(CptError, match=r"holds the token id \d+, but the base has 300 rows"):
        language_model_loss(tmp_path / "hf", str(tmp_path / "ja"), seq_length=64, samples=2)


@pytest.mark.parametrize("name", ["seq_length", "samples", "batch_size"])
def test_nothing_to_read(world: Path, name: str) -> None:
    numbers = {"seq_length": 64, "samples": 2, "batch_size": 8} | {name: 0}
    with pytest.raises(CptError, match=f"{name} 0"):
        language_model_loss(world / "base_hf", str(world / "ds/ja_validation"), **numbers)
