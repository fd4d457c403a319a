"""Speed and memory of `nemo_cpt.cleaning.clean` beside its peers, on the same text, interleaved in one run.

    python benchmarks/cleaning.py TEXT.jsonl --language ja --datatrove PYTHON --swallow FOLDER --rounds 3

TEXT.jsonl: real text with the field `text`. PYTHON: the interpreter of an environment of its own with
`pip install "datatrove[io]" nltk "spacy[ja]" regex tokenizers ftfy "xxhash<4" fasteners`, since datatrove 0.10 needs
NumPy 2 and a newer hub library than NeMo allows; left out, and said so, where none is given. FOLDER: a checkout of
github.com/swallow-llm/swallow-corpus, whose quality.py computes the same measures of Japanese as the rules for `ja`.

`clean` does all its rules, duplicates and the report. datatrove's pipeline: Gopher's repetition and quality filters,
FineWeb's, masking of e-mail and IP addresses, and its MinHash (four stages) with --datatrove-minhash; for Japanese it
cuts words with Sudachi, which is most of its time. Each contestant is a process of its own with --workers workers, and
is run on the first documents only where it is slow (--slow): MB/s are of what it was given. CPU seconds are those of
the process and all its workers, and say more than the clock on a busy machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import psutil

OURS = """
import sys
from nemo_cpt.cleaning import clean
report = clean(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), quiet=True)
print(report.kept, "of", report.documents, file=sys.stderr)
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
)
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.typeshelper import Languages

source, output, language, workers, minhash = sys.argv[1:]
workers = int(workers)
code = {"ja": "jpn_Jpan", "en": "eng_Latn", "zh": "cmn_Hani", "ko": "kor_Hang"}[language]
words = {"language": code}
quality = {"min_stop_words": None, "min_avg_word_length": 1} if language != "en" else {}
stops = {"stop_chars": tuple(".'\\"!?。！？」』")} if language != "en" else {}


def run(name, *steps, tasks=workers):
    LocalPipelineExecutor(
        pipeline=list(steps), tasks=tasks, workers=workers, logging_dir=f"{output}/logs/{name}", skip_completed=False
    ).run()


run(
    "filters",
    JsonlReader(source),
    FTFYFormatter(),
    GopherRepetitionFilter(**words),
    GopherQualityFilter(**words, **quality),
    FineWebQualityFilter(**words, **stops),
    PIIFormatter(),
    JsonlWriter(f"{output}/kept", compression=None),
)
if minhash == "yes":
    run("signatures", JsonlReader(f"{output}/kept"), MinhashDedupSignature(f"{output}/signatures", **words))
    run("buckets", MinhashDedupBuckets(f"{output}/signatures", f"{output}/buckets"), tasks=14)
    run("clusters", MinhashDedupCluster(f"{output}/buckets", f"{output}/remove"), tasks=1)
    run(
        "unique",
        JsonlReader(f"{output}/kept"),
        MinhashDedupFilter(f"{output}/remove"),
        JsonlWriter(f"{output}/unique", compression=None),
    )
"""
SWALLOW = """
import json, sys
from multiprocessing import Pool
sys.path.insert(0, sys.argv[5])
import quality


def keep(line):
    document = json.loads(line)
    return line if quality.apply_v1(quality.main(document)) else ""


with open(sys.argv[1]) as source, open(sys.argv[2] + ".jsonl", "w") as kept, Pool(int(sys.argv[4])) as pool:
    kept.writelines(pool.imap(keep, source, 64))
"""


@dataclass
class Run:
    """One process and its workers: seconds of clock and CPU, MB of text, the largest memory of a process in MB."""

    wall: float
    cpu: float
    megabytes: float
    memory: float


def measured(command: list[str], megabytes: float) -> Run:
    """Run a command to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, spent, done = [0.0], dict[int, float](), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            try:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            except psutil.Error:
                continue
            for each in family:
                with suppress(psutil.Error):
                    peak[0] = max(peak[0], each.memory_info().rss / 1e6)
                    # Seen from outside: datatrove's workers are nobody's children that wait for them.
                    spent[each.pid] = each.cpu_times().user + each.cpu_times().system

    watcher = threading.Thread(target=watch)
    watcher.start()
    error = process.communicate()[1]
    wall = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command[:2])} ...: {error[-2000:]}")
    return Run(wall, sum(spent.values()), megabytes, peak[0])


def first_documents(path: Path, count: int | None, target: Path) -> float:
    """Write the first documents to a file; return its size in MB."""
    with path.open("rb") as source, target.open("wb") as file:
        file.writelines(islice(source, count))
    return target.stat().st_size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--language", default="ja")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=int, default=1500, help="documents that the peers are given")
    parser.add_argument("--datatrove", help="the interpreter of an environment with datatrove")
    parser.add_argument("--datatrove-minhash", action="store_true")
    parser.add_argument("--swallow", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        whole, few = work / "whole" / "text.jsonl", work / "few"
        whole.parent.mkdir()
        few.mkdir()
        sizes = {whole: first_documents(arguments.text, None, whole)}
        # A file for each worker: datatrove gives files, not lines, to its tasks.
        lines = list(islice(arguments.text.open("rb"), arguments.slow))
        for number in range(arguments.workers):
            (few / f"{number}.jsonl").write_bytes(b"".join(lines[number :: arguments.workers]))
        sizes[few] = sum(map(len, lines)) / 1e6
        joined = work / "few.jsonl"
        joined.write_bytes(b"".join(lines))
        options = [arguments.language, str(arguments.workers)]
        contestants = {"nemo_cpt": ([sys.executable, "-c", OURS, str(whole), "OUT", *options], sizes[whole])}
        if arguments.datatrove:
            minhash = "yes" if arguments.datatrove_minhash else "no"
            command = [arguments.datatrove, "-c", DATATROVE, str(few), "OUT", *options, minhash]
            contestants["datatrove"] = (command, sizes[few])
        else:
            print("datatrove is left out: --datatrove names the interpreter of an environment with it", file=sys.stderr)
        if arguments.swallow:
            command = [sys.executable, "-c", SWALLOW, str(joined), "OUT", *options, str(arguments.swallow)]
            contestants["Swallow's quality.py"] = (command, sizes[few])
        runs: dict[str, list[Run]] = {name: [] for name in contestants}
        for _ in range(arguments.rounds):
            for name, (command, megabytes) in contestants.items():
                output = work / "out"
                runs[name].append(measured([str(output) if part == "OUT" else part for part in command], megabytes))
                shutil.rmtree(output, ignore_errors=True)
    report(runs)


def report(runs: dict[str, list[Run]]) -> None:
    print(f"{'':22}{'MB/s':>8}{'MB per CPU s':>14}{'MB of text':>12}{'peak MB of a process':>22}")
    per_cpu = {}
    for name, found in runs.items():
        wall = statistics.median(each.megabytes / each.wall for each in found)
        per_cpu[name] = statistics.median(each.megabytes / each.cpu for each in found)
        memory = max(each.memory for each in found)
        print(f"{name:22}{wall:8.2f}{per_cpu[name]:14.2f}{found[0].megabytes:12.1f}{memory:22.0f}")
    for name, value in per_cpu.items():
        if name != "nemo_cpt":
            print(f"nemo_cpt does {per_cpu['nemo_cpt'] / value:.1f} times as much in a CPU second as {name}")
    print(json.dumps({name: [asdict(each) for each in found] for name, found in runs.items()}))


if __name__ == "__main__":
    main()
