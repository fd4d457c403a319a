"""Speed and memory of preparing conversations beside its peers, on the same conversations, interleaved in one run.

    python benchmarks/conversations.py CHATS.jsonl --tokenizer FOLDER --template llama3 --rounds 3 --trl TRL

CHATS.jsonl: one {"messages": [...]} a line, nothing repeated (word caches make repeated text look fast); `--make N`
makes them of a corpus, by rules. FOLDER: a tokenizer with tokenizer.json, such as Llama-3.1's. TRL: what
`pip install --target TRL --no-deps trl==1.16.*` gives; TRL is left out without it.

The contestants do the same work: render each conversation, tokenize it, find the answers' tokens, write both. TRL,
NeMo and `prepare` also pack into sequences. All but `prepare` get the template with `{% generation %}` around answers,
without which they train on questions as well, or not at all. NeMo 2.7.3 prepares in one process; the others use as many
as there are workers.

Every contestant is a process of its own, run twice a round: on all conversations and on the first 20. The second is
start-up; "steady" is the difference. With --slow N, all but `prepare` get only the first N; their whole is projected.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

START = 20
SEQ_LENGTH = 4096
MARKED = {
    "llama3": (
        "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{%- if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    ),
    "chatml": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<|im_end|>' }}{% endgeneration %}"
        "{%- else %}{{- m.content | trim + '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}"
    ),
}


@dataclass
class Job:
    """What a contestant is given."""

    chats: Path
    tokenizer: Path
    template: str
    workers: int
    output: Path


@dataclass
class Run:
    """One process: seconds of wall clock and CPU, and the peak of all its memory (its own and its workers') in MB."""

    wall: float
    cpu: float
    memory: float


# Contestants: `python benchmarks/conversations.py --contestant NAME JOB`


def run_map(job: Job, batched: bool) -> None:
    """datasets.map with transformers' apply_chat_template, as most scripts have it."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    template = MARKED[job.template]

    def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            rows["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    chats = datasets.Dataset.from_json(str(job.chats), cache_dir=str(job.output / "cache"))
    done = chats.map(tokenize, batched=batched, num_proc=job.workers, remove_columns=chats.column_names)
    done.save_to_disk(str(job.output / "out"))


def run_trl(job: Job) -> None:
    """What TRL's SFTTrainer does with a dataset before it trains: assistant_only_loss, packing by bfd."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    chats = datasets.Dataset.from_json(str(job.chats), cache_dir=str(job.output / "cache"))
    settings = {"assistant_only_loss": True, "packing": True, "max_length": SEQ_LENGTH, "dataset_num_proc": job.workers}
    config = SFTConfig(output_dir=str(job.output / "trl"), bf16=False, report_to=[], **settings)
    trainer = SimpleNamespace(
        chat_template=MARKED[job.template], completion_only_loss=False, _tokenizer=tokenizer, _is_vision_dataset=False
    )
    done = SFTTrainer._prepare_dataset(trainer, chats, tokenizer, config, True, None, "train")
    done.save_to_disk(str(job.output / "out"))


def run_nemo(job: Job) -> None:
    """NeMo's own: GPTSFTChatDataset, packed by first fit."""
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.packed_sequence import prepare_packed_sequence_data

    job.output.mkdir(parents=True, exist_ok=True)
    prepare_packed_sequence_data(
        input_path=job.chats,
        output_path=job.output / "packed.npy",
        output_metadata_path=job.output / "packed.json",
        packed_sequence_size=SEQ_LENGTH,
        tokenizer=AutoTokenizer(str(job.tokenizer)),
        max_seq_length=SEQ_LENGTH,
        dataset_kwargs={
            "chat": True,
            "use_hf_tokenizer_chat_template": True,
            "chat_template": MARKED[job.template],
            "sanity_check_dist_workers": False,
        },
    )


def run_prepare(job: Job) -> None:
    """`prepare`, and the packing that a training does when it starts."""
    from nemo_cpt.conversations import open_conversations, pack, prepare

    prepare(job.chats, job.output / "set", job.tokenizer, template=job.template, workers=job.workers, quiet=True)
    chats = open_conversations(job.output / "set")
    pack(chats.fit(SEQ_LENGTH, "cut").positions, SEQ_LENGTH)


CONTESTANTS: dict[str, Callable[[Job], None]] = {
    "datasets.map": lambda job: run_map(job, batched=False),
    "datasets.map, batched": lambda job: run_map(job, batched=True),
    "TRL 1.16": run_trl,
    "NeMo 2.7.3": run_nemo,
    "prepare": run_prepare,
}


def measure(name: str, job: Job, options: argparse.Namespace) -> Run:
    """Run a contestant to its end."""
    command = [sys.executable, __file__, "--contestant", name, json.dumps(asdict(job), default=str)]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), options.trl]))
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    begin, log = time.monotonic(), job.output.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        peak = [0.0]
        threading.Thread(target=watch, args=(psutil.Process(process.pid), peak), daemon=True).start()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return Run(time.monotonic() - begin, usage.ru_utime + usage.ru_stime, peak[0])


