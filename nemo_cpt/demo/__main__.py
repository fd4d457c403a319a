"""`make demo`: the whole road of a continual pretraining on a CPU, through the public functions, in a few minutes."""

import json
import os
import shutil
import sys
import time
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemo_cpt.demo import report as reporting
from nemo_cpt.demo.console import bar, console, followed, quietly, say
from nemo_cpt.errors import CptError
from nemo_cpt.quiet import quiet_imports
from nemo_cpt.training.metrics import read_metrics

FOLDER, MARKER = Path("demo"), ".made_by_the_demo"
BASE_STEPS, STEPS, STOP_AT = 120, 60, 30
SEQ_LENGTH, VALIDATION_SAMPLES = 128, 16
REPLAY = 0.25


def main() -> None:
    """Run every step, narrated, and write `demo/report.json`."""
    started = time.monotonic()
    set_environment()
    # What they say besides on every machine without a GPU.
    for message in ("Transformer Engine and Apex", "Failed to create unified memory"):
        warnings.filterwarnings("ignore", message=message)
    _make_folder()
    corpus = _split_corpus()
    _pretrain_base(corpus)
    _prepare()
    _import_base()
    # The same run in two halves: what a stop at a time limit and the next job are.
    _train("with_replay", {"ja": 1 - REPLAY, "en": REPLAY}, stop_at=STOP_AT, title="stopped half way")
    resumed_from = _newest_step("with_replay")
    _train("with_replay", {"ja": 1 - REPLAY, "en": REPLAY}, title="resumed from its checkpoint")
    _train("without_replay", {"ja": 1.0}, title="the same without English")
    report = _evaluate(resumed_from)
    _show(report)
    console.print(
        f"\n[green]Done in {time.monotonic() - started:.0f} s.[/] See {FOLDER}/report.json, {FOLDER}/losses.png"
    )


def set_environment() -> None:
    """What the demos' imports and jobs go by: a home of NeMo-Run's here, no network, one thread, no chatter."""
    # Before NeMo-Run is imported, which reads it once.
    os.environ.setdefault("NEMORUN_HOME", str(FOLDER.absolute() / "nemo_run"))
    # Everything is made here: no look-up on the hub may wait for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a model this small gains nothing from more, and loses on a busy CPU
    quiet_imports()


def _make_folder() -> None:
    """Start afresh; only what an earlier demo left is removed."""
    # "demo" is a common name: whatever no demo made is not removed.
    if FOLDER.exists() and not (FOLDER / MARKER).is_file():
        raise CptError(f"the folder {FOLDER} is here and no demo made it: move it away, or start in another folder")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    (FOLDER / MARKER).touch()


def _split_corpus() -> dict[str, list[str]]:
    """Write each language's corpus as training and validation JSONL; return the training texts."""
    from nemo_cpt.corpus import split

    say("The corpus that ships with the package: Japanese and English prose; a tenth of the documents is held out")
    texts = {}
    for language in reporting.LANGUAGES:
        source = str(files("nemo_cpt.demo") / "corpus" / f"{language}.jsonl")
        split(source, FOLDER / "text" / language, validation=0.1, quiet=True)
        lines = (FOLDER / "text" / language / "train.jsonl").read_text().splitlines()
        texts[language] = [json.loads(line)["text"] for line in lines]
    return texts


def _pretrain_base(corpus: dict[str, list[str]]) -> None:
    from nemo_cpt.demo import base

    say("A base to continue from: a small Llama-3.1-shaped model, pretrained on English alone with plain PyTorch")
    # Of both languages: what the base lacks is Japanese, not the tokens to write it with.
    tokenizer = base.train_tokenizer(corpus["ja"] + corpus["en"])
    with bar("pretraining", BASE_STEPS) as progress:
        base.pretrain(corpus["en"], tokenizer, FOLDER / "base_hf", steps=BASE_STEPS, progress=progress)


def _prepare() -> None:
    from nemo_cpt.corpus import prepare

    say("Text to Megatron's .bin and .idx, with the base's tokenizer")
    for part in ("train", "validation"):
        for language in reporting.LANGUAGES:
            source = FOLDER / "text" / language / f"{part}.jsonl"
            made = prepare(source, FOLDER / "ds" / f"{language}_{part}", FOLDER / "base_hf", quiet=True)
            console.print(f"  {language}_{part}: {made.documents} documents, {made.tokens:,} tokens")


