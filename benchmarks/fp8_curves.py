"""Does fp8 train as bf16 does? Loss curves in both, on a GPU with fp8.

usage: python benchmarks/fp8_curves.py FOLDER [--steps 300] [--out fp8-curves] [--gpus 0,1]
       python benchmarks/fp8_curves.py FOLDER --layers 8 ...

FOLDER: what examples/smollm2_japanese.py made: `hf` and `nemo` (SmolLM2-135M), `ds/{ja,en}_{train,validation}`, which
that model is trained on. With --layers: what examples/from_scratch.py --no-training made, `tokenizer` and
`ds/{train,validation}`; the model, so many layers of Llama-3.1-8B's widths with random weights, is written to OUT.

Two measures of noise, both in bf16: "smaller micro batches" adds up each step's gradients in other parts, which is what
rounding alone does to the curve; "shuffled" sees the same text in another order, which is what chance does to the model
that comes out. A variant is judged by its smoothed curve against twice the first, and by its loss on held-out text
against the second. Each variant has a process of its own; one whose curve is in OUT already is not trained again.
"""

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nemo_run as run
from curves_apart import table
from llama31_8b import CONFIG
from loss_curves import built_data, make_recipe, series, sets_of, train_by_recipe

from nemo_cpt.checkpoint import import_hf
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


WIDE = {"from_scratch": "1.3B", "global_batch_size": 32}  # and twice the micro batch


def make_wide(folder: Path, tokenizer: Path, layers: int) -> None:
    """A base of random weights: Llama-3.1-8B's layers, fewer of them, with the tokenizer's rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    known = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        **CONFIG | {"vocab_size": len(known), "num_hidden_layers": layers, "max_position_embeddings": 8192},
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "hf")
    known.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "base")


def recipe_of(variant: Variant, options: argparse.Namespace, out: Path) -> run.Partial:
    """The variant's training: of SmolLM2, or of the wide model."""
    folder, size = options.folder.absolute(), variant.micro_batch_size
    changed: dict[str, Any] = {"steps": options.steps, "micro_batch_size": size}
    more: dict[str, Any] = {}
    if options.layers:
        changed |= WIDE | {"micro_batch_size": 2 * size}
        more = {"base": f"{options.out.absolute()}/wide/base", "warmup_steps": 30}
    recipe = make_recipe(folder, out, argparse.Namespace(**SETTINGS | changed), **more)
    recipe.trainer.plugins = parts.mixed_precision(variant.precision, variant.bf16_layers)
    recipe.data.seed = variant.seed
    return recipe


def train_all(options: argparse.Namespace) -> None:
    """Train every variant, some at a time, each on one of the GPUs."""
    gpus: queue.Queue[str] = queue.Queue()
    for number in range(options.at_once):
        gpus.put(options.gpus[number % len(options.gpus)])

    def train(name: str) -> None:
        gpu = gpus.get()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        subprocess.run([sys.executable, *sys.argv, "--variant", name], check=True, env=environment)
        gpus.put(gpu)

    missing = [name for name in VARIANTS if not (options.out / name / "metrics.json").exists()]
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(train, missing))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="of a wide model, instead of SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("fp8-curves"))
    parser.add_argument("--at-once", type=int, default=1, help="variants that train at a time")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=visible, help="to train on: 0,1")
    parser.add_argument("--variant", choices=VARIANTS, help="train this one alone, and write its curve")
    options = parser.parse_args()
    if options.variant:
        out = options.out / options.variant
        metrics = train_by_recipe(recipe_of(VARIANTS[options.variant], options, out))
        (out / "metrics.json").write_text(json.dumps(metrics))
        return
    if options.layers and not (options.out / "wide/base").exists():
        make_wide(options.out / "wide", options.folder / "tokenizer", options.layers)
    for variant in VARIANTS.values():
        built_data(recipe_of(variant, options, options.out))  # no two processes write the same index at once
    train_all(options)
    curves, held_out = {}, {}
    for name in VARIANTS:
        metrics = json.loads((options.out / name / "metrics.json").read_text())
        curves[name] = list(series(metrics, "reduced_train_loss").values())
        last = [list(series(metrics, f"val_loss_{each}").values())[-1] for each in sets_of(metrics)]
        held_out[name] = sum(last) / len(last)
    options.out.joinpath("fp8_curves.json").write_text(json.dumps({"curves": curves, "held_out": held_out}))
    print(table("precision", curves, held_out, "smaller micro batches", lambda name: name.startswith("fp8")))


if __name__ == "__main__":
    main()
