"""Speed and memory of `nemo_cpt.corpus.prepare` beside its peers, on the same text, interleaved in one run.

    python benchmarks/corpus.py TEXT.jsonl --tokenizer FOLDER --nemo NEMO --megatron MEGATRON --rounds 3

TEXT.jsonl: real text, not repeated (word caches make repeated text look fast). FOLDER: a byte-level BPE tokenizer with
tokenizer.json, such as Llama-3.1's. NEMO and MEGATRON: checkouts of github.com/NVIDIA-NeMo/NeMo at v2.4.0 and
github.com/NVIDIA/Megatron-LM at core_v0.15.3; their scripts run unmodified, and are left out where no checkout is
given. NeMo's also wants `pip install --target EXTRA --no-deps ftfy nltk wcwidth regex` and --extra EXTRA.

Every contestant is a process of its own, and is run twice a round: on the whole text, and on its first 20 documents.
The second is start-up (imports, tokenizer, processes); "steady" speeds are over the difference of the two, which for
a text that takes a second is as good as start-up is constant. What `prepare` states is its own clock from the first
task to the last. With --slow N the slow contestants get only the first N documents: shuffle the text before. Their
whole time is projected.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

NEMO_PACKAGES = (
    "nemo.collections.nlp",
    "nemo.collections.nlp.data",
    "nemo.collections.nlp.data.language_modeling",
    "nemo.collections.nlp.data.language_modeling.megatron",
    "nemo.collections.nlp.modules",
    "nemo.collections.nlp.modules.common",
)
START_DOCUMENTS = 20
SLOW = ("NeMo 2.4.0 script", "Megatron-LM 0.15.3 script", "tokenizers batch")


@dataclass
class Run:
    """One process: seconds of wall clock and CPU, peaks of memory in MB, and the seconds that `prepare` states."""

    wall: float
    cpu: float
    parent: float
    worker: float
    stated: float = 0.0


@dataclass
class Job:
    """What the contestants are given."""

    text: Path
    tokenizer: Path
    workers: int
    output: Path


def texts_in(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def batches(path: Path, size: int) -> Iterator[list[str]]:
    texts = texts_in(path)
    while batch := list(islice(texts, size)):
        yield batch


# Contestants that are no program of their own: `python benchmarks/corpus.py --contestant NAME ...`


def run_nemo(root: str, arguments: list[str]) -> None:
    """NeMo's script; the __init__ files above its two imports, which import all of NeMo's NLP, are passed over."""
    for name in NEMO_PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [f"{root}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    script = f"{root}/scripts/nlp_language_modeling/preprocess_data_for_megatron.py"
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_tokenizers(job: Job) -> None:
    """tokenizers' batch encoder with its own threads, ids written as they come."""
    os.environ["RAYON_NUM_THREADS"] = str(job.workers)
    import numpy as np
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(job.tokenizer / "tokenizer.json"))
    with job.output.open("wb") as file:
        for batch in batches(job.text, 512):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                file.write(np.array(encoding.ids, np.int32).tobytes())


def run_tiktoken(job: Job) -> None:
    """tiktoken in forked processes, every so manieth batch each, ids into one file a process."""
    encoding = tiktoken_encoding(job.tokenizer)

    def work(number: int) -> None:
        with open(f"{job.output}.{number}", "wb") as file:
            for batch in islice(batches(job.text, 64), number, None, job.workers):
                for text in batch:
                    file.write(encoding.encode_to_numpy(text, disallowed_special=()).tobytes())

    in_processes(work, job.workers)


def run_pure(job: Job) -> None:
    """fastokens alone: texts in memory, ids thrown away."""
    from nemo_cpt.corpus.tokenization.tokenizer import FastEncoder

    encoder = FastEncoder(job.tokenizer / "tokenizer.json", False)
    parts = list(batches(job.text, 256))
    times = multiprocessing.get_context("fork").SimpleQueue()

    def work(number: int) -> None:
        begin, cpu = time.monotonic(), time.process_time()
        for batch in parts[number :: job.workers]:
            encoder.encode(batch)
        times.put((begin, time.monotonic(), time.process_time() - cpu))

    in_processes(work, job.workers)
    spans = [times.get() for _ in range(job.workers)]
    wall = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
    job.output.write_text(json.dumps([wall, sum(cpu for *_, cpu in spans)]))


