"""A model of random weights: of the size, the tokenizer and the spread that it says, the same for a seed."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_cpt.checkpoint import export_hf, make_untrained
from nemo_cpt.checkpoint.untrained import SHAPES, SIZES
from nemo_cpt.compatibility import read_base
from nemo_cpt.errors import CptError
from nemo_cpt.training.preconditions import check_base
from tests.support import small_models as models
from tests.vocabulary.conftest import small_base, texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("small") / "tokenizer")


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_base_whose_loss_is_that_of_a_guess(shape: str, tokenizer: Path, tmp_path: Path) -> None:
    report = make_untrained(tmp_path / "base", tokenizer, "tiny", shape=shape)
    check_base(tmp_path / "base")
    assert read_base(tmp_path / "base").rows == report.vocabulary_size == 703
    export_hf(tmp_path / "base", tmp_path / "hf")
    model, loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    assert report.parameters == sum(each.numel() for each in model.parameters())
    ids = loaded(texts("en")[0], return_tensors="pt", truncation=True, max_length=256)["input_ids"]
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) == pytest.approx(math.log(703), abs=0.2)
    assert (model.generation_config.eos_token_id, model.config.eos_token_id) == (loaded.eos_token_id,) * 2


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_spread_as_gpt2s(shape: str, tokenizer: Path, tmp_path: Path) -> None:
    make_untrained(tmp_path / "base", tokenizer, "tiny", shape=shape)
    export_hf(tmp_path / "base", tmp_path / "hf")
    for name, tensor in models.tensors(tmp_path / "hf").items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.full_like(tensor, 0 if name.endswith(".bias") else 1)), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
        assert float(tensor.float().std()) == pytest.approx(0.02 / (8**0.5 if residual else 1), rel=0.03), name


def test_a_seed_is_a_model(tokenizer: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        make_untrained(tmp_path / name, tokenizer, "tiny", seed=seed)
    one, again, two = (
        json.loads((tmp_path / name / "hf" / ".weights.json").read_text()) for name in ("one", "again", "two")
    )
    assert one == again != two


def test_sizes_are_what_their_names_say() -> None:
    for name, size in SIZES.items():
        layers, hidden = size["num_hidden_layers"], size["hidden_size"]
        parameters = layers * (4 * hidden**2 + 3 * hidden * size["intermediate_size"]) + 50_304 * hidden
        named = {"tiny": 7.3e6, "124M": 124e6, "350M": 350e6, "1.3B": 1.3e9}[name]
        assert parameters == pytest.approx(named, rel=0.05)
        assert hidden % size["num_attention_heads"] == 0


def test_what_cannot_be_made(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"it can be tiny, 124M, 350M, 1\.3B"):
        make_untrained(tmp_path / "base", tokenizer, "7B")
    with pytest.raises(CptError, match="it can be llama, gpt2"):
        make_untrained(tmp_path / "base", tokenizer, "tiny", shape="gpt3")
    with pytest.raises(CptError, match="nemo-cpt tokenizer train makes one"):
        make_untrained(tmp_path / "base", tmp_path / "nowhere", "tiny")
    for wrong in ({"seed": -1}, {"max_position_embeddings": 0}):
        with pytest.raises(CptError, match="give 0 or more, and 1 or more"):
            make_untrained(tmp_path / "base", tokenizer, "tiny", **wrong)
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CptError, match="names no eos_token"):
        make_untrained(tmp_path / "base", tokenizer, "tiny")
    assert not list(tmp_path.iterdir())
