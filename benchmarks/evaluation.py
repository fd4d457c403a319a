"""What an evaluation costs: replies beside transformers' `generate`, bits per byte beside the forward passes alone.

    python benchmarks/evaluation.py MODEL        # a Hugging Face folder; SmolLM2-135M for the figures of the docs

Medians of several rounds, the contestants of a round one after the other. On a CPU in seconds of CPU time, to which
other work on the machine adds little; on one thread that is the time of an idle machine.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from contestants import Times, compare, show

from nemo_cpt.evaluation.bits_per_byte import documents_loss, rolling_windows
from nemo_cpt.inference import Sampling
from nemo_cpt.inference.transformers_engine import TransformersEngine

TOKENS, ROUNDS, WINDOW = 16, 3, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--documents", type=int, default=8, help="of the packaged English corpus")
    options = parser.parse_args()
    engine = TransformersEngine(options.model)
    lines = (files("nemo_cpt.demo") / "corpus" / "en.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: options.documents]]
    size = sum(len(text.encode()) for text in texts)
    torch.set_num_threads(1)
    print(f"bits per byte of {size / 1e3:.0f} kB, windows of {WINDOW}; kB/s")
    passes = forward_passes(engine, texts)
    show(
        seconds_of(
            {
                "forward passes alone": passes,
                "documents_loss": lambda: documents_loss(engine, texts, window=WINDOW),
            }
        ),
        size / 1e3,
    )
    engine.end_ids = []  # every reply has its full length
    engine.network.generation_config.eos_token_id = None
    prompts = [" ".join(text.split()[: 3 + number * 7 % 40]) for number, text in enumerate(texts * 2)]
    sampling = Sampling(max_tokens=TOKENS)
    print(f"{len(prompts)} prompts of 3 to 43 words, replies of {TOKENS} tokens; tokens/s")
    show(
        seconds_of(
            {
                "transformers generate, one batch": lambda: generate(engine, prompts),
                "evaluation's replies": lambda: list(engine.generate(prompts, sampling)),
                "one prompt at a time": lambda: [list(engine.generate([each], sampling)) for each in prompts],
            }
        ),
        len(prompts) * TOKENS,
    )


def seconds_of(contestants: dict[str, Callable[[], object]]) -> Times:
    return compare(contestants, ROUNDS, time.perf_counter if torch.cuda.is_available() else time.process_time)


def forward_passes(engine: TransformersEngine, texts: list[str]) -> Callable[[], None]:
    """The model's logits of the same windows in batches of like length, computed and dropped."""
    first = engine.tokenizer.bos_token_id
    windows = [
        given
        for text in texts
        for given, _ in rolling_windows(engine.tokenizer(text, add_special_tokens=False).input_ids, first, WINDOW)
    ]
    windows.sort(key=len)
    batches = [windows[at : at + 8] for at in range(0, len(windows), 8)]

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                width = max(map(len, batch))
                tokens = torch.tensor([row + [0] * (width - len(row)) for row in batch])
                engine.network(input_ids=tokens.to(engine.network.device), use_cache=False)

    return run


def generate(engine: TransformersEngine, prompts: list[str]) -> None:
    tokenizer = engine.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(engine.network.device)
    with torch.inference_mode():
        engine.network.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=TOKENS,
            min_new_tokens=TOKENS, do_sample=False,
        )  # fmt: skip


if __name__ == "__main__":
    main()
