"""The data module: every validation set by itself, the same samples each time, and caches that a kill left torn."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.loss import language_model_loss
from nemo_cpt.training.data import BlendDataModule
from nemo_cpt.training.datasets import TRAIN, gpt_dataset


def data_module(world: Path, blend: Any) -> BlendDataModule:
    paths = [item for prefix, weight in blend.train.items() for item in (weight, prefix)]
    return BlendDataModule(
        paths, dict(blend.validation), tokenizer=AutoTokenizer(str(world / "base/hf")), seq_length=64,
        global_batch_size=4, micro_batch_size=2,
    )  # fmt: skip


def test_validation_goes_through_one_set_after_the_other(world: Path, blend: Any) -> None:
    module = data_module(world, blend)
    module.build(10, 5, 2, 0)
    assert module.validation_names == ["ja", "en"]
    assert len(module._validation_ds) == 2 * 2 * 4
    tokenizer = module.tokenizer.tokenizer
    texts = [tokenizer.decode(module._validation_ds[index]["tokens"]) for index in range(16)]
    japanese = [any("\u3040" <= character <= "\u30ff" for character in text) for text in texts]
    assert japanese == [True] * 8 + [False] * 8


def test_training_holds_the_blends_share(world: Path, blend: Any) -> None:
    module = data_module(world, blend)
    module.build(50, 5, 1, 0)
    chosen = numpy.bincount(module._train_ds.dataset_index[:200], minlength=2) / 200
    assert chosen == pytest.approx([0.75, 0.25], abs=0.01)


def test_a_fraction_of_batches_is_refused(world: Path, blend: Any) -> None:
    with pytest.raises(CptError, match=r"limit_val_batches is 1\.0"):
        data_module(world, blend).build(10, 5, 1.0, 0)


def test_a_torn_index_cache_is_built_again(world: Path, blend: Any) -> None:
    module = data_module(world, blend)
    config = module._dataset_config()
    prefix = next(iter(module.blend.shares()))
    whole = gpt_dataset({prefix: 1.0}, 20, TRAIN, **config)
    samples = [whole[index]["tokens"] for index in range(20)]
    for path in Path(prefix, "cache").glob("**/*.npy"):
        path.write_bytes(path.read_bytes()[:40])
    again = gpt_dataset({prefix: 1.0}, 20, TRAIN, **config)
    assert all(torch.equal(again[index]["tokens"], samples[index]) for index in range(20))


def test_evaluation_reads_what_training_validates_on(world: Path, blend: Any) -> None:
    module = data_module(world, blend)
    module.build(10, 5, 2, 0)
    losses = [_loss(world, module._validation_ds[index]) for index in range(8, 16)]
    loss = language_model_loss(world / "base_hf", blend.validation["en"], seq_length=64, samples=8)
    assert loss == pytest.approx(sum(losses) / 8, abs=1e-4)


def _loss(world: Path, sample: dict[str, torch.Tensor]) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "base_hf").eval()
    with torch.inference_mode():
        logits = model(input_ids=sample["tokens"][None]).logits[0]
    return torch.nn.functional.cross_entropy(logits, sample["labels"]).item()
