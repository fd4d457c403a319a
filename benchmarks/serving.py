"""What asking a model costs: the engine beside transformers' `generate`, the server beside the engine, chat's start.

    python benchmarks/serving.py MODEL        # a Hugging Face folder; SmolLM2-135M for the figures of docs/serving.md

Greedy replies of a fixed length; medians of several rounds, the contestants of a round one after the other. Ends with
the four figures that are to be reached, each beside its limit.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import torch
import uvicorn
from contestants import compare, show

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
        },
        ROUNDS,
    )
    show(times, 16 * TOKENS)
    loaded = first_token(engine)
    overhead, gain = with_server(engine, sampling)
    engine.close()
    print("to reach")
    print(f"  chat's first token after the command    {first_token_of_chat(folder):8.2f} s    at most 8")
    print(f"  a first token of a loaded model         {loaded:8.3f} s    at most 0.3")
    print(f"  the server's time beside the engine's   {overhead:+8.1%}      at most +5 %")
    print(f"  tokens/s of eight clients beside one's  {gain:8.2f} x    at least 3")


def generate(engine: TransformersEngine, prompts: list[str]) -> None:
    tokenizer = engine.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        engine.network.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=TOKENS,
            min_new_tokens=TOKENS, do_sample=False,
        )  # fmt: skip


def first_token(engine: TransformersEngine) -> float:
    """Seconds from a question of a dozen tokens to the first piece of its reply."""
    question = "What is the capital of France, and how many people live in it?"
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        next(engine.stream(question, Sampling(max_tokens=TOKENS)))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def with_server(engine: TransformersEngine, sampling: Sampling) -> tuple[float, float]:
    """One and eight clients over HTTP, beside the engine alone.

    Returns:
        The share by which one client's time is longer than the engine's, and the throughput of eight against one's.
    """
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
            },
            ROUNDS,
        )
    show(times, 8 * TOKENS)
    server.should_exit = True
    thread.join()
    # Of a round's neighbours: what else the machine does in the meantime falls on both.
    overhead = statistics.median(
        one / alone - 1
        for alone, one in zip(times["engine, one prompt at a time"], times["server, one client"], strict=True)
    )
    gain = statistics.median(times["server, one client"]) / statistics.median(times["server, eight clients"])
    return overhead, gain


def first_token_of_chat(folder: Path) -> float:
    """Seconds from starting the command to the first byte of its reply; the question waits in its stdin."""
    command = [sys.executable, "-m", "nemo_cpt.cli", "chat", str(folder), "--max-tokens", "4"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **pipes) as chat:  # type: ignore[call-overload]
            chat.stdin.write(b"Hello\n")
            chat.stdin.close()
            assert chat.stdout.read(1), "no reply"
            seconds.append(time.perf_counter() - start)
            chat.stdout.read()
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
