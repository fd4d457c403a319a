"""Does fp8 train as bf16 does? Loss curves of the SmolLM2-135M recipe in both, on a GPU with fp8.

usage: python benchmarks/fp8_curves.py FOLDER [--steps 300] [--out fp8-curves]

FOLDER: what examples/smollm2_japanese.py made: `hf` and `nemo` (SmolLM2-135M), `ds/{ja,en}_{train,validation}`.

Two measures of noise, both in bf16: "smaller micro batches" adds up each step's gradients in other parts, which is what
rounding alone does to the curve; "shuffled" sees the same text in another order, which is what chance does to the model
that comes out. A variant is judged by its smoothed curve against twice the first, and by its loss on held-out text
against the second. Each variant has a process of its own, one after the other.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nemo_run as run
from curves_apart import table
from loss_curves import make_recipe, series, train_by_recipe

from nemo_cpt.recipes import parts

SETTINGS = {
    "seq_length": 1024, "global_batch_size": 16, "micro_batch_size": 8, "validate_every": 50, "validation_batches": 4,
    "lr": 3e-4, "from_scratch": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    precision: str = "bf16"
    bf16_layers: int = 0
    micro_batch_size: int = 8
    seed: int = 1234


VARIANTS = {
    "bf16": Variant(),
    "smaller micro batches": Variant(micro_batch_size=4),
    "shuffled": Variant(seed=1),
    "shuffled otherwise": Variant(seed=2),
    "fp8": Variant("fp8"),
    "fp8, first and last layer in bf16": Variant("fp8", bf16_layers=1),
    "fp8_blockwise": Variant("fp8_blockwise"),
}


def recipe_of(variant: Variant, folder: Path, out: Path, steps: int) -> run.Partial:
    changed = {"steps": steps, "micro_batch_size": variant.micro_batch_size}
    recipe = make_recipe(folder, out, argparse.Namespace(**SETTINGS | changed))
    recipe.trainer.plugins = parts.mixed_precision(variant.precision, variant.bf16_layers)
    recipe.data.seed = variant.seed
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("fp8-curves"))
    parser.add_argument("--at-once", type=int, default=1, help="variants that train at a time")
    parser.add_argument("--variant", choices=VARIANTS, help="train this one alone, and write its curve")
    options = parser.parse_args()
    if options.variant:
        out = options.out / options.variant
        metrics = train_by_recipe(recipe_of(VARIANTS[options.variant], options.folder, out, options.steps))
        (out / "metrics.json").write_text(json.dumps(metrics))
        return
    curves, held_out = {}, {}

    def train(name: str) -> None:
        again = [str(options.folder), "--steps", str(options.steps), "--out", str(options.out), "--variant", name]
        subprocess.run([sys.executable, __file__, *again], check=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(train, VARIANTS))
    for name in VARIANTS:
        metrics = json.loads((options.out / name / "metrics.json").read_text())
        curves[name] = list(series(metrics, "reduced_train_loss").values())
        held_out[name] = sum(list(series(metrics, f"val_loss_{each}").values())[-1] for each in ("ja", "en")) / 2
    options.out.joinpath("fp8_curves.json").write_text(json.dumps({"curves": curves, "held_out": held_out}))
    print(table("precision", curves, held_out, "smaller micro batches", lambda name: name.startswith("fp8")))


if __name__ == "__main__":
    main()
