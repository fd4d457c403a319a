"""What the live view costs a training and how soon it shows a step, and the pictures of docs/watching.md.

    python benchmarks/watching.py                      # two minutes
    python benchmarks/watching.py --pictures RUN DOCS  # writes DOCS/watching.svg and DOCS/watching-report.png

One training of the tiny recipe on the CPU is watched and left alone in turns, so that whatever else the machine does
falls on both; a step's time is the median of the turns'. The view shares nothing with the job but the machine: what it
takes of that beside a run without a job, to whose files a step is appended each second, is its CPU time.
"""

import argparse
import json
import os
import pty
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.support

from nemo_cpt.training.metrics import END_FILE, append_metrics, read_metrics
from nemo_cpt.watching.following import Follower
from nemo_cpt.watching.plots import pictures
from nemo_cpt.watching.record import STEP_SECONDS, record
from nemo_cpt.watching.view import render
from tests.support import run_folders
from tests.support.executor_jobs import held_by_another_process

COMMAND = [sys.executable, "-m", "nemo_cpt.cli"]
SECONDS, TURNS, STEPS, FIRST_STEPS = 10, 8, 25, 20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--pictures", type=Path, nargs=2, metavar=("RUN", "DOCS"))
    given = options.parse_args()
    if given.pictures:
        return write_pictures(*given.pictures)
    folder = Path(tempfile.mkdtemp(prefix="watching_"))
    measured = {"a training": beside_a_training(folder)}
    measured |= {f"{steps} steps": cost(folder / str(steps), steps) for steps in (100, 25_000)}
    print(json.dumps({"load": os.getloadavg()[0], "cores": os.cpu_count(), **measured}, indent=1))


def beside_a_training(folder: Path) -> dict[str, Any]:
    """Seconds a step with the view and without it, and from a step's record to the frame that shows it."""
    run = folder / "results" / "watched"
    turns: dict[bool, list[float]] = {True: [], False: []}
    delays: list[float] = []
    with training(folder, run):
        for number in range(TURNS):
            with watched(run) if number % 2 else nullcontext([]) as frames:
                start = time.time()  # behind the command's imports, which come once
                steps = steps_since(run, start)
            turns[bool(number % 2)].append(statistics.median(line[STEP_SECONDS] for line in steps))
            shown = [(line["time"], [when for when, step in frames if step >= line["step"]]) for line in steps]
            delays += [later[0] - when for when, later in shown if later]
    alone, beside = (statistics.median(turns[watched]) for watched in (False, True))
    return {
        "a step alone, ms": round(1000 * alone, 2),
        "a step with the view, ms": round(1000 * beside, 2),
        "with the view, % longer": round(100 * (beside / alone - 1), 2),
        "of turns alone, % apart": round(100 * (max(turns[False]) / min(turns[False]) - 1), 2),
        "from a step's record to its frame, s": {
            "median": round(statistics.median(delays), 2), "most": round(max(delays), 2)
        },
    }  # fmt: skip


@contextmanager
def training(folder: Path, run: Path) -> Iterator[None]:
    """A training of the tiny recipe from random weights, which is under way."""
    from nemo_cpt.checkpoint import make_untrained
    from nemo_cpt.corpus import prepare
    from nemo_cpt.demo.base import train_tokenizer

    lines = (files("nemo_cpt.demo") / "corpus" / "en.jsonl").read_text("utf-8").splitlines()
    (folder / "en.jsonl").write_text("\n".join(lines[8:]) + "\n")
    (folder / "held_out.jsonl").write_text("\n".join(lines[:8]) + "\n")
    train_tokenizer([json.loads(line)["text"] for line in lines], 512).save_pretrained(folder / "hf")
    for name in ("en", "held_out"):
        prepare(folder / f"{name}.jsonl", folder / name, folder / "hf", quiet=True)
    make_untrained(folder / "base", folder / "hf", "tiny")
    data = {"train": {str(folder / "en"): 1.0}, "validation": {"en": str(folder / "held_out")}}
    given = {
        "base": folder / "base", "model": "base", "untrained_base": True, "data": json.dumps(data), "name": run.name,
        "directory": run.parent, "max_steps": 100_000, "val_check_interval": 100_000,
        "trainer.log_every_n_steps": 1,
    }  # fmt: skip
    words = [*COMMAND, "run", "tiny", "--plain", *(f"{name}={value}" for name, value in given.items())]
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"NEMORUN_HOME": str(folder / "home")})
    try:
        # Behind what the first steps take longer.
        while not run.is_dir() or len(read_metrics(run)) < FIRST_STEPS:
            if job.poll() is not None:
                sys.exit((folder / "log").read_text()[-3000:])
            time.sleep(0.5)
        yield
    finally:
        job.send_signal(signal.SIGINT)
        job.wait()


