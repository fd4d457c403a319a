"""What a workflow costs beside its steps: seconds for a step that is done already, and for one that does nothing.

python benchmarks/workflow.py [--steps 10] [--rounds 5]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemo_cpt.workflow import Workflow, as_yaml, call

COPY = "from shutil import copyfile\ndef copy(source, dest):\n    copyfile(source, dest)\n"
MEGABYTES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tools.py").write_text(COPY)
        (folder / "0").write_bytes(bytes(MEGABYTES * 10**6))
        steps = [
            call(f"step{n}", "tools.py:copy", reads="source", writes="dest", source=str(n), dest=str(n + 1))
            for n in range(given.steps)
        ]
        (folder / "w.yaml").write_text(as_yaml(Workflow("w", steps)))
        first = timed(folder)
        done = [timed(folder) for _ in range(given.rounds)]
        helps = [timed(folder, "--help") for _ in range(given.rounds)]
    begin = statistics.median(wall for wall, _ in helps)
    print(
        f"{given.steps} steps that copy {MEGABYTES} MB each, in their processes: {first[0] / given.steps:.2f} s a step"
    )
    for kind, which in (("wall", 0), ("CPU", 1)):
        whole = statistics.median(each[which] for each in done)
        print(f"{given.steps} steps that are done: {whole:.2f} s of {kind} time, {whole / given.steps:.3f} s a step")
    print(f"`nemo-cpt workflow --help`: {begin:.2f} s")


def timed(folder: Path, *arguments: str) -> tuple[float, float]:
    """Wall and CPU seconds of the command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "nemo_cpt.cli", "workflow", *(arguments or ["w.yaml"])]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


if __name__ == "__main__":
    main()
