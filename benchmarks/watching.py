"""What the live view costs, and the pictures of docs/watching.md.

    python benchmarks/watching.py                      # the cost
    python benchmarks/watching.py --pictures RUN DOCS  # writes DOCS/watching.svg and DOCS/watching-report.png

The view is a process, or in `nemo-cpt run` a thread of the waiting launcher, that reads files; what it costs is CPU
time beside the job. It follows a run of so many steps to which a step is appended each second.
"""

import argparse
import json
import os
import pty
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.support

from nemo_cpt.training.metrics import END_FILE, append_metrics
from nemo_cpt.watching.following import Follower
from nemo_cpt.watching.plots import pictures
from nemo_cpt.watching.record import record
from nemo_cpt.watching.view import render
from tests.support import run_folders
from tests.support.executor_jobs import held_by_another_process

SECONDS = 30


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--pictures", type=Path, nargs=2, metavar=("RUN", "DOCS"))
    given = options.parse_args()
    if given.pictures:
        return write_pictures(*given.pictures)
    costs = {f"{steps} steps": cost(steps) for steps in (100, 25_000)}
    print(json.dumps({"load": os.getloadavg()[0], "cores": os.cpu_count(), **costs}, indent=1))


def cost(steps: int) -> dict[str, float]:
    """Seconds until the first frame, and CPU seconds a second from then on."""
    folder = Path(tempfile.mkdtemp(prefix="watching_"), "run")
    run_folders.describe(folder, max_steps=2 * steps)
    run_folders.measure(folder, steps, interval=max(steps // 20, 1))
    with held_by_another_process(folder):
        controller, terminal = pty.openpty()
        start, before = time.perf_counter(), _cpu()
        watching = subprocess.Popen(
            [sys.executable, "-m", "nemo_cpt.cli", "watch", str(folder)], stdout=terminal, stderr=terminal
        )
        os.close(terminal)
        os.read(controller, 1 << 16)
        first = time.perf_counter() - start
        threading.Thread(target=_drain, args=(controller,), daemon=True).start()
        for step in range(steps + 1, steps + 1 + SECONDS):
            append_metrics(folder, {"step": step, "time": time.time(), "reduced_train_loss": 3.0})
            time.sleep(1)
        (folder / END_FILE).write_text(
            json.dumps({"state": "finished", "step": step, "time": time.time(), "message": ""})
        )
        watching.wait()
    return {"to the first frame, s": round(first, 2), "CPU, % of a core": round(100 * (_cpu() - before) / SECONDS, 2)}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
