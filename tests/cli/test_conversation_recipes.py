"""Recipes of instruction tuning by name: what the command line makes of conversations, and what the doctor is told."""

from pathlib import Path

import pytest

from nemo_cpt import catalog
from nemo_cpt.catalog import build, workloads
from nemo_cpt.conversations import Conversations, prepare
from nemo_cpt.corpus import Blend
from nemo_cpt.demo.base import train_tokenizer
from nemo_cpt.errors import CptError
from nemo_cpt.launching.description import describe
from tests.conversations.helpers import pairs, write_lines


def described(name: str, *given: str):
    function, arguments, fields, _ = catalog.split(name, list(given))
    return describe(function, arguments, fields, "local", ())


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with `sft/ja` and `sft/ja_validation`."""
    train_tokenizer(["質問と答え"] * 3, vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    for name, count, start in (("ja", 40, 0), ("ja_validation", 5, 100)):
        lines = write_lines(tmp_path / f"{name}.jsonl", pairs(count, start))
        prepare(lines, tmp_path / "sft" / name, tmp_path / "tokenizer", template="alpaca-ja", workers=1, quiet=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_conversations_are_written_as_a_blend_is() -> None:
    text = "data={train: {sft/ja: 1.0, sft/en: 0.5}, validation: {ja: sft/ja_validation}, too_long: cut}"
    _, arguments, _, _ = catalog.split("smollm2.instruction_tune", [text, "replay={train: {ds/en: 1.0}}"])
    assert arguments["data"] == Conversations({"sft/ja": 1.0, "sft/en": 0.5}, {"ja": "sft/ja_validation"}, "cut")
    assert arguments["replay"] == Blend({"ds/en": 1.0})
    with pytest.raises(CptError, match="Conversations has no field weighting; it has: train, validation, too_long"):
        catalog.split("smollm2.instruction_tune", ["data={train: {sft/ja: 1.0}, weighting: tokens}"])


def test_their_fields_become_conversations_again_in_the_job() -> None:
    made = build._made({"train": {"sft/ja": 1.0}, "too_long": "cut"}, "Conversations | None")
    assert made == Conversations({"sft/ja": 1.0}, too_long="cut")
    assert build._made({"train": {"ds/ja": 1.0}}, "Blend | None") == Blend({"ds/ja": 1.0})


def test_the_defaults_are_read_from_the_source() -> None:
    job = described("llama31_8b.instruction_tune")
    assert job.data == Conversations({"sft/ja": 1.0}, {"ja": "sft/ja_validation"})
    assert (job.gpus_per_node, job.tensor_model_parallel_size, job.seq_length) == (8, 2, 4096)
    # The steps cannot be counted: the data are not here. So as many as can ever lie together: the best three, and two.
    assert (job.max_steps, job.checkpoints) == (0, 5)
    assert described("llama31_8b.instruction_tune_single_gpu").lora_rank == 32
    assert described("llama31_8b.instruction_tune", "max_steps=70").max_steps == 70


def test_epochs_are_counted_where_the_conversations_are(chats: Path) -> None:
    data = Conversations({"sft/ja": 1.0})
    job = described("smollm2.instruction_tune", "epochs=5", "global_batch_size=2")
    assert job.max_steps == data.steps(5, 2, 1024)
    assert described("smollm2.instruction_tune", "global_batch_size=2").max_steps == data.steps(2, 2, 1024)
    with_replay = described("smollm2.instruction_tune", "epochs=50", "replay={train: {ds/en: 1.0}}")
    assert with_replay.max_steps == data.steps(50, 16, 1024, 0.05) > data.steps(50, 16, 1024)


def test_epochs_are_counted_of_the_part_that_the_seed_takes(chats: Path) -> None:
    data = Conversations({"sft/ja": 0.25})
    given = ["epochs=3", "global_batch_size=1", "micro_batch_size=1", "seq_length=512", "seed=7"]
    job = described("smollm2.instruction_tune", "data={train: {sft/ja: 0.25}}", *given)
    assert job.max_steps == data.steps(3, 1, 512, seed=7) != data.steps(3, 1, 512)


def test_a_plan_that_counted_epochs_is_not_that_of_other_conversations(chats: Path) -> None:
    before = workloads._counted("smollm2.instruction_tune", {})
    lines = write_lines(chats / "ja.jsonl", pairs(41))
    prepare(lines, "sft/ja", "tokenizer", template="alpaca-ja", workers=1, quiet=True, overwrite=True)
    assert workloads._counted("smollm2.instruction_tune", {}) != before != ""
    assert workloads._counted("smollm2.instruction_tune", {"max_steps": 5}) == ""
    assert workloads._counted("smollm2.continual_pretrain", {}) == ""
