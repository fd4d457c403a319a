"""A model grown by rows: old rows and every other weight keep their bits, new rows are means, all files agree."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nemo_cpt.checkpoint import export_hf, grow_model, import_hf
from nemo_cpt.errors import CptError
from nemo_cpt.made import RECORD
from nemo_cpt.vocabulary import grow
from nemo_cpt.vocabulary.byte_level import read_byte_level
from nemo_cpt.vocabulary.similarity import similar_tokens
from tests.support import small_models as models
from tests.vocabulary.conftest import CORPUS, small_base, texts

EMBEDDING, HEAD, OF_GPT2 = "model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small tokenizer of Llama-3's kind, and the same grown by Japanese."""
    folder = tmp_path_factory.mktemp("tokenizers")
    base = small_base(folder / "base")
    grow(str(base), str(CORPUS / "ja.jsonl"), folder / "ja", tokens=300, min_count=2)
    return base, folder / "ja"


def make(shape: str, folder: Path, tokenizer: Path, spare: int = 0) -> Path:
    """A model of a shape with a row for each token of a tokenizer, and spare ones."""
    described = read_byte_level(str(tokenizer))
    ids = {f"{kind}_token_id": getattr(described.described, kind)[1] for kind in ("bos", "eos")}
    models.make(shape, folder, vocab_size=described.size + spare, **ids)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def small_files(folder: Path) -> dict[str, bytes]:
    """All files of a NeMo checkpoint beside the weights, which lie there in other blocks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "weights"]
    paths = [path for path in paths if path.name != RECORD]  # of which command it was
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("spare", [0, 30, 2000])
@pytest.mark.parametrize("shape", ["llama31", "llama32", "qwen2", "mistral", "gpt2"])
def test_old_rows_keep_their_bits_and_new_ones_are_means(
    shape: str, spare: int, tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = map(read_byte_level, map(str, tokenizers))
    source = make(shape, tmp_path / "hf", tokenizers[0], spare)
    report = grow_model(source, tmp_path / "grown", tokenizers[1], shard_bytes=60_000)
    before, after = models.tensors(source), models.tensors(tmp_path / "grown")
    assert before.keys() == after.keys()
    backend = old.backend()
    texts_of = {number: token for token, number in new.ids.items()}
    for name, tensor in before.items():
        if name not in report.grown:
            assert torch.equal(tensor, after[name])
            continue
        assert after[name].shape[0] == max(new.size, len(tensor)) == report.rows
        assert torch.equal(tensor[: old.size], after[name][: old.size])
        assert torch.equal(tensor[new.size :], after[name][new.size : len(tensor)])
        for number in range(old.size, new.size):
            parts = old.model_alone().encode(texts_of[number]).ids if number % 50 == 0 else None
            if parts:
                expected = tensor[parts].float().mean(0).to(tensor.dtype)
                torch.testing.assert_close(after[name][number], expected, rtol=1e-2, atol=1e-4)
    assert backend.get_vocab_size() == report.old_tokens
    assert report.grown == tuple(name for name in (EMBEDDING, OF_GPT2, HEAD) if name in before)


@pytest.mark.parametrize("shape", ["linear_rope", "qwen25", "gpt2"])  # in fp32, with an output layer, with tied rows
def test_logits_of_old_tokens_are_the_same_to_the_last_bit(
    shape: str, tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    source = make(shape, tmp_path / "hf", tokenizers[0])
    grow_model(source, tmp_path / "grown", tokenizers[1])
    small, large = (AutoModelForCausalLM.from_pretrained(each) for each in (source, tmp_path / "grown"))
    one, other = (AutoTokenizer.from_pretrained(each) for each in (source, tmp_path / "grown"))
    ids = one(texts("en")[0][:400], return_tensors="pt")["input_ids"]
    assert torch.equal(ids, other(texts("en")[0][:400], return_tensors="pt")["input_ids"])
    with torch.no_grad():
        before, after = small(ids).logits, large(ids).logits
    assert before.dtype == torch.float32
    assert torch.equal(before, after[..., : before.shape[-1]])


def test_config_tokenizer_and_generation_settings_belong_to_it(tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    source = make("llama31", tmp_path / "hf", tokenizers[0])
    (source / "vocab.json").write_text("{}")  # of the old tokenizer, and not of the grown one
    grow_model(source, tmp_path / "grown", tokenizers[1])
    config, old_config = (json.loads((each / "config.json").read_text()) for each in (tmp_path / "grown", source))
    assert config == old_config | {"vocab_size": read_byte_level(str(tokenizers[1])).size}
    assert GenerationConfig.from_pretrained(tmp_path / "grown") == GenerationConfig.from_pretrained(source)
    assert not (tmp_path / "grown" / "vocab.json").exists()
    assert (tmp_path / "grown" / "tokenizer.json").read_bytes() == (tokenizers[1] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("shape", ["llama31", "llama32"])
def test_a_nemo_checkpoint_becomes_what_the_grown_model_is_imported_as(
    shape: str, tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    source = make(shape, tmp_path / "hf", tokenizers[0], 7)
    import_hf(source, tmp_path / "nemo")
    grow_model(source, tmp_path / "grown_hf", tokenizers[1])
    import_hf(tmp_path / "grown_hf", tmp_path / "expected")
    grow_model(tmp_path / "nemo", tmp_path / "grown_nemo", tokenizers[1])
    assert small_files(tmp_path / "grown_nemo") == small_files(tmp_path / "expected")  # with the weights' checksums
    export_hf(tmp_path / "grown_nemo", tmp_path / "again")
    models.assert_same_weights(tmp_path / "again", tmp_path / "grown_hf")


def test_other_initialisations(tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    source, first = make("llama31", tmp_path / "hf", tokenizers[0]), read_byte_level(str(tokenizers[0])).size
    new = {}
    for kind in ("mean", "noise", "zero", "focus"):
        corpus = str(CORPUS / "ja.jsonl") if kind == "focus" else None
        report = grow_model(source, tmp_path / kind, tokenizers[1], initialisation=kind, corpus=corpus)
        new[kind] = models.tensors(tmp_path / kind)[EMBEDDING][first:].float()
    spread = float(models.tensors(source)[EMBEDDING].float().std())
    assert not new["zero"].any()
    assert float((new["noise"] - new["mean"]).std()) == pytest.approx(0.05 * spread, rel=0.1)
    old, grown = map(read_byte_level, map(str, tokenizers))
    alike = similar_tokens(old, grown, str(CORPUS / "ja.jsonl"))
    assert report.by_similarity == len(alike) > 50
    rows = models.tensors(source)[EMBEDDING].float()
    for number, row in enumerate(new["focus"], first):
        expected = torch.from_numpy(alike[number].weights) @ rows[alike[number].ids] if number in alike else None
        torch.testing.assert_close(
            row, new["mean"][number - first] if expected is None else expected, rtol=1e-2, atol=1e-3
        )
    with pytest.raises(CptError, match="it can be mean, noise, zero, focus"):
        grow_model(source, tmp_path / "other", tokenizers[1], initialisation="best")
    for kind, corpus in (("focus", None), ("mean", "ja.jsonl")):
        with pytest.raises(CptError, match="focus, and no other, is learnt from a corpus"):
            grow_model(source, tmp_path / "other", tokenizers[1], initialisation=kind, corpus=corpus)


def test_what_does_not_belong_together_is_refused_and_leaves_nothing(
    tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    base, grown = tokenizers
    source = make("llama31", tmp_path / "hf", base)
    other = small_base(tmp_path / "other", r"\p{L}+|[^\p{L}]")
    foreign = make("llama31", tmp_path / "foreign", other)
    short = make("llama31", tmp_path / "short", base, -1)
    for model, tokenizer, message in (
        (foreign, grown, "did not grow from"),
        (source, base, "nothing to grow"),
        (short, grown, "give it a row for each first"),
        (source, tmp_path / "nowhere", "no tokenizer folder"),
        (tmp_path / "nowhere", grown, "there is no folder"),
    ):
        with pytest.raises(CptError, match=message):
            grow_model(model, tmp_path / "dest", tokenizer)
    with pytest.raises(CptError, match="needs no base"):
        grow_model(source, tmp_path / "dest", grown, base=source)
    weights = sorted(source.glob("*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CptError, match="not a whole safetensors file"):
        grow_model(source, tmp_path / "dest", grown)
    assert not (tmp_path / "dest").exists()
    assert not list(tmp_path.glob(".dest*"))


def test_an_instructed_models_template_and_ends_are_not_taken_away_by_its_bases_tokenizer(
    tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    base, grown = tokenizers
    source = make("llama32", tmp_path / "hf", base)
    template, config = source / "chat_template.jinja", source / "tokenizer_config.json"
    template.write_text("{{ bos_token }}{{ messages }}")
    with pytest.raises(CptError, match="would take its chat template away"):
        grow_model(source, tmp_path / "dest", grown)
    template.unlink()  # of which the grown one may have one
    grow_model(source, tmp_path / "kept", grown)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "<|eot_id|>"}))
    with pytest.raises(CptError, match=r"would take its eos_token '<\|eot_id\|>' away"):
        grow_model(source, tmp_path / "dest", grown)
    assert not (tmp_path / "dest").exists()


def test_the_command(tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nemo_cpt.cli import app, checkpoint  # noqa: F401  registers its commands

    source = make("llama32", tmp_path / "hf", tokenizers[0])
    arguments = ["grow", str(source), "-t", str(tokenizers[1]), "-o", str(tmp_path / "grown"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["grown"] == [EMBEDDING]
    alike = ["--initialisation", "focus", "--corpus", str(CORPUS / "ja.jsonl"), "--json"]
    done = CliRunner().invoke(app, [*arguments[:-2], str(tmp_path / "alike"), *alike])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["by_similarity"] > 50