def in_processes(work: Callable[[int], None], count: int) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=work, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def tiktoken_encoding(folder: Path) -> Any:
    """tiktoken's form of a byte-level BPE in tokenizer.json."""
    import tiktoken
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    ranks = {bytes(to_byte[c] for c in token): rank for token, rank in content["model"]["vocab"].items()}
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    special = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    return tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def commands(options: argparse.Namespace) -> dict[str, Callable[[Job], tuple[list[str], dict[str, str]]]]:
    """Return, for each contestant, the command and the environment that do a job."""
    python = sys.executable

    def own(name: str) -> Callable[[Job], tuple[list[str], dict[str, str]]]:
        return lambda job: ([python, __file__, "--contestant", name, json.dumps(asdict(job), default=str)], {})

    def prepare(job: Job) -> tuple[list[str], dict[str, str]]:
        command = ["prepare", job.text, "-o", job.output, "-t", job.tokenizer, "--workers", job.workers, "--overwrite"]
        return [python, "-m", "nemo_cpt.cli", *map(str, command)], {}

    def script(job: Job) -> list[str]:
        files = ["--input", str(job.text), "--output-prefix", str(job.output)]
        return [*files, "--json-keys", "text", "--append-eod", "--workers", str(job.workers)]

    def nemo(job: Job) -> tuple[list[str], dict[str, str]]:
        kind = ["--tokenizer-library", "huggingface", "--tokenizer-type", str(job.tokenizer), "--dataset-impl", "mmap"]
        path = os.pathsep.join(filter(None, [options.nemo, options.extra]))
        return [python, __file__, "--nemo-script", options.nemo, *script(job), *kind], {"PYTHONPATH": path}

    def megatron(job: Job) -> tuple[list[str], dict[str, str]]:
        kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(job.tokenizer)]
        command = [python, f"{options.megatron}/tools/preprocess_data.py", *script(job), *kind]
        return command, {"PYTHONPATH": options.megatron}

    found: dict[str, Callable[[Job], tuple[list[str], dict[str, str]]]] = {}
    found |= {"NeMo 2.4.0 script": nemo} if options.nemo else {}
    found |= {"Megatron-LM 0.15.3 script": megatron} if options.megatron else {}
    found |= {"tokenizers batch": own("tokenizers"), "tiktoken": own("tiktoken")}
    return found | {"prepare": prepare, "prepare, gzip": prepare, "fastokens alone": own("pure")}


def measure(command: list[str], environment: dict[str, str], log: Path, workers: int) -> Run:
    """Run a command to its end."""
    begin = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | environment)
        peaks = [0.0, 0.0]
        watcher = threading.Thread(target=watch, args=(psutil.Process(process.pid), peaks, workers), daemon=True)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Run(time.monotonic() - begin, usage.ru_utime + usage.ru_stime, *peaks)


def watch(process: psutil.Process, peaks: list[float], workers: int) -> None:
    """Keep the peaks, in MB, of the process' own resident memory and of its workers' private memory.

    Children count while there are as many as workers: `prepare`'s check of the tokenizer, before, is a child alone.
    """
    try:
        while True:
            peaks[0] = max(peaks[0], process.memory_info().rss / 1e6)
            children = process.children(recursive=True)
            for child in children if len(children) >= max(workers, 2) else ():
                try:
                    peaks[1] = max(peaks[1], child.memory_full_info().uss / 1e6)
                except psutil.Error:
                    continue
            time.sleep(0.5)  # looking costs CPU time, which the contestants share
    except psutil.Error:
        return