def steps_since(run: Path, start: float) -> list[dict[str, Any]]:
    """Wait for STEPS further steps; returns their measurements."""
    while True:
        found = [line for line in read_metrics(run) if line.get("time", 0) > start and STEP_SECONDS in line]
        if len(found) >= STEPS:
            return found
        time.sleep(0.5)


@contextmanager
def watched(run: Path) -> Iterator[list[tuple[float, int]]]:
    """Watch a run meanwhile, from the first frame on; gives when each frame came, and the step that it shows."""
    controller, terminal = pty.openpty()
    watching = subprocess.Popen([*COMMAND, "watch", str(run)], stdin=subprocess.DEVNULL, stdout=terminal)
    os.close(terminal)
    frames: list[tuple[float, int]] = []

    def read() -> None:
        with suppress(OSError):  # the terminal is closed
            while text := os.read(controller, 1 << 16).decode(errors="replace"):
                found = re.findall(r"step ([\d,]+) of", text)
                frames.extend((time.time(), int(step.replace(",", ""))) for step in found)

    reading = threading.Thread(target=read)
    reading.start()
    while not frames:
        time.sleep(0.05)
    yield frames
    time.sleep(1)  # the last steps are to be shown, too
    watching.send_signal(signal.SIGINT)
    watching.wait()
    reading.join()
    os.close(controller)


def cost(folder: Path, steps: int) -> dict[str, float]:
    """Seconds until the first frame, and CPU seconds a second from then on."""
    run_folders.describe(folder, max_steps=2 * steps)
    run_folders.measure(folder, steps, interval=max(steps // 20, 1))
    with held_by_another_process(folder):
        controller, terminal = pty.openpty()
        start = time.perf_counter()
        watching = subprocess.Popen([*COMMAND, "watch", str(folder)], stdout=terminal, stderr=terminal)
        os.close(terminal)
        os.read(controller, 1 << 16)
        first = time.perf_counter() - start
        time.sleep(1)  # the start is over
        cpu, start = psutil.Process(watching.pid).cpu_times(), time.perf_counter()
        threading.Thread(target=_drain, args=(controller,), daemon=True).start()
        for step in range(steps + 1, steps + 1 + SECONDS):
            append_metrics(folder, {"step": step, "time": time.time(), "reduced_train_loss": 3.0})
            time.sleep(1)
        used, seconds = psutil.Process(watching.pid).cpu_times(), time.perf_counter() - start
        (folder / END_FILE).write_text(
            json.dumps({"state": "finished", "step": step, "time": time.time(), "message": ""})
        )
        watching.wait()
    spent = used.user + used.system - cpu.user - cpu.system
    return {"to the first frame, s": round(first, 2), "CPU, % of a core": round(100 * spent / seconds, 2)}


def _drain(controller: int) -> None:
    try:
        while os.read(controller, 1 << 16):
            pass
    except OSError:  # the terminal is closed
        pass


def write_pictures(run: Path, docs: Path) -> None:
    """The view of a run as it is now, and a picture of its report."""
    from rich.console import Console

    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=104, file=nowhere)
        console.print(render(Follower(run).snapshot()))
    (docs / "watching.svg").write_text(console.export_svg(title=f"nemo-cpt watch {run.name}"))
    (docs / "watching-report.png").write_bytes(pictures([record(run)])["forgetting"])


if __name__ == "__main__":
    main()
