"""The recipe's training beside a plain PyTorch + transformers loop: same weights, batches, order and schedule.

usage: python benchmarks/loss_curves.py FOLDER [--steps 300] [--check 0.02] [--out loss-curves] [--plain-on GPU]
       python benchmarks/loss_curves.py FOLDER --from-scratch PARAMS [--plain-steps N] ...

FOLDER: what examples/smollm2_japanese.py made: `hf` and `nemo` (SmolLM2-135M), `ds/{ja,en}_{train,validation}`. With
`--from-scratch PARAMS`, what examples/from_scratch.py --no-training made: `base`, the random weights, and
`ds/{train,validation}`.

Both compute in bf16 with fp32 master weights on a GPU, in fp32 on a CPU. Of the recipe's side the plain loop uses the
batches alone, from the recipe's data module; model, loss, optimizer and schedule are transformers', PyTorch's and those
written out below. Prints the largest distance of the two curves over all steps and all validations, writes both as JSON
and PNG; with --check, exits with 1 when the distance is larger. With --plain-steps the slower loop stops early in the
same schedule, for runs of the same length of time, and the two are compared as far as it came.
"""

import argparse
import copy
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fiddle
import nemo_run as run
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_cpt.checkpoint import export_hf
from nemo_cpt.corpus import Blend
from nemo_cpt.recipes import gpt, smollm2
from nemo_cpt.training.cpu import on_cpu
from nemo_cpt.training.metrics import read_metrics

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
BETAS, EPSILON, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-5, 0.1, 1.0
TITLES = {"ja": "Japanese", "en": "English", "validation": "text"}

Metrics = list[dict[str, float]]


def make_recipe(
    folder: Path, out: Path, options: argparse.Namespace, base: str | None = None, **more: Any
) -> run.Partial:
    settings = {
        "name": "recipe", "directory": str(out), "seq_length": options.seq_length, "lr": options.lr,
        "global_batch_size": options.global_batch_size, "micro_batch_size": options.micro_batch_size,
        "max_steps": options.steps, "val_check_interval": min(options.validate_every, options.steps),
    }  # fmt: skip
    if options.from_scratch:
        text = Blend(train={f"{folder}/ds/train": 1.0}, validation={"validation": f"{folder}/ds/validation"})
        recipe = gpt.pretrain(base or f"{folder}/base", text, params=options.from_scratch, **settings | more)
    else:
        blend = Blend.replay(
            f"{folder}/ds/ja_train",
            f"{folder}/ds/en_train",
            share=0.25,
            validation={language: f"{folder}/ds/{language}_validation" for language in ("ja", "en")},
        )
        recipe = smollm2.continual_pretrain(f"{folder}/nemo", blend, **settings)
    recipe.trainer.limit_val_batches = options.validation_batches
    recipe.log.ckpt, recipe.trainer.enable_checkpointing = None, False
    return recipe if GPU else on_cpu(recipe)


def train_by_recipe(recipe: run.Partial) -> Metrics:
    folder = Path(recipe.log.log_dir, recipe.log.name)
    shutil.rmtree(folder, ignore_errors=True)  # its metrics file is append-only
    run.run(recipe, direct=True)
    return read_metrics(folder)


def learning_rate(step: int, peak: float, end: float, warmup_steps: int, max_steps: int) -> float:
    """The learning rate of a step, counted from 0: linear to the peak at `warmup_steps`, a cosine from there."""
    if warmup_steps and step <= warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / (max_steps - warmup_steps)
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