def watch(process: psutil.Process, peak: list[float]) -> None:
    """Keep the peak of the memory of a process and those below it, what they share counted once, in MB."""
    try:
        while True:
            total = 0.0
            for each in [process, *process.children(recursive=True)]:
                try:
                    total += each.memory_full_info().pss / 1e6
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], total)
            time.sleep(0.5)
    except psutil.Error:
        return


def make_chats(path: Path, corpus: list[str], count: int) -> None:
    """Write conversations of one question, made by rules out of a corpus."""
    from nemo_cpt.synthesis import synthesize

    with tempfile.TemporaryDirectory() as folder:
        synthesize(corpus, folder, train=count, validation=0)
        with open(f"{folder}/train.jsonl", encoding="utf-8") as lines, path.open("w", encoding="utf-8") as chats:
            for line in lines:
                value = json.loads(line)
                messages = [{"role": r, "content": value[k]} for r, k in (("user", "query"), ("assistant", "answer"))]
                chats.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def compete(options: argparse.Namespace, folder: Path) -> dict[str, list[tuple[Run, Run]]]:
    """Return each contestant's runs: start-up and whole."""
    first, some = folder / "first.jsonl", folder / "some.jsonl"
    for path, count in ((first, START), (some, options.slow)):
        with options.chats.open("rb") as file:
            path.write_bytes(b"".join(islice(file, count)))
    names = [name for name in CONTESTANTS if not options.only or name in options.only.split(";")]
    names = [name for name in names if options.trl or "TRL" not in name]
    runs: dict[str, list[tuple[Run, Run]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            pair = []
            for path in (first, some if options.slow and name != "prepare" else options.chats):
                output = folder / f"{number}_{names.index(name)}_{path.stem}"
                job = Job(path, options.tokenizer, options.template, options.workers, output)
                pair.append(measure(name, job, options))
            runs[name].append((pair[0], pair[1]))
            print(f"round {number + 1}: {name}: {pair[1].wall:.2f} s, start-up {pair[0].wall:.2f} s", file=sys.stderr)
    return runs


def table(options: argparse.Namespace, runs: dict[str, list[tuple[Run, Run]]]) -> str:
    """Return the results as a Markdown table."""
    with options.chats.open("rb") as file:
        sizes = [len(line) for line in file]
    lines = [
        f"{len(sizes):,} conversations, {sum(sizes) / 1e6:.1f} MB, template {options.template}, "
        f"{options.workers} workers, median of {options.rounds} rounds, load {os.getloadavg()[1]:.1f} on "
        f"{os.cpu_count()} CPUs",
        "",
        "| contestant | whole s | start-up s | steady s | conversations/s | steady CPU s | memory MB "
        "| prepare is x faster, whole | steady | by CPU |",
        "|" + "---|" * 10,
    ]
    found = {}
    for name, pairs in runs.items():
        share = sum(sizes) / sum(sizes[: options.slow]) if options.slow and name != "prepare" else 1.0
        rows = [(a.wall, (b.wall - a.wall) * share, (b.cpu - a.cpu) * share, b.memory) for a, b in pairs]
        start, steady, cpu, memory = (statistics.median(values) for values in zip(*rows, strict=True))
        found[name] = (start + steady, start, steady, cpu, memory)
    ours = found.get("prepare")
    for name, (whole, start, steady, cpu, memory) in found.items():
        times = f"{whole / ours[0]:.1f} | {steady / ours[2]:.1f} | {cpu / ours[3]:.1f}" if ours else " | | "
        lines.append(
            f"| {name} | {whole:.1f} | {start:.1f} | {steady:.1f} | {len(sizes) / steady:,.0f} | {cpu:.1f} "
            f"| {memory:,.0f} | {times} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        given = json.loads(sys.argv[3])
        paths = {key: Path(given[key]) for key in ("chats", "tokenizer", "output")}
        return CONTESTANTS[sys.argv[2]](Job(**given | paths))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", type=Path, help='JSON lines {"messages": [...]}')
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--template", default="llama3", choices=sorted(MARKED))
    parser.add_argument("--trl", help="folder with TRL")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=int, help="conversations for all but prepare; all by default")
    parser.add_argument("--only", help="names of contestants, separated by ;")
    parser.add_argument("--make", type=int, help="write so many conversations to CHATS first, by rules")
    parser.add_argument("--corpus", nargs="+", help="what to make them of")
    options = parser.parse_args()
    if options.make:
        make_chats(options.chats, options.corpus, options.make)
    with tempfile.TemporaryDirectory(prefix="conversations-bench-") as name:
        print(table(options, compete(options, Path(name))))


if __name__ == "__main__":
    main()
