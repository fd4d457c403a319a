"""Models are trained with as many rows as their base has, and no id beyond them is trained on."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from nemo.collections import llm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from nemo_cpt.checkpoint import export_hf, import_hf
from nemo_cpt.checkpoint.model_config import read_model_config
from nemo_cpt.compatibility import check_model, embedding_rows, read_base, rows_to_build
from nemo_cpt.corpus import Blend, prepare
from nemo_cpt.corpus.dataset import index
from nemo_cpt.cpu_stack import UNFUSED
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.bits_per_byte import sequences_loss
from nemo_cpt.inference.transformers_engine import TransformersEngine
from nemo_cpt.recipes import llama31_8b, parts, tiny
from nemo_cpt.training import guards
from nemo_cpt.training.metrics import read_metrics
from nemo_cpt.training.run_folder import newest_whole
from tests.training import jobs

ROWS, PADDED = 600, 608  # of 512 tokens; neither a multiple of 128 nor what NeMo would make of the tokens
SIZES = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
LATER = Blend(train={"ds/not_there_yet": 1.0})


@pytest.fixture(scope="module")
def bases(world: Path) -> Path:
    """`world` with the bases `padded` (more rows than tokens), `qwen` (biases, too) and `pad_token` (fewer rows)."""
    model, tokenizer = (each.from_pretrained(world / "base_hf") for each in (AutoModelForCausalLM, AutoTokenizer))
    model.resize_token_embeddings(ROWS)
    model.save_pretrained(world / "padded_hf")
    config = Qwen2Config(
        vocab_size=ROWS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    qwen = Qwen2ForCausalLM(config)
    for parameter in (each for each in qwen.parameters() if each.dim() > 1):
        parameter.data.normal_(std=0.3)  # further from uniform than the guard of the first loss allows
    qwen.save_pretrained(world / "qwen_hf")
    for name in ("padded", "qwen"):
        tokenizer.save_pretrained(world / f"{name}_hf")
        import_hf(world / f"{name}_hf", world / name)
    shutil.copytree(world / "base_hf", world / "pad_token_hf")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(world / "pad_token_hf")
    import_hf(world / "pad_token_hf", world / "pad_token")
    lines = [json.dumps({"text": f"The river {i} runs [PAD] past <new> stones."}) + "\n" for i in range(300)]
    (world / "pad.jsonl").write_text("".join(lines))
    prepare(world / "pad.jsonl", world / "ds/pad", world / "pad_token_hf", workers=1, quiet=True)
    return world


def train(world: Path, blend: Any, base: str, name: str, lora: bool = False, **changes: Any) -> None:
    model = parts.model_like(str(world / base), seq_length=64)
    recipe = tiny.continual_pretrain(
        str(world / base), blend, model=model, name=name, directory=str(world / "runs"), seq_length=64,
        global_batch_size=8, max_steps=2, val_check_interval=2, **changes,
    )  # fmt: skip
    run.run(llama31_8b.with_lora(recipe, rank=8) if lora else recipe, direct=True)


@pytest.mark.parametrize(
    ("base", "name", "processes", "settings"),
    [
        ("padded", "padded_full", 1, {}),
        ("padded", "padded_lora", 1, {"lora": True}),
        ("padded", "padded_tensor_parallel", 2, {"processes": 2, "tensor_model_parallel_size": 2}),
        ("qwen", "qwen_full", 1, {}),
    ],
)
def test_a_base_with_more_rows_than_tokens_trains_and_is_exported(
    bases: Path, blend: Any, base: str, name: str, processes: int, settings: dict[str, Any]
) -> None:
    log = bases / f"{name}.log"
    job = functools.partial(train, bases, blend, base, name, **settings)
    assert jobs.run(job, processes, log=log) == 0, log.read_text()[-3000:]
    losses = [line["val_loss_ja"] for line in read_metrics(bases / "runs" / name) if "val_loss_ja" in line]
    engine = TransformersEngine(bases / f"{base}_hf", device="cpu")
    held_out = sequences_loss(engine, bases / "ds/ja_validation", seq_length=64, samples=8)
    # The rows of padding take part in Megatron's softmax, with logits near 0; NeMo's cut to 512 rows shows as 0.3.
    assert losses[0] == pytest.approx(held_out.loss, abs=0.02)
    newest = newest_whole(bases / "runs" / name / "checkpoints")
    assert newest is not None
    checkpoint = newest.path
    assert read_model_config(checkpoint)["vocab_size"] == PADDED
    assert embedding_rows(checkpoint) == (None if "lora" in settings else PADDED)
    export_hf(checkpoint, bases / f"{name}_hf")
    before, after = (load_file(bases / f"{each}_hf" / "model.safetensors") for each in (base, name))
    assert {key: tensor.shape for key, tensor in after.items()} == {key: tensor.shape for key, tensor in before.items()}
    trained = "model.layers.0.mlp.down_proj.weight"
    assert not after[trained].equal(before[trained])


def test_a_token_that_was_added_to_a_full_model_is_refused_before_and_inside_the_job(bases: Path) -> None:
    added = Blend(train={str(bases / "ds/pad"): 1.0})
    with pytest.raises(CptError, match=r"ds/pad holds the token id 513, but the base has 512 rows .* a \[PAD\]"):
        tiny.continual_pretrain(str(bases / "pad_token"), added)
    recipe = tiny.continual_pretrain(str(bases / "pad_token"), LATER, seq_length=64)
    recipe.data.paths = [1.0, str(bases / "ds/pad")]
    with pytest.raises(CptError, match="holds the token id 513"):
        guards.check(recipe)
    log = bases / "pad.log"
    job = functools.partial(train_edited, bases, "pad_token", "pad", str(bases / "ds/pad"))
    assert jobs.run(job, 2, log=log) == 2, log.read_text()[-3000:]
    assert log.read_text().count("holds the token id 513") == 2  # both ranks say so, and neither waits for the other
    assert not (bases / "runs/pad/checkpoints").exists()


def test_an_id_that_no_sample_shows_is_refused_in_its_batch(bases: Path) -> None:
    for end in (".idx", ".bin"):
        shutil.copy(bases / f"ds/pad_text_document{end}", bases / f"ds/bare_text_document{end}")
    log = bases / "bare.log"
    job = functools.partial(train_edited, bases, "pad_token", "bare", str(bases / "ds/bare"), blind=True)
    assert jobs.run(job, log=log) == 2, log.read_text()[-3000:]
    assert "a batch holds the token id 513, but the base has 512 rows" in log.read_text()


def train_edited(world: Path, base: str, name: str, prefix: str, blind: bool = False) -> None:
    """Train on data that the recipe is given later, where its function cannot see it."""
    recipe = tiny.continual_pretrain(
        str(world / base), LATER, name=name, directory=str(world / "runs"), seq_length=64, global_batch_size=8,
        max_steps=2, val_check_interval=2, processes=1 if blind else 2,
    )  # fmt: skip
    recipe.data.paths = [1.0, prefix]
    if blind:
        index.largest_id_in_sample = lambda prefix: -1
    run.run(recipe, direct=True)


@pytest.mark.parametrize(
    ("settings", "ranks", "built"),
    [
        ({}, 1, 608),
        ({}, 4, 640),
        ({"make_vocab_size_divisible_by": 100}, 1, 600),
        ({"vocab_size": 1024}, 8, 1024),
    ],
)
def test_rows_are_those_of_the_weights_with_whole_tiles_unless_given(bases, settings, ranks, built) -> None:
    base = read_base(bases / "padded")
    for config in (run.Config(llm.LlamaConfig, **settings), llm.LlamaConfig(**settings, **UNFUSED, **SIZES)):
        assert rows_to_build(base, config, ranks) == built
    with pytest.raises(CptError, match=r"vocab_size 601 cannot be cut into 2 equal parts .* make it 602"):
        rows_to_build(base, run.Config(llm.LlamaConfig, vocab_size=601), 2)
    fewer = tiny.model().config
    fewer.vocab_size = 599
    with pytest.raises(CptError, match=r"has 599 rows .* its base .*padded 600: leave vocab_size alone"):
        check_model(base, fewer)
