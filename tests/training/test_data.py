"""The data module: every validation set by itself, the same samples each time, as the files hold them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from nemo.collections import llm
from nemo.collections.common.tokenizers import AutoTokenizer
from torch.utils.data import DataLoader

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.bits_per_byte import sequences_loss
from nemo_cpt.inference.token_bytes import TokenBytes
from nemo_cpt.inference.transformers_engine import TransformersEngine
from nemo_cpt.monitoring.description import _bytes_per_token
from nemo_cpt.training.data import BlendDataModule
from nemo_cpt.training.datasets import VALIDATION, in_another_order
from tests.training.small_datasets import EOS, ORDINARY, SEQ_LENGTH, dataset, documents, expected, sequences, write


def data_module(world: Path, blend: Any, **options: Any) -> BlendDataModule:
    paths = [item for prefix, weight in blend.train.items() for item in (weight, prefix)]
    return BlendDataModule(
        paths, dict(blend.validation), tokenizer=AutoTokenizer(str(world / "base/hf")), seq_length=64,
        global_batch_size=4, micro_batch_size=2, **options,
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


def test_a_run_goes_through_no_sequence_twice_for_want_of_samples(world: Path, blend: Any) -> None:
    with pytest.raises(CptError, match=r"num_train_samples is 39, and 10 steps of 4 sequences take 40"):
        data_module(world, blend, num_train_samples=39).build(10, 5, 1, 0)
    module = data_module(world, blend, num_train_samples=80)
    module.build(10, 5, 1, 0)
    assert len(module._train_ds) >= 80


@pytest.mark.parametrize("pad", [None, EOS, ORDINARY])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_what_the_file_holds(tmp_path: Path, pad: int | None, workers: int) -> None:
    """Tokens, labels and masks, also of the samples after one that holds the padding token, and when read again."""
    texts = documents(seed=1)
    built = dataset(write(tmp_path / "text", texts), pad=pad)
    wanted = torch.tensor(expected(built, texts))
    assert {EOS, ORDINARY} <= set(wanted.flatten().tolist())
    loader = DataLoader(built, batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    for _ in range(2):
        read = {name: torch.cat(parts) for name, parts in _columns(loader).items()}
        assert torch.equal(read["tokens"], wanted[:, :-1])
        assert torch.equal(read["labels"], wanted[:, 1:])
        assert torch.equal(read["loss_mask"], torch.ones(len(built), SEQ_LENGTH))
        assert torch.equal(read["position_ids"], torch.arange(SEQ_LENGTH).expand(len(built), -1))


def _columns(loader: DataLoader) -> dict[str, list[torch.Tensor]]:
    batches = list(loader)
    return {name: [batch[name] for batch in batches] for name in batches[0]}


@pytest.mark.parametrize("pad", [EOS, ORDINARY])
def test_megatron_overwrites_its_padding_token_without_the_patch(
    tmp_path: Path, pad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = documents(seed=1)
    prefix = write(tmp_path / "text", texts)
    monkeypatch.setattr(GPTDataset, "__init__", GPTDataset.__init__.unpatched)
    built = dataset(prefix, pad=pad)
    assert sequences(built) != expected(built, texts)
    assert any(not sample["loss_mask"].all() and pad not in sample["labels"] for sample in built)  # another one's mask


def test_all_that_the_module_reads_is_what_the_files_hold(world: Path, blend: Any) -> None:
    """With a tokenizer that pads with its end of text, in training and in every validation set."""
    module = data_module(world, blend)
    module.tokenizer.pad_token = module.tokenizer.eos_token
    assert module.tokenizer.pad == module.tokenizer.eod
    module.build(10, 5, 2, 0)
    read = [module._train_ds[index] for index in range(40)] + [module._validation_ds[index] for index in range(16)]
    assert any(module.tokenizer.eod in sample["labels"] for sample in read)
    assert all(sample["loss_mask"].all() for sample in read)
    assert all(torch.equal(sample["tokens"][1:], sample["labels"][:-1]) for sample in read)


def test_so_it_is_in_nemos_own_data_module(world: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer(str(world / "base/hf"))
    tokenizer.pad_token = tokenizer.eos_token
    texts = [[*text[:-1], tokenizer.eod] for text in documents(seed=1)]
    prefix = write(tmp_path / "text", texts)
    module = llm.PreTrainingDataModule(
        {"train": [prefix], "validation": [prefix], "test": [prefix]}, tokenizer=tokenizer, seq_length=SEQ_LENGTH,
        global_batch_size=4, micro_batch_size=2,
    )  # fmt: skip
    module.build(10, 5, 2, 1)
    assert sequences(module._train_ds) == expected(module._train_ds, texts)
    assert all(sample["loss_mask"].all() for sample in module._train_ds)


def test_when_megatron_draws_another_order_for_more_steps(tmp_path: Path) -> None:
    prefix = write(tmp_path / "text", documents(seed=1, count=40))
    one_pass = len(dataset(prefix, samples=1))
    built = {samples: dataset(prefix, samples=samples) for samples in range(one_pass - 8, 3 * one_pass, 5)}
    read = {samples: sequences(each)[: one_pass - 8] for samples, each in built.items()}
    found = set()
    for more, each in built.items():
        for fewer in built:
            another = in_another_order(each, fewer / more) == [prefix]
            assert another == (read[more] != read[fewer]), (more, fewer)
            found.add(another)
    assert found == {True, False}
    longer = write(tmp_path / "longer", documents(seed=2, count=400))
    assert in_another_order(dataset(prefix, longer, samples=60), 2.0) == [prefix]


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33])
def test_text_shorter_than_a_sequence_or_a_batch_is_repeated(tmp_path: Path, count: int) -> None:
    texts = [[*range(10, 9 + count), EOS]]
    built = dataset(write(tmp_path / "text", texts), samples=5, split=VALIDATION)
    assert len(built) >= 5
    assert sequences(built) == expected(built, texts)


def test_evaluation_reads_what_training_validates_on(world: Path, blend: Any) -> None:
    module = data_module(world, blend)
    module.build(10, 5, 2, 0)
    losses = [_loss(world, module._validation_ds[index]) for index in range(8, 16)]
    engine = TransformersEngine(world / "base_hf", device="cpu")
    loss = sequences_loss(engine, blend.validation["en"], seq_length=64, samples=8).loss
    assert loss == pytest.approx(sum(losses) / 8, abs=1e-4)


def test_evaluation_masks_what_a_run_masks(world: Path, blend: Any) -> None:
    """Each document of a sequence is asked by itself, without what is predicted from the end of the one before."""
    module = data_module(world, blend)
    module.build(10, 5, 2, 0)
    engine, prefix = TransformersEngine(world / "base_hf", device="cpu"), blend.validation["ja"]
    eod = engine.tokenizer.eos_token_id
    whole, masked = 0.0, 0.0
    for sample in (module._validation_ds[index] for index in range(8)):
        whole += 64 * _loss(world, sample)
        starts = [0, *(position + 1 for position in torch.where(sample["tokens"] == eod)[0].tolist()), 64]
        for start, end in pairwise(starts):
            part = {name: sample[name][start:end].clone() for name in ("tokens", "labels")}
            part["labels"][part["tokens"] == eod] = -100
            counted = int((part["labels"] != -100).sum())
            masked += counted * _loss(world, part) if counted else 0
    settings = {"eod_mask_loss": True, "reset_attention_mask": True}
    found = sequences_loss(engine, prefix, seq_length=64, samples=8, **settings)
    plain = sequences_loss(engine, prefix, seq_length=64, samples=8)
    assert sum(plain.nats) == pytest.approx(whole, abs=1e-2)
    assert sum(found.nats) == pytest.approx(masked, abs=1e-2)
    assert abs(masked - whole) > 0.1
    assert sum(found.tokens) < sum(plain.tokens) == 8 * 64
    assert found.first_token.endswith("(eod_mask_loss); no document sees the one before (reset_attention_mask)")


def test_a_tokens_bytes_are_those_of_the_tokens_that_the_loss_counts(world: Path, blend: Any) -> None:
    """Of a run whose loss leaves out what follows a text's end, the next one's first token, which has bytes."""
    whole, masked = data_module(world, blend), data_module(world, blend, eod_mask_loss=True)
    counted = {}
    for module in (whole, masked):
        module.build(10, 5, 2, 0)
        samples = [module._validation_ds[index] for index in range(8)]
        counted[module] = torch.cat([sample["labels"][sample["loss_mask"].bool()] for sample in samples]).tolist()
    assert len(counted[masked]) < len(counted[whole]) == 8 * 64
    bytes_of, eod = TokenBytes(whole.tokenizer.tokenizer), whole.tokenizer.eod
    for module, labels in counted.items():
        size = sum(len(bytes_of(label)) for label in labels if label != eod)
        assert len(labels) * _bytes_per_token(module)["ja"] == pytest.approx(size)


def _loss(world: Path, sample: dict[str, torch.Tensor]) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "base_hf").eval()
    with torch.inference_mode():
        logits = model(input_ids=sample["tokens"][None]).logits[0]
    return torch.nn.functional.cross_entropy(logits, sample["labels"]).item()


def test_a_longer_run_reads_in_the_same_order_while_it_needs_no_further_pass(tmp_path: Path) -> None:
    """What a resumption with a larger `max_steps` does to the data; 28 sequences are a pass."""
    prefix = write(tmp_path / "text", documents(seed=1))
    short, longer, second_pass = (sequences(dataset(prefix, samples=count)) for count in (10, 24, 40))
    assert longer[:10] == short[:10]
    assert second_pass[:10] != short[:10]
