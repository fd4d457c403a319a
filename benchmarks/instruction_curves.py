"""The recipe's instruction tuning beside TRL's SFTTrainer: same weights, conversations, batches, order and schedule.

    python benchmarks/instruction_curves.py --trl TRL [--base SMOLLM2] [--steps 30] [--check 0.02] [--out FOLDER]

TRL: what `pip install --target TRL --no-deps trl==1.16.* peft accelerate` gives. SMOLLM2: the Hugging Face folder of
SmolLM2-135M; without it the demo's base is made anew, a Llama of the `tiny` recipes' shape that has read some English.

Both train in fp32 on the CPU, every parameter, on the conversations that ship with the package. The recipe packs them,
several to a sequence. TRL gets a step's conversations one to a sequence, padded, and so never sees one through another.
Of the recipe's side it takes the tokens, their masks, which conversations each step has, and the learning rates;
attention, positions, loss, clipping and optimizer are its own. Its losses have the four decimals that it logs.

Prints both curves and their largest distance, writes them as JSON, and exits with 1 when they are further apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

SEQ_LENGTH, BATCH, MICRO_BATCH = 256, 8, 4  # two micro batches, whose trained tokens differ in number
TEMPLATE = "alpaca-ja"
PRETRAINING_STEPS = 30


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trl", type=Path, required=True, help="folder with TRL, PEFT and Accelerate")
    options.add_argument("--base", type=Path, help="Hugging Face folder of SmolLM2-135M")
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--check", type=float, default=0.02, help="largest loss difference allowed")
    options.add_argument("--out", type=Path, default=Path("instruction-curves"))
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="instruction_curves_") as made:
        curves = train_both(given, Path(made))
    apart = [abs(ours - theirs) for ours, theirs in zip(curves["recipe"], curves["trl"], strict=True)]
    (given.out / "curves.json").write_text(json.dumps(curves | {"largest_difference": max(apart)}, indent=1))
    print("| step | recipe | TRL | difference |\n|---|---|---|---|")
    for step, (ours, theirs, difference) in enumerate(zip(curves["recipe"], curves["trl"], apart, strict=True), 1):
        print(f"| {step} | {ours:.4f} | {theirs:.4f} | {difference:.1e} |")
    print(f"largest difference {max(apart):.1e} nats a token, at step {apart.index(max(apart)) + 1}")
    if not max(apart) <= given.check:  # nor where one is NaN
        sys.exit(f"the curves are {max(apart):.4f} apart, more than {given.check}")


def train_both(given: argparse.Namespace, made: Path) -> dict[str, list[float]]:
    """Train by the recipe and by TRL; losses of each step, in nats per trained token."""
    import nemo_run as run

    from nemo_cpt.checkpoint import import_hf
    from nemo_cpt.conversations import Conversations
    from nemo_cpt.recipes import smollm2, tiny
    from nemo_cpt.training.cpu import on_cpu
    from nemo_cpt.training.metrics import read_metrics

    hf = given.base or make_base(made / "hf")
    import_hf(hf, made / "nemo")
    data = Conversations(prepare_packaged(hf, made))
    recipe = (smollm2 if given.base else tiny).instruction_tune(
        str(made / "nemo"),
        data,
        name="recipe",
        directory=str(made),
        seq_length=SEQ_LENGTH,
        global_batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        max_steps=given.steps,
    )
    recipe.log.ckpt, recipe.trainer.enable_checkpointing = None, False
    on_cpu(recipe)
    task = {"base": str(hf), "learning_rates": learning_rates(recipe)} | batches_of(data, given.steps, recipe.data.seed)
    curve = train_by_trl(task, given)
    run.run(recipe, direct=True)
    metrics = [line for line in read_metrics(made / "recipe") if "reduced_train_loss" in line]
    check_rates([line["lr"] for line in metrics], task["learning_rates"])
    return {"recipe": [line["reduced_train_loss"] for line in metrics], "trl": curve}


def make_base(folder: Path) -> Path:
    from nemo_cpt.demo import base

    texts = {
        language: [
            json.loads(line)["text"]
            for line in (files("nemo_cpt.demo") / "corpus" / f"{language}.jsonl").read_text().splitlines()
        ]
        for language in ("ja", "en")
    }
    tokenizer = base.train_tokenizer(texts["ja"] + texts["en"])
    base.pretrain(texts["en"], tokenizer, folder, steps=PRETRAINING_STEPS, progress=lambda *_: None)
    return folder


def prepare_packaged(hf: Path, made: Path) -> dict[str, float]:
    from nemo_cpt.conversations import prepare

    for language in ("ja", "en"):
        source = str(files("nemo_cpt.demo") / "conversations" / f"{language}.jsonl")
        prepare(source, made / language, hf, template=TEMPLATE, quiet=True)
    return {str(made / language): 1.0 for language in ("ja", "en")}


def learning_rates(recipe: Any) -> list[float]:
    """The rate of each step, by the formula with which `loss_curves.py` checks the recipes' schedule."""
    from loss_curves import learning_rate

    schedule, steps = recipe.optim.lr_scheduler, recipe.trainer.max_steps
    return [
        learning_rate(step, recipe.optim.config.lr, schedule.min_lr, schedule.warmup_steps, steps)
        for step in range(steps)
    ]


