"""Rows of the embedding and ids of the tokenizer: every row comes back, and none of a token is cut off in silence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemo_cpt.checkpoint import export_hf, import_hf
from nemo_cpt.checkpoint.model_config import read_model_config
from nemo_cpt.checkpoint.tokenizer_ids import count_token_ids
from nemo_cpt.errors import CptError
from tests.support import small_models as models


@pytest.mark.parametrize("rows", [251, 256, 300, 384])
@pytest.mark.parametrize("shape", ["qwen25", "llama31"])  # a tied head, and one of its own
def test_more_rows_than_tokens(shape: str, rows: int, tmp_path: Path) -> None:
    hf = models.make(shape, tmp_path / "hf", vocab_size=rows)
    assert import_hf(hf, tmp_path / "nemo").warnings == ()
    recorded = read_model_config(tmp_path / "nemo")
    assert recorded["vocab_size"] == rows
    assert rows % recorded["make_vocab_size_divisible_by"] == 0  # so that NeMo adds none of its own
    export_hf(tmp_path / "nemo", tmp_path / "back")
    models.assert_same_weights(hf, tmp_path / "back")


def _with_tokens(hf: Path, folder: Path, count: int) -> Path:
    """A copy of a model whose tokenizer has `count` tokens more."""
    shutil.copytree(hf, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"[NEW{number}]" for number in range(count)])
    tokenizer.save_pretrained(folder)
    return folder


def test_more_tokens_than_rows_are_warned_of_at_the_import(tmp_path: Path) -> None:
    hf = _with_tokens(models.make("llama31", tmp_path / "plain"), tmp_path / "hf", 1)
    (warning,) = import_hf(hf, tmp_path / "nemo").warnings
    assert "the tokenizer has 251 tokens and the model rows for 250" in warning
    export_hf(tmp_path / "nemo", tmp_path / "back")  # nothing was padded, so nothing is cut
    models.assert_same_weights(hf, tmp_path / "back")


@pytest.mark.parametrize("tokens", [50, 51, 134, 200])
def test_a_row_that_may_have_been_trained_is_not_cut(tokens: int, nemo_jobs: Path, tmp_path: Path) -> None:
    """A checkpoint of 384 rows of a base with 300: up to 300 tokens what is cut is padding."""
    base = _with_tokens(nemo_jobs / "hf", tmp_path / "base", tokens)
    if tokens == 50:
        assert export_hf(nemo_jobs / "runs" / "parallel", tmp_path / "out", base=base).padding_removed == 84
        return
    with pytest.raises(CptError, match=rf"384 rows .* {250 + tokens} tokens, but config\.json has room for 300 rows"):
        export_hf(nemo_jobs / "runs" / "parallel", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_model_that_lost_rows_of_its_base(tmp_path: Path) -> None:
    import_hf(models.make("llama31", tmp_path / "hf"), tmp_path / "nemo")
    base = models.make("llama31", tmp_path / "base", vocab_size=300)
    with pytest.raises(CptError, match=r"has 250 rows, config\.json asks for 300: .*model\.config\.vocab_size=300"):
        export_hf(tmp_path / "nemo", tmp_path / "out", base=base)


# --- counting the ids without loading the tokenizer ---


def _json(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def _pad(**extra: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", **extra}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": _pad()},  # named, and not in the vocabulary: appended when it is loaded
        {"tokenizer_config": _pad(pad_token="t5")},
        {"tokenizer_config": _pad(pad_token={"__type": "AddedToken", "content": "[PAD]"})},
        {"tokenizer_config": _pad(additional_special_tokens=["[A]", "[B]", "t7"])},
        {"tokenizer_config": _pad(), "special_tokens_map": {"pad_token": "[OTHER]", "eos_token": "t2"}},
        {
            "tokenizer_config": _pad(added_tokens_decoder={"250": {"content": "[PAD]", "special": True}}),
            "special_tokens_map": {"pad_token": "[OTHER]"},
        },
    ],
)
def test_the_count_is_that_of_transformers(files: dict[str, Any], tmp_path: Path) -> None:
    models.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    _json(tmp_path, **files)
    assert count_token_ids(tmp_path) == len(AutoTokenizer.from_pretrained(tmp_path))


def test_of_other_kinds_of_files(tmp_path: Path) -> None:
    _json(tmp_path, vocab={"a": 0, "b": 7})
    assert count_token_ids(tmp_path) == 8
    _json(tmp_path, tokenizer={"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]]}, "added_tokens": None})
    assert count_token_ids(tmp_path) == 2
    _json(tmp_path, tokenizer={"model": {"vocab": 5}})
    assert count_token_ids(tmp_path) is None
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").unlink()
    assert count_token_ids(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    assert count_token_ids(tmp_path) is None


def test_a_class_of_transformers_5_is_refused_with_its_cure(tmp_path: Path) -> None:
    hf = models.make("llama31", tmp_path / "hf")
    config = json.loads((hf / "tokenizer_config.json").read_text())
    (hf / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "TokenizersBackend"}))
    with pytest.raises(CptError, match=r'TokenizersBackend, .* write "PreTrainedTokenizerFast"'):
        import_hf(hf, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()