def _import_base() -> None:
    from nemo_cpt.checkpoint import import_hf

    say("Hugging Face to NeMo")
    import_hf(FOLDER / "base_hf", FOLDER / "base_nemo")
    console.print(f"  {FOLDER}/base_nemo")


def _train(name: str, weights: dict[str, float], title: str, stop_at: int | None = None) -> None:
    """Run one job through NeMo-Run's local executor and follow its metrics."""
    import nemo_run as run

    from nemo_cpt.demo.train import continually_pretrain
    from nemo_cpt.executors import local

    shares = ", ".join(f"{share:.0%} {reporting.LANGUAGES[language]}" for language, share in weights.items())
    say(f"Continual pretraining on {shares}: {title}")
    task = run.Partial(
        continually_pretrain,
        name=name,
        folder=str(FOLDER.absolute()),
        train={str(FOLDER.absolute() / "ds" / f"{language}_train"): share for language, share in weights.items()},
        validation={
            language: str(FOLDER.absolute() / "ds" / f"{language}_validation") for language in reporting.LANGUAGES
        },
        max_steps=STEPS,
        stop_at=stop_at,
        export=stop_at is None,
    )
    with followed(FOLDER / "runs" / name, stop_at or STEPS), quietly():  # the job's log is under NEMORUN_HOME
        run.run(task, executor=local(), name=f"demo_{name}", tail_logs=False)


def _newest_step(name: str) -> int:
    """The step of the newest checkpoint, from its name."""
    names = [path.name for path in (FOLDER / "runs" / name / "checkpoints").glob("steps=*")]
    return max(int(name.split("=")[1].split("-")[0]) for name in names)


def _evaluate(resumed_from: int) -> dict[str, Any]:
    from nemo_cpt.evaluation.bits_per_byte import sequences_loss
    from nemo_cpt.inference.transformers_engine import TransformersEngine

    say("The exported models, loaded by plain transformers, on the held-out text")

    def losses(model: str) -> dict[str, float]:
        engine = TransformersEngine(FOLDER / model, device="cpu")
        return {
            language: sequences_loss(
                engine,
                FOLDER / "ds" / f"{language}_validation",
                seq_length=SEQ_LENGTH,
                samples=VALIDATION_SAMPLES,
            ).loss
            for language in reporting.LANGUAGES
        }

    before, after, without = losses("base_hf"), losses("with_replay_hf"), losses("without_replay_hf")
    # The validation ahead of the first step: the base's own loss.
    at_step0 = read_metrics(FOLDER / "runs" / "with_replay")[0]
    verified = json.loads((FOLDER / "with_replay_verified.json").read_text())
    return {
        "steps": STEPS,
        "loss": {language: {"before": before[language], "after": after[language]} for language in before},
        "base_step0_matches_hf": max(abs(at_step0[f"val_loss_{language}"] - before[language]) for language in before),
        "export_max_logit_difference": verified["max_logit_difference"],
        "resumed_from_step": resumed_from,
        "replay_share": REPLAY,
        "without_replay": {
            "loss": {language: {"before": before[language], "after": without[language]} for language in before}
        },
    }


def _show(report: dict[str, Any]) -> None:
    runs = {"25 % English replay": "with_replay", "no replay": "without_replay"}
    reporting.plot({label: read_metrics(FOLDER / "runs" / name) for label, name in runs.items()}, FOLDER / "losses.png")
    reporting.write(report, FOLDER / "report.json")
    reporting.table(report, console)
    console.print(
        f"NeMo's loss before the first step differs from transformers' by {report['base_step0_matches_hf']:.1e}; "
        f"the export's logits from NeMo's by {report['export_max_logit_difference']:.1e}; "
        f"resumed from step {report['resumed_from_step']} of {report['steps']}."
    )


if __name__ == "__main__":
    try:
        main()
    except CptError as error:
        console.print(f"[red]{error}[/]")
        sys.exit(error.exit_code)