def loss_of(network: PreTrainedModel, samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean cross-entropy over the tokens that the loss mask lets count."""
    tokens, labels, mask = (
        torch.stack([sample[name] for sample in samples]).to(DEVICE) for name in ("tokens", "labels", "loss_mask")
    )
    logits = network(input_ids=tokens, use_cache=False).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()


def adamw(masters: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW that decays matrices, not vectors."""
    groups = [
        {"params": [weight for weight in masters if weight.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [weight for weight in masters if weight.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)


class PlainLoop:
    """A model with fp32 master weights, trained on a dataset's samples in their order."""

    def __init__(self, hf: Path, micro_batch_size: int):
        self.network = AutoModelForCausalLM.from_pretrained(hf, dtype=DTYPE).to(DEVICE).train()
        self.weights = list(self.network.parameters())
        self.masters = list(copy.deepcopy(self.network).float().parameters())
        self.optimizer = adamw(self.masters)
        self.micro_batch_size = micro_batch_size

    def step(self, samples: list[dict[str, torch.Tensor]], lr: float) -> dict[str, float]:
        """One optimizer step over a global batch, a micro batch at a time; its loss and the gradient's norm."""
        starts = range(0, len(samples), self.micro_batch_size)
        total = torch.zeros((), device=DEVICE)
        for start in starts:
            loss = loss_of(self.network, samples[start : start + self.micro_batch_size]) / len(starts)
            loss.backward()
            self._take_gradients()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
        return {"reduced_train_loss": float(total), "grad_norm": float(norm), "lr": lr}

    def _take_gradients(self) -> None:
        """Add the weights' gradients to the masters', in fp32."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    @torch.no_grad()
    def validate(self, datasets: dict[str, list[dict[str, torch.Tensor]]]) -> dict[str, float]:
        size = self.micro_batch_size
        return {
            f"val_loss_{name}": statistics.fmean(
                float(loss_of(self.network, samples[start : start + size])) for start in range(0, len(samples), size)
            )
            for name, samples in datasets.items()
        }


def built_data(recipe: run.Partial) -> Any:
    """The recipe's data module with its datasets; their indices are in the cache from then on."""
    data, trainer = fiddle.build(recipe.data), recipe.trainer
    data.build(trainer.max_steps, trainer.val_check_interval, trainer.limit_val_batches, 0)
    return data


def train_by_plain_loop(recipe: run.Partial, hf: Path, steps: int | None = None) -> Metrics:
    """The recipe's run again, or its first steps: its batches, in the order of its sampler."""
    data, trainer, schedule = built_data(recipe), recipe.trainer, recipe.optim.lr_scheduler
    samples, size = data._train_ds, data.global_batch_size
    held_out = [data._validation_ds[index] for index in range(len(data._validation_ds))]
    cuts = range(0, len(held_out), len(held_out) // len(data.validation_names))
    sets = {name: held_out[cut : cut + cuts.step] for name, cut in zip(data.validation_names, cuts, strict=True)}

    loop = PlainLoop(hf, data.micro_batch_size)
    metrics: Metrics = [{"step": 0, **loop.validate(sets)}]
    for step in range(steps or trainer.max_steps):
        lr = learning_rate(step, recipe.optim.config.lr, schedule.min_lr, schedule.warmup_steps, trainer.max_steps)
        started = time.perf_counter()
        batch = [samples[index] for index in range(step * size, (step + 1) * size)]
        line = {"step": step + 1, **loop.step(batch, lr)}
        metrics.append(line | {"train_step_timing in s": time.perf_counter() - started})
        if (step + 1) % trainer.val_check_interval == 0:
            metrics.append({"step": step + 1, **loop.validate(sets)})
            print(f"plain loop: step {step + 1}, {metrics[-1]}", flush=True)
    return metrics


def series(metrics: Metrics, name: str) -> dict[int, float]:
    return {int(line["step"]): line[name] for line in metrics if name in line}


def sets_of(metrics: Metrics) -> list[str]:
    """Names of the validation sets."""
    names = dict.fromkeys(name for line in metrics for name in line)
    return [name.removeprefix("val_loss_") for name in names if name.startswith("val_loss_")]


def until(step: int, metrics: Metrics) -> Metrics:
    return [line for line in metrics if line["step"] <= step]


def compare(recipe: Metrics, plain: Metrics) -> dict[str, Any]:
    """How far the two runs are apart, by what was logged; losses in nats per token."""
    figures: dict[str, Any] = {}
    recipe = until(int(plain[-1]["step"]), recipe)
    for name in ("reduced_train_loss", "lr", "grad_norm", *(f"val_loss_{name}" for name in sets_of(plain))):
        ours, theirs = series(recipe, name), series(plain, name)
        if list(ours) != list(theirs):
            raise SystemExit(f"{name} was logged at other steps: recipe {list(ours)}, plain loop {list(theirs)}")
        apart = [abs(ours[step] - theirs[step]) for step in ours]
        figures[name] = {"largest": max(apart), "mean": statistics.fmean(apart)}
    figures["largest_loss_difference"] = max(figures[name]["largest"] for name in figures if "loss" in name)
    return figures


def report(recipe: Metrics, plain: Metrics, figures: dict[str, Any]) -> str:
    last, end = int(plain[-1]["step"]), int(recipe[-1]["step"])
    lines = [f"| held-out loss | recipe before | plain before | recipe, step {last} | plain, step {last} |"]
    lines.append("|---|---|---|---|---|")
    for name in sets_of(plain):
        ours, theirs = (list(series(each, f"val_loss_{name}").values()) for each in (until(last, recipe), plain))
        lines.append(f"| {TITLES[name]} | {ours[0]:.4f} | {theirs[0]:.4f} | {ours[-1]:.4f} | {theirs[-1]:.4f} |")
        if end > last:
            further = series(recipe, f"val_loss_{name}")[end]
            lines.append(f"| {TITLES[name]}, recipe's step {end} | | | {further:.4f} | |")
    seconds = [list(series(metrics, "train_step_timing in s").values()) for metrics in (recipe, plain)]
    medians = [statistics.median(each[len(each) // 4 :]) for each in seconds]
    training = figures["reduced_train_loss"]
    lines += [
        "",
        f"training loss: mean difference {training['mean']:.2e}, largest {training['largest']:.2e}; "
        f"with the validations the largest is {figures['largest_loss_difference']:.2e}",
        f"learning rate: largest difference {figures['lr']['largest']:.1e}; "
        f"gradient norm: mean difference {figures['grad_norm']['mean']:.1e}",
        f"median seconds a step: recipe {medians[0]:.3f}, plain loop {medians[1]:.3f}",
    ]
    return "\n".join(lines)


def draw(recipe: Metrics, plain: Metrics, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for label, metrics, style in (("recipe (NeMo, Megatron)", recipe, "-"), ("plain transformers loop", plain, "--")):
        curve = series(metrics, "reduced_train_loss")
        axes[0].plot(list(curve), list(curve.values()), style, linewidth=1, label=label)
        for name in sets_of(plain):
            points = series(metrics, f"val_loss_{name}")
            title = f"{TITLES[name]}, {label}"
            axes[2].plot(list(points), list(points.values()), f"o{style}", markersize=3, label=title)
    ours, theirs = (series(metrics, "reduced_train_loss") for metrics in (recipe, plain))
    axes[1].plot(list(theirs), [ours[step] - theirs[step] for step in theirs], linewidth=1)
    titles = ("training loss", "training loss: recipe less plain loop", "held-out loss")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step", ylabel="nats per token")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from-scratch", metavar="PARAMS", help="124M: the recipe gpt.pretrain of that size")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--validate-every", type=int, default=50)
    parser.add_argument("--validation-batches", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("loss-curves"))
    parser.add_argument("--check", type=float, help="largest loss difference allowed")
    parser.add_argument("--plain-steps", type=int, metavar="N", help="stop the plain loop after N of the steps")
    parser.add_argument("--plain-on", metavar="GPU", help="train the plain loop at the same time, on this other GPU")
    parser.add_argument("--plain-to", type=Path, help="train the plain loop alone, and write its metrics to this file")
    options = parser.parse_args()
    if options.plain_steps and options.plain_steps % options.validate_every:
        parser.error("--plain-steps is no multiple of --validate-every: the loop would end without a held-out loss")
    return options


def main() -> None:
    options = parse()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    recipe = make_recipe(options.folder.absolute(), out, options)
    hf = options.folder / "hf"
    if options.from_scratch:
        hf = out / "base_hf"  # the random weights, for transformers
        if not hf.exists():
            export_hf(options.folder / "base", hf)
    if options.plain_to:
        options.plain_to.write_text(json.dumps(train_by_plain_loop(recipe, hf, options.plain_steps)))
        return
    if options.plain_on:
        built_data(recipe)  # two processes must not write the same index at once
        again = [sys.executable, *sys.argv, "--plain-to", str(out / "plain.json")]
        other = subprocess.Popen(again, env=os.environ | {"CUDA_VISIBLE_DEVICES": options.plain_on})
        ours = train_by_recipe(recipe)
        if other.wait():
            sys.exit(f"the plain loop ended with exit code {other.returncode}")
        plain = json.loads((out / "plain.json").read_text())
    else:
        plain = train_by_plain_loop(recipe, hf, options.plain_steps)
        torch.cuda.empty_cache()
        ours = train_by_recipe(recipe)
    figures = compare(ours, plain)
    (out / "loss_curves.json").write_text(json.dumps({"figures": figures, "recipe": ours, "plain": plain}))
    draw(ours, plain, out / "loss_curves.png")
    print(report(ours, plain, figures))
    if options.check is not None and figures["largest_loss_difference"] > options.check:
        sys.exit(f"the curves are {figures['largest_loss_difference']:.4f} apart, more than {options.check}")


if __name__ == "__main__":
    main()
