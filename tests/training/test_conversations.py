"""The data module of conversations: what a micro batch is, and that no answer depends on how it came into one."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import nemo_run as run
import numpy as np
import pytest
import torch
from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_cpt.conversations import Conversations, Packing, mixture, prepare
from nemo_cpt.errors import CptError
from nemo_cpt.recipes import smollm2, tiny
from nemo_cpt.training.conversations import ConversationDataModule, as_one_sequence, check_layout, with_block_mask
from tests.training import jobs

LENGTH, SEQUENCES = 256, 16


def data_module(world: Path, chats: Conversations, **changes: Any) -> ConversationDataModule:
    paths = [item for prefix, weight in chats.train.items() for item in (weight, prefix)]
    settings = {"seq_length": LENGTH, "global_batch_size": 8, "micro_batch_size": 2} | changes
    return ConversationDataModule(
        paths, dict(chats.validation), tokenizer=AutoTokenizer(str(world / "base/hf")), **settings
    )


class TestMicroBatch:
    @pytest.fixture
    def samples(self, world: Path, chats: Conversations) -> list[Any]:
        module = data_module(world, chats)
        module.build(1, 1, 1, 0)
        return [module._train_ds[index] for index in range(3)]

    def test_a_mask_lets_a_position_see_its_own_conversation_up_to_itself(self, samples: list[Any]) -> None:
        batch = with_block_mask(samples)
        assert batch["attention_mask"].shape == (3, 1, LENGTH, LENGTH)
        for number, sample in enumerate(samples):
            starts = sample["cu_seqlens"]
            stretch = np.searchsorted(starts, np.arange(LENGTH), side="right")
            for position in range(LENGTH):
                seen = np.flatnonzero(~batch["attention_mask"][number, 0, position].numpy())
                own = np.flatnonzero(stretch == stretch[position])
                assert seen.tolist() == [each for each in own if each <= position]

    def test_on_a_gpu_the_sequences_are_one_with_its_stretches(self, samples: list[Any]) -> None:
        batch = as_one_sequence(samples)
        assert {batch[name].shape for name in ("tokens", "labels", "loss_mask", "position_ids")} == {(1, 3 * LENGTH)}
        starts = batch["cu_seqlens"][0, : batch["cu_seqlens_argmin"].item()].tolist()
        assert starts[0] == 0
        assert starts[-1] == 3 * LENGTH
        assert max(np.diff(starts)) == batch["max_seqlen"].item()
        assert batch["cu_seqlens"].dtype == torch.int32
        # The positions begin anew exactly where a stretch does.
        assert torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist() == starts[:-1]

    def test_a_text_is_one_stretch(self) -> None:
        text = {name: torch.arange(4) for name in ("tokens", "labels", "loss_mask", "position_ids")}
        assert as_one_sequence([text, text])["cu_seqlens"].tolist() == [[0, 4, 8]]
        assert torch.equal(with_block_mask([text])["attention_mask"][0, 0], torch.ones(4, 4).triu(1).bool())


class TestValidation:
    def test_every_conversation_is_validated_once_and_the_last_batch_filled_up(
        self, world: Path, chats: Conversations
    ) -> None:
        module = data_module(world, chats, global_batch_size=8)
        module.build(10, 5, 100, 0)
        read = [module._validation_ds[index] for index in range(len(module._validation_ds))]
        assert len(read) == 8
        (set_,) = [mixture.open_conversations(prefix) for prefix in chats.validation.values()]
        assert sum(sample["loss_mask"].sum() for sample in read) == set_.mask.sum()
        assert sum(module.validation_weights["chats"]) == set_.mask.sum()
        assert read[-1]["cu_seqlens"].tolist() == [0, LENGTH]  # an empty one

    def test_a_limit_is_kept(self, world: Path, chats: Conversations) -> None:
        module = data_module(world, chats, global_batch_size=2)
        module.build(10, 5, 1, 0)
        assert len(module._validation_ds) == 2
        assert len(module.validation_weights["chats"]) == 1

    def test_a_set_that_fits_no_sequence_is_refused(self, world: Path, chats: Conversations, tmp_path: Path) -> None:
        (tmp_path / "long.jsonl").write_text(json.dumps({"query": "What?", "answer": "A long one. " * LENGTH}) + "\n")
        template = str(world / "template.jinja")
        prepare(tmp_path / "long.jsonl", tmp_path / "long", world / "base_hf", template=template, workers=1, quiet=True)
        with pytest.raises(CptError, match="no conversation of the validation set 'long'"):
            data_module(world, replace(chats, validation={"long": str(tmp_path / "long")})).build(1, 1, 1, 0)


def test_what_is_left_out_is_said(world: Path, chats: Conversations, capsys: pytest.CaptureFixture[str]) -> None:
    positions = mixture.TrainingSequences(chats, LENGTH).fit.positions
    middle = int(np.median(positions))
    data_module(world, Conversations(chats.train), seq_length=middle).build(1, 1, 0, 0)
    over = int((positions > middle).sum())
    assert f"{over} of the {len(positions)} conversations of {world}/sft/train_conversations" in capsys.readouterr().err


class TestReplay:
    def test_its_share_is_right_at_every_step(self, world: Path, chats: Conversations, blend: Any) -> None:
        texts = str(world / "ds/en_train")
        validation = {"en": str(world / "ds/en_validation")}
        module = data_module(world, chats, replay_paths=[1.0, texts], replay_validation=validation, replay_share=0.25)
        module.build(10, 5, 2, 0)
        kinds = ["cu_seqlens" in module._train_ds[index] for index in range(80)]
        for step in range(10):
            assert kinds[step * 8 : step * 8 + 8].count(False) == 2
        assert module.validation_names == ["chats", "en"]
        assert module.validation_weights["en"] == [1.0, 1.0]
        assert list(module.training_sets.values()) == [1.0, 0.25]
        # No conversation is skipped: those between the texts are an epoch's, in its order.
        order = mixture.TrainingSequences(chats, LENGTH)
        told = [module._train_ds[index]["tokens"].tolist() for index in range(80) if kinds[index]]
        assert told == [order[index]["tokens"].tolist() for index in range(60)]

    @pytest.mark.parametrize(("texts", "share"), [(None, 0.1), ("ds/en_train", 0.0), ("ds/en_train", 1.0)])
    def test_a_share_without_text_or_text_without_a_share_is_refused(
        self, world: Path, chats: Conversations, texts: str | None, share: float
    ) -> None:
        with pytest.raises(CptError, match=r"replay_share is .*: give both"):
            data_module(world, chats, replay_paths=texts and [1.0, str(world / texts)], replay_share=share)

    def test_a_name_stands_for_one_set(self, world: Path, chats: Conversations) -> None:
        replay = {"chats": str(world / "ds/en_validation")}
        with pytest.raises(CptError, match="both have a validation set 'chats'"):
            data_module(
                world, chats, replay_paths=[1.0, str(world / "ds/en_train")], replay_validation=replay, replay_share=0.1
            )


def test_steps_that_are_not_the_epochs_are_refused_in_the_job(world: Path, chats: Conversations) -> None:
    steps = chats.steps(2, 8, LENGTH)
    data_module(world, chats, epochs=2.0).build(steps, 5, 1, 0)
    with pytest.raises(CptError, match=f"2 epochs of them are {steps} steps, not {steps + 1}: .*max_steps={steps}"):
        data_module(world, chats, epochs=2.0).build(steps + 1, 5, 1, 0)


@pytest.mark.parametrize(
    ("layout", "message"),
    [((2, 1, 1), "context_parallel_size is 2"), ((1, 2, 2), "micro_batch_size is 2 with pipeline")],
)
def test_layouts_that_would_cut_conversations_are_refused(layout: tuple[int, int, int], message: str) -> None:
    check_layout(1, 2, 1)
    check_layout(1, 1, 4)
    with pytest.raises(CptError, match=message):
        check_layout(*layout)


class KeepGradients(pl.Callback):
    """Writes the gradients of the first step, and the loss that they are of."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 1 and trainer.is_global_zero:
            named = trainer.strategy.megatron_parallel.named_parameters()
            gradients = {name: parameter.main_grad.clone() for name, parameter in named}
            torch.save((float(trainer.callback_metrics["reduced_train_loss"]), gradients), self.path)