def check_rates(logged: list[float], computed: list[float]) -> None:
    apart = max(abs(ours - theirs) for ours, theirs in zip(logged, computed, strict=True))
    if apart > 1e-3 * max(computed):
        raise SystemExit(f"the learning rates are {apart:.1e} apart: these are not the same runs")


def batches_of(data: Any, steps: int, seed: int) -> dict[str, Any]:
    """Tokens and masks of the conversations, and the numbers of those in each step of the recipe's training."""
    from nemo_cpt.conversations.mixture import TrainingSequences

    sequences = TrainingSequences(data, SEQ_LENGTH, seed)
    members = [sequences.members(number).tolist() for number in range(steps * BATCH)]
    batches = [list(chain(*members[start : start + BATCH])) for start in range(0, len(members), BATCH)]
    rows = [sequences.chats.read(number) for number in range(sum(map(len, sequences.sets)))]
    return {
        "batches": batches,
        "input_ids": [tokens.tolist() for tokens, _ in rows],
        "completion_mask": [trained.tolist() for _, trained in rows],
    }


def train_by_trl(task: dict[str, Any], given: argparse.Namespace) -> list[float]:
    """Run this file once more as TRL's program, in a process with TRL's folder ahead."""
    path = os.pathsep.join([str(given.trl.absolute()), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "import instruction_curves as curves; curves.trl_program()"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    (given.out / "trl.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"TRL's run failed, see {given.out / 'trl.log'}:\n{done.stderr[-2000:]}")
    losses: list[float] = json.loads(done.stdout.splitlines()[-1])
    return losses


def trl_program() -> None:
    """Train by SFTTrainer what stdin says; the last line of stdout is the list of losses."""
    import torch
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    task = json.load(sys.stdin)

    class InGivenBatches(SFTTrainer):
        def get_train_dataloader(self) -> DataLoader:
            """The conversations of each step together, however many they are."""
            return DataLoader(self.train_dataset, batch_sampler=task["batches"], collate_fn=self.data_collator)

    model = LlamaForCausalLM.from_pretrained(task["base"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    rates = [*task["learning_rates"], 0.0]  # the schedule looks one step ahead
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch, max_steps=len(task["batches"]), max_length=SEQ_LENGTH + 1, packing=False,
            completion_only_loss=True, max_grad_norm=1.0, logging_steps=1, gradient_checkpointing=False,
            save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        )  # fmt: skip
        trainer = InGivenBatches(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict({name: task[name] for name in ("input_ids", "completion_mask")}),
            processing_class=AutoTokenizer.from_pretrained(task["base"]),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates.__getitem__)),
        )
        if len(trainer.train_dataset) != len(task["input_ids"]):
            raise SystemExit("TRL left conversations out: their numbers are no longer those of the batches")
        trainer.train()
    print(json.dumps([line["loss"] for line in trainer.state.log_history if "loss" in line]))


if __name__ == "__main__":
    main()