def compete(options: argparse.Namespace, folder: Path) -> dict[str, list[tuple[Run, Run]]]:
    """Return each contestant's runs: start-up and whole."""
    from nemo_cpt.corpus import read_manifest

    whole, first, some = options.text, folder / "first.jsonl", folder / "some.jsonl"
    for path, count in ((first, START_DOCUMENTS), (some, options.slow)):
        with whole.open("rb") as file:
            path.write_bytes(b"".join(islice(file, count)))
    packed = {path: folder / f"{path.stem}.jsonl.gz" for path in (whole, first)}
    for path, target in packed.items():
        with path.open("rb") as source, gzip.open(target, "wb", compresslevel=6) as sink:
            shutil.copyfileobj(source, sink)
    contestants = commands(options)
    names = [name for name in contestants if not options.only or name in options.only.split(";")]
    runs: dict[str, list[tuple[Run, Run]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            pair = []
            for path in (first, some if options.slow and name in SLOW else whole):
                text = packed[path] if "gzip" in name else path
                job = Job(text, options.tokenizer, options.workers, folder / name.replace(" ", "_").replace(",", ""))
                run = measure(*contestants[name](job), folder / "log", options.workers)
                pair.append(replace(run, stated=read_manifest(job.output)["seconds"]) if "prepare" in name else run)
            runs[name].append((pair[0], pair[1]))
            print(f"round {number + 1}: {name}: {pair[1].wall:.2f} s, start-up {pair[0].wall:.2f} s", file=sys.stderr)
        print(table(options, {name: pairs for name, pairs in runs.items() if pairs}, folder), file=sys.stderr)
    check_same(folder, names)
    return runs


def check_same(folder: Path, names: list[str]) -> None:
    """Compare the outputs of all contestants that write Megatron datasets."""
    prefixes = [folder / f"{name.replace(' ', '_').replace(',', '')}_text_document" for name in names]
    written = [prefix for prefix in prefixes if Path(f"{prefix}.idx").exists()]
    longest = max((Path(f"{prefix}.bin").read_bytes() for prefix in written), key=len)
    for prefix in written:
        if not longest.startswith(Path(f"{prefix}.bin").read_bytes()):
            raise SystemExit(f"{prefix}.bin differs from the others")
    print(f"same tokens: {', '.join(prefix.name for prefix in written)}", file=sys.stderr)


def table(options: argparse.Namespace, runs: dict[str, list[tuple[Run, Run]]], folder: Path) -> str:
    """Return the results as a Markdown table."""
    from nemo_cpt.corpus import read_index

    texts = list(texts_in(options.text))
    documents, size = len(texts), sum(len(text.encode()) for text in texts) / 1e6
    part = sum(len(text.encode()) for text in texts[: options.slow]) / 1e6
    tokens = read_index(folder / "prepare").tokens / 1e6
    lines = [
        f"{documents:,} documents, {size:.1f} MB of UTF-8, {tokens:.2f} M tokens, {options.workers} workers, "
        f"median of {options.rounds} rounds, load {os.getloadavg()[1]:.1f} on {os.cpu_count()} CPUs",
        "",
        "| contestant | whole s | start-up s | steady CPU s | steady documents/s | MB/s | M tokens/s | MB/CPU s "
        "| parent MB | private MB a worker | whole, x first | steady, x first | steady CPU, x first "
        "| documents/s, as it states |",
        "|" + "---|" * 14,
    ]
    base: tuple[float, float, float] | None = None
    for name, pairs in runs.items():
        rows = [(a.wall, b.wall, b.wall - a.wall, b.cpu - a.cpu) for a, b in pairs]
        start, whole, steady, cpu = (statistics.median(values) for values in zip(*rows, strict=True))
        if name == "fastokens alone":
            steady, cpu = json.loads((folder / "fastokens_alone").read_text())
        if options.slow and name in SLOW:
            steady, cpu = (value * size / part for value in (steady, cpu))
            whole = start + steady
        base = base or (whole, steady, cpu)
        parent, worker = (max(getattr(b, kind) for _, b in pairs) for kind in ("parent", "worker"))
        stated = statistics.median(b.stated for _, b in pairs)
        lines.append(
            f"| {name} | {whole:.1f} | {start:.1f} | {cpu:.1f} | {documents / steady:,.0f} | {size / steady:.1f} "
            f"| {tokens / steady:.2f} | {size / cpu:.1f} | {parent:.0f} | {worker:.0f} "
            f"| {base[0] / whole:.1f} | {base[1] / steady:.1f} | {base[2] / cpu:.1f} "
            f"| {f'{documents / stated:,.0f}' if stated else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--nemo-script"]:
        return run_nemo(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--contestant"]:
        given = json.loads(sys.argv[3])
        job = Job(Path(given["text"]), Path(given["tokenizer"]), given["workers"], Path(given["output"]))
        return {"tokenizers": run_tokenizers, "tiktoken": run_tiktoken, "pure": run_pure}[sys.argv[2]](job)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="JSON lines with the field text, not compressed")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--nemo", help="checkout of NeMo v2.4.0")
    parser.add_argument("--extra", help="folder with ftfy and nltk, which NeMo's script imports")
    parser.add_argument("--megatron", help="checkout of Megatron-LM core_v0.15.3")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=int, help="documents for the slow contestants; all by default")
    parser.add_argument("--only", help="names of contestants, separated by ;")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="corpus-bench-") as name:
        runs = compete(options, Path(name))
        print(table(options, runs, Path(name)))


if __name__ == "__main__":
    main()