def _one_step(
    world: Path, chats: Conversations, name: str, apart: bool, per_token: bool, gpu: bool, changes: dict[str, Any]
) -> None:
    settings = {"global_batch_size": SEQUENCES, "max_steps": 1, "limit_val_batches": 0, "lr": 1e-3} | changes
    settings |= {"name": name, "directory": str(world / "steps"), "seq_length": LENGTH}
    if gpu:
        recipe = smollm2.instruction_tune(str(world / "base"), chats, model=tiny.model(LENGTH), **settings)
    else:
        recipe = tiny.instruction_tune(str(world / "base"), chats, **settings)
    recipe.optim.config.clip_grad = 0.0
    recipe.model.config.calculate_per_token_loss = per_token
    recipe.trainer.callbacks.append(run.Config(KeepGradients, path=str(world / f"{name}.pt")))
    with mock.patch.object(mixture, "pack", _apart if apart else mixture.pack):
        run.run(recipe, direct=True)


def _apart(lengths: Any, seq_length: int, seed: int = 0) -> Packing:
    """Every conversation in a sequence of its own."""
    return Packing(seq_length, np.arange(len(lengths)), np.arange(len(lengths) + 1), int(lengths.sum()))


def gradients(
    world: Path,
    chats: Conversations,
    name: str,
    *,
    apart: bool = False,
    per_token: bool = True,
    gpu: bool = False,
    **changes: Any,
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of a run's first step."""
    job = functools.partial(_one_step, world, chats, name, apart, per_token, gpu, changes)
    log = world / f"{name}.log"
    assert jobs.run(job, changes.get("processes", 1), log=log) == 0, log.read_text()[-3000:]
    return torch.load(world / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def packed(world: Path, chats: Conversations) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one epoch, which is one step."""
    assert mixture.TrainingSequences(chats, LENGTH).count(1) == SEQUENCES
    return gradients(world, chats, "packed", micro_batch_size=1)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("micro_batch_2", {"micro_batch_size": 2}),
        ("micro_batch_4", {"micro_batch_size": 4}),
        ("data_parallel", {"processes": 2, "micro_batch_size": 2}),
        ("unpacked", {"apart": True, "global_batch_size": 64, "micro_batch_size": 4}),
    ],
)
def test_the_gradient_depends_on_the_conversations_alone(
    world: Path, chats: Conversations, packed: Any, name: str, changes: dict[str, Any]
) -> None:
    loss, found = gradients(world, chats, name, **changes)
    assert loss == pytest.approx(packed[0], abs=1e-5)
    largest = max(float(each.abs().max()) for each in packed[1].values())
    assert largest > 1e-3
    for key, expected in packed[1].items():
        assert torch.allclose(found[key], expected, rtol=1e-4, atol=1e-5 * largest), key


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_transformer_engine_keeps_conversations_apart_as_the_mask_does(
    world: Path, chats: Conversations, packed: Any, micro_batch_size: int
) -> None:
    """In bf16, by the stretches' starts, against fp32 with a block-diagonal mask."""
    name = f"transformer_engine_{micro_batch_size}"
    loss, found = gradients(world, chats, name, gpu=True, micro_batch_size=micro_batch_size)
    assert loss == pytest.approx(packed[0], rel=5e-3)
    # Mixed precision wraps the model once more: the names differ in how many "module." stand before them.
    of_te = {key.rpartition("module.")[2]: each for key, each in found.items()}
    of_mask = {key.rpartition("module.")[2]: each for key, each in packed[1].items()}
    shared = [key for key in of_mask if key.endswith("weight") and key in of_te and "norm" not in key]
    assert len(shared) > 10
    for key in shared:
        one, two = of_te[key].float().cpu().flatten(), of_mask[key].flatten()
        assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99, key


def test_it_would_depend_on_more_without_the_loss_per_token(world: Path, chats: Conversations, packed: Any) -> None:
    _, found = gradients(world, chats, "means", per_token=False, micro_batch_size=1)
    key = max(found, key=lambda name: float((found[name] - packed[1][name]).abs().max()))
    assert not torch.allclose(found[key], packed[1][key], rtol=1e-2)
