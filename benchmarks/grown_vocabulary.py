"""Continual pretraining with a grown vocabulary beside the same without, at equal bytes of text.

usage: python benchmarks/grown_vocabulary.py FOLDER [--tokens 8000] [--steps 300] [--rows-first 30] [--out grown]

FOLDER: what examples/smollm2_japanese.py made: `hf` (SmolLM2-135M) and `text/{ja,en}/{train,validation}.jsonl`. The
ungrown run takes `--steps`; the grown one so many as read the same number of bytes. Prints bits per byte of both
languages at each validation with the training's seconds until then, and draws them.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nemo_run as run
import torch

from nemo_cpt.checkpoint import grow_model, import_hf
from nemo_cpt.corpus import Blend, prepare
from nemo_cpt.recipes import smollm2
from nemo_cpt.training.cpu import on_cpu
from nemo_cpt.training.metrics import read_metrics
from nemo_cpt.vocabulary import grow
from nemo_cpt.vocabulary.samples import documents

LANGUAGES = {"ja": "Japanese", "en": "English"}
KINDS = ("as it is", "grown")
SHARE = {"ja": 0.75, "en": 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--min-count", type=int, default=5)
    parser.add_argument("--initialisation", default="mean", help="of the new rows: mean, noise, zero or focus")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows-first", type=int, default=30)
    parser.add_argument("--validations", type=int, default=10)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("grown"))
    parser.add_argument("--train", nargs=2, metavar=("KIND", "STEPS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = given.out.absolute()
    if given.train:  # a process of its own: NeMo trains once in each
        return _train(given, out, given.train[0], int(given.train[1]))
    models = _models(given, out)
    tokens = {kind: _prepare(given.folder, out, kind, model) for kind, model in models.items()}
    nbytes = {each: _bytes(given.folder, each, "validation") for each in LANGUAGES}
    curves = {}
    for kind in KINDS:
        # Equal bytes: a step holds a number of tokens, of which the grown tokenizer makes fewer for the same text.
        density = {name: sum(SHARE[each] * tokens[name][each, "train"] for each in LANGUAGES) for name in KINDS}
        steps = round(given.steps * density[kind] / density[KINDS[0]])
        subprocess.run([sys.executable, *sys.argv, "--train", kind, str(steps)], check=True)
        curves[kind] = _curve(out / "runs" / kind.replace(" ", "_"), tokens[kind], nbytes)
    (out / "curves.json").write_text(json.dumps(curves, indent=1))
    _draw(curves, out / "curves.png")
    print(f"{out}/curves.json, {out}/curves.png")


def _models(given: argparse.Namespace, out: Path) -> dict[str, Path]:
    """The imported bases, made where they are not there yet."""
    japanese = str(given.folder / "text/ja/train.jsonl")
    if not (out / "tokenizer").exists():
        print(
            grow(str(given.folder / "hf"), japanese, out / "tokenizer", tokens=given.tokens, min_count=given.min_count)
        )
    if not (out / "hf").exists():
        corpus = japanese if given.initialisation == "focus" else None
        rows = {"initialisation": given.initialisation, "corpus": corpus}
        print(grow_model(given.folder / "hf", out / "hf", out / "tokenizer", **rows))
    for kind, hf in zip(KINDS, (given.folder / "hf", out / "hf"), strict=True):
        if not (out / "nemo" / kind).exists():
            import_hf(hf, out / "nemo" / kind)
    return {kind: out / "nemo" / kind / "hf" for kind in KINDS}


def _prepare(folder: Path, out: Path, kind: str, tokenizer: Path) -> dict[tuple[str, str], int]:
    """Tokens of each set."""
    return {
        (language, part): prepare(
            folder / "text" / language / f"{part}.jsonl", _prefix(out, kind, language, part), tokenizer, quiet=True
        ).tokens
        for language in LANGUAGES
        for part in ("train", "validation")
    }


def _prefix(out: Path, kind: str, language: str, part: str) -> str:
    return str(out / "ds" / kind.replace(" ", "_") / f"{language}_{part}")


def _bytes(folder: Path, language: str, part: str) -> int:
    return sum(len(text.encode()) for text in documents(str(folder / "text" / language / f"{part}.jsonl")))


def _train(given: argparse.Namespace, out: Path, kind: str, steps: int) -> None:
    name = kind.replace(" ", "_")
    shutil.rmtree(out / "runs" / name, ignore_errors=True)
    recipe = smollm2.continual_pretrain(
        str(out / "nemo" / kind),
        Blend(
            train={_prefix(out, kind, each, "train"): SHARE[each] for each in LANGUAGES},
            validation={each: _prefix(out, kind, each, "validation") for each in LANGUAGES},
        ),
        name=name,
        directory=str(out / "runs"),
        max_steps=steps,
        val_check_interval=max(steps // given.validations, 1),
        seq_length=given.seq_length,
        global_batch_size=given.global_batch_size,
        micro_batch_size=given.micro_batch_size,
        grown_rows_first=given.rows_first if kind == "grown" and given.rows_first else None,
    )
    run.run(recipe if torch.cuda.is_available() else on_cpu(recipe), direct=True)


def _curve(folder: Path, tokens: dict[tuple[str, str], int], nbytes: dict[str, int]) -> list[dict[str, float]]:
    """Seconds of training and bits per byte of each language, at each validation."""
    seconds, found = 0.0, list[dict[str, float]]()
    for line in read_metrics(folder):
        seconds += line.get("train_step_timing in s", 0.0)
        losses = {each: line[f"val_loss_{each}"] for each in LANGUAGES if f"val_loss_{each}" in line}
        if losses:
            bits = {
                each: loss * tokens[each, "validation"] / nbytes[each] / math.log(2) for each, loss in losses.items()
            }
            found.append({"step": line["step"], "seconds": round(seconds, 1)} | bits)
            print(folder.name, found[-1], flush=True)
    return found


def _draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    for axes, (language, name) in zip(figure.subplots(1, 2), LANGUAGES.items(), strict=True):
        for kind, curve in curves.items():
            points = [(each["seconds"], each[language]) for each in curve if language in each]
            axes.plot(*zip(*points, strict=True), marker=".", label=f"vocabulary {kind}")
        axes.set(title=name, xlabel="seconds of training", ylabel="bits per byte")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
