"""What a manifest says of its tokenizer, so that it can be compared without it."""

import json
from pathlib import Path

import pytest

from nemo_cpt.corpus import max_token_id, prepare, read_manifest
from nemo_cpt.corpus.tokenization.probes import TEXTS, first_difference, probe
from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
from tests.support.corpus_helpers import write_jsonl


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["small", "llama3", "sentencepiece", "byt5"])
def test_a_manifest_has_the_probes_and_the_largest_id(
    request: pytest.FixtureRequest, tmp_path: Path, texts: list[str], name: str, fast: bool
) -> None:
    folder = request.getfixturevalue(name)
    prepare(write_jsonl(tmp_path / "x.jsonl", texts[:20]), tmp_path / "x", folder, workers=1, quiet=True, fast=fast)
    manifest = read_manifest(tmp_path / "x")
    assert manifest["largest"] == max_token_id(tmp_path / "x")
    assert manifest["probes"].keys() == set(TEXTS)
    assert first_difference(manifest["probes"], load_tokenizer(folder).reference_encoder()) is None


def test_tokenizers_are_told_apart(small: Path, llama3: Path, tmp_path: Path) -> None:
    recorded = probe(load_tokenizer(small).reference_encoder())
    assert first_difference(recorded, load_tokenizer(llama3).reference_encoder()) is not None
    content = json.loads((small / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {"H": vocabulary["w"], "w": vocabulary["H"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = first_difference(recorded, load_tokenizer(tmp_path).reference_encoder())
    assert found is not None
    assert found[1] != found[2]


def test_split_special_tokens_are_probed_as_they_are_encoded(small: Path, tmp_path: Path, texts: list[str]) -> None:
    prepare(
        write_jsonl(tmp_path / "x.jsonl", texts[:5]), tmp_path / "x", small, workers=1, quiet=True,
        split_special_tokens=True,
    )  # fmt: skip
    probes = read_manifest(tmp_path / "x")["probes"]
    assert first_difference(probes, load_tokenizer(small).reference_encoder(split_special_tokens=True)) is None
