"""What asking a model costs: the engine beside transformers' `generate`, the server beside the engine, chat's start.

    python benchmarks/serving.py MODEL        # a Hugging Face folder; SmolLM2-135M for the figures of docs/serving.md

Greedy replies of a fixed length; medians of several rounds, the contestants of a round one after the other.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import torch
import uvicorn

from nemo_cpt.inference import Sampling
from nemo_cpt.inference.server import make_app
from nemo_cpt.inference.transformers_engine import TransformersEngine

TOKENS = 32
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    engine = TransformersEngine(folder)
    engine.end_ids = []  # every reply has its full length
    engine.network.generation_config.eos_token_id = None
    prompts = ["The capital of France is" + " and so on" * (number * 7 % 24) for number in range(16)]
    sampling = Sampling(max_tokens=TOKENS)
    print(f"{torch.get_num_threads()} threads, 16 prompts of 5 to 74 tokens, {TOKENS} tokens each; tokens/s")
    times = compare(
        {
            "transformers generate, one batch": lambda: generate(engine, prompts),
            "engine": lambda: list(engine.generate(prompts, sampling)),
            "engine, one prompt at a time": lambda: [list(engine.generate([each], sampling)) for each in prompts],
        }
    )
    show(times, 16 * TOKENS)
    with_server(engine, sampling)
    print(f"chat: first reply of one token {first_reply(folder):.1f} s after the command")


def compare(contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each, over ROUNDS rounds behind one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(ROUNDS + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def show(times: dict[str, list[float]], tokens: int) -> None:
    first = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {name:34} {tokens / median:8.1f}   {first / median:5.2f} x", flush=True)


def generate(engine: TransformersEngine, prompts: list[str]) -> None:
    tokenizer = engine.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        engine.network.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=TOKENS,
            min_new_tokens=TOKENS, do_sample=False,
        )  # fmt: skip


def with_server(engine: TransformersEngine, sampling: Sampling) -> None:
    """One and eight clients over HTTP, beside the engine alone."""
    server = uvicorn.Server(uvicorn.Config(make_app(engine, served_as="model"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    prompts = [f"{number}. The capital of France is" for number in range(8)]

    def ask(prompt: str) -> None:
        client.completions.create(model="model", prompt=prompt, max_tokens=TOKENS, temperature=0)

    print("the server; tokens/s")
    with ThreadPoolExecutor(8) as pool:
        times = compare(
            {
                "engine, one prompt at a time": lambda: [list(engine.generate([each], sampling)) for each in prompts],
                "server, one client": lambda: [ask(each) for each in prompts],
                "server, eight clients": lambda: list(pool.map(ask, prompts)),
            }
        )
    show(times, 8 * TOKENS)
    server.should_exit = True
    thread.join()


def first_reply(folder: Path) -> float:
    command = [sys.executable, "-m", "nemo_cpt.cli", "chat", str(folder), "--max-tokens", "1"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, input="Hello\n/quit\n", text=True, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
