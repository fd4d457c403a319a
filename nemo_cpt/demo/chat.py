"""`make chat-demo`: the demo's model, continually pretrained, is taught to answer; three replies before and after."""

import json
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemo_cpt.demo.__main__ import FOLDER, set_environment
from nemo_cpt.demo.console import console, followed, quietly, say
from nemo_cpt.errors import CptError
from nemo_cpt.training.metrics import read_metrics
from nemo_cpt.training.run_folder import newest_whole

TEMPLATE, NAME = "alpaca-ja", "chat"
EPOCHS, SEQ_LENGTH, GLOBAL_BATCH_SIZE = 20, 256, 8
ASKED = (("ja", "train"), ("en", "train"), ("ja", "validation"))  # the first question of each
MOST_TOKENS = 60


def main() -> None:
    """Every step, narrated; needs what `make demo` left."""
    started = time.monotonic()
    set_environment()
    newest = newest_whole(FOLDER / "runs" / "with_replay" / "checkpoints")
    if newest is None or not (FOLDER / "with_replay_hf").is_dir():
        raise CptError(f"there is no finished demo in {FOLDER}: run `make demo` first")
    _prepare()
    _tune(newest.path)
    _show_losses()
    _show_replies()
    console.print(f"\n[green]Done in {time.monotonic() - started:.0f} s.[/]")


def _prepare() -> None:
    from nemo_cpt.conversations import prepare
    from nemo_cpt.corpus import split

    say("The conversations that ship with the package: 300 questions and answers; a tenth is held out")
    for language in ("ja", "en"):
        source = str(files("nemo_cpt.demo") / "conversations" / f"{language}.jsonl")
        # Held out by their questions: conversations have no field `text`.
        split(source, FOLDER / "chats" / language, validation=0.1, json_key="query", quiet=True)
        for part in ("train", "validation"):
            lines, output = FOLDER / "chats" / language / f"{part}.jsonl", FOLDER / "sft" / f"{language}_{part}"
            made = prepare(lines, output, FOLDER / "base_hf", template=TEMPLATE, quiet=True)
            console.print(
                f"  {language}_{part}: {made.conversations} conversations, {made.trained:,} tokens of answers"
            )


def _tune(base: Path) -> None:
    """Run one job through NeMo-Run's local executor and follow its metrics."""
    import nemo_run as run

    from nemo_cpt.demo.train import instruction_tune
    from nemo_cpt.executors import local

    say(f"Instruction tuning of the continually pretrained model, {EPOCHS} epochs")
    sets = {part: {language: str((FOLDER / "sft" / f"{language}_{part}").absolute()) for language in ("ja", "en")}
            for part in ("train", "validation")}  # fmt: skip
    task = run.Partial(
        instruction_tune,
        name=NAME,
        folder=str(FOLDER.absolute()),
        base=str(base.absolute()),
        train=dict.fromkeys(sets["train"].values(), 1.0),
        validation=sets["validation"],
        epochs=EPOCHS,
        seq_length=SEQ_LENGTH,
        global_batch_size=GLOBAL_BATCH_SIZE,
    )
    with followed(FOLDER / "runs" / NAME, _steps(sets["train"])), quietly():
        run.run(task, executor=local(), name=f"demo_{NAME}", tail_logs=False)


def _steps(train: dict[str, str]) -> int:
    from nemo_cpt.conversations import Conversations

    return Conversations(dict.fromkeys(train.values(), 1.0)).steps(EPOCHS, GLOBAL_BATCH_SIZE, SEQ_LENGTH)


def _show_losses() -> None:
    measured = [line for line in read_metrics(FOLDER / "runs" / NAME) if "val_loss_ja" in line]
    for language in ("ja", "en"):
        before, after = (measured[which][f"val_loss_{language}"] for which in (0, -1))
        console.print(f"  held-out answers, {language}: {before:.2f} nats a token before, {after:.2f} after")


def _show_replies() -> None:
    say("Replies before and after, the most probable token each time. A model this small learns answers by heart:")
    questions = [_first_question(language, part) for language, part in ASKED]
    replies = [_replies(FOLDER / f"{model}_hf", questions) for model in ("with_replay", NAME)]
    for (_, part), question, *answers in zip(ASKED, questions, *replies, strict=True):
        console.print(f"  [bold]{question}[/] ({'trained on' if part == 'train' else 'held out'})")
        for when, reply in zip(("before", "after "), answers, strict=True):
            end = "stopped by itself" if reply.finish_reason == "stop" else f"cut off at {MOST_TOKENS} tokens"
            console.print(f"    {when}: {reply.text.strip()!r} ({end})", markup=False)


def _first_question(language: str, part: str) -> str:
    with (FOLDER / "chats" / language / f"{part}.jsonl").open() as lines:
        return str(json.loads(next(lines))["query"])


def _replies(folder: Path, questions: list[str]) -> list[Any]:
    from nemo_cpt.conversations import load_template
    from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer
    from nemo_cpt.inference.engine import Prompt, Sampling
    from nemo_cpt.inference.transformers_engine import TransformersEngine

    template = load_template(TEMPLATE, load_tokenizer(folder)).text
    engine = TransformersEngine(folder, chat_template=template)  # the model before has none of its own
    prompts: list[Prompt] = [[{"role": "user", "content": question}] for question in questions]
    found = dict(engine.generate(prompts, Sampling(max_tokens=MOST_TOKENS)))
    return [found[number] for number in range(len(questions))]


if __name__ == "__main__":
    try:
        main()
    except CptError as error:
        console.print(f"[red]{error}[/]")
        sys.exit(error.exit_code)
