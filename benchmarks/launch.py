"""What launching costs: help, listing, a refused second start, `nemo-cpt run tiny` to its first step, Slurm.

    python benchmarks/launch.py [--folder FOLDER] [--repeats 3]

The peer's figures come from the same run: `nemo --help` and `nemo llm pretrain --help` of NeMo-Run. The Slurm part
needs slurm-wlm and munge, and root; it is left out, with the reason, where they are not installed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from functools import partial
from importlib.resources import files
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.support

BIN = Path(sys.executable).parent


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--folder", type=Path, default=None, help="reused if it holds an earlier run's base")
    options.add_argument("--repeats", type=int, default=3, help="of the commands for help")
    given = options.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="launch_"))
    os.environ["NEMORUN_HOME"] = str(folder / "nemo_run")
    results = {"load": os.getloadavg()[0], "cores": os.cpu_count()}
    recipe = _material(folder)
    parts = (
        partial(_help, given.repeats),
        partial(_second_start, given.repeats, folder, recipe),
        partial(_first_step, folder, recipe),
        partial(_slurm, folder, recipe),
    )
    for part in parts:
        results |= part()
        print(json.dumps(results, indent=2), flush=True)


def _help(repeats: int) -> dict[str, float]:
    """Seconds of each command, medians, taken in turns."""
    commands = {
        "nemo-cpt --help": [BIN / "nemo-cpt", "--help"],
        "nemo-cpt recipes": [BIN / "nemo-cpt", "recipes"],
        "nemo cpt --help": [BIN / "nemo", "cpt", "--help"],
        "peer: nemo --help": [BIN / "nemo", "--help"],
        "peer: nemo llm pretrain --help": [BIN / "nemo", "llm", "pretrain", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeats):
        for name, command in commands.items():
            if "llm" not in name or turn < 2:  # it imports NeMo
                times[name].append(_seconds(command))
    return {name: round(statistics.median(each), 2) for name, each in times.items()}


def _second_start(repeats: int, folder: Path, recipe: list[str]) -> dict[str, float]:
    """Seconds until a start is refused whose run's folder another process holds, the median."""
    from tests.support.executor_jobs import held_by_another_process

    run_folder = folder / "held" / "run"
    with held_by_another_process(run_folder):
        command = [BIN / "nemo-cpt", "run", *recipe, f"directory={run_folder.parent}", f"name={run_folder.name}"]
        times = [_seconds(command, code=2) for _ in range(repeats)]
    return {"second start refused after": round(statistics.median(times), 2)}


def _seconds(command: list, code: int = 0) -> float:
    started = time.monotonic()
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert ended.returncode == code, command
    return time.monotonic() - started


def _material(folder: Path) -> list[str]:
    """A base of the tiny shape and two datasets; returns the arguments of the recipe."""
    data = {"train": {str(folder / "en"): 1.0}, "validation": {"en": str(folder / "held_out")}}
    if not (folder / "base").exists():
        from nemo_cpt.checkpoint import import_hf
        from nemo_cpt.corpus import prepare
        from nemo_cpt.demo import base

        folder.mkdir(parents=True, exist_ok=True)
        lines = (files("nemo_cpt.demo") / "corpus" / "en.jsonl").read_text().splitlines()
        (folder / "en.jsonl").write_text("\n".join(lines) + "\n")
        texts = [json.loads(line)["text"] for line in lines]
        tokenizer = base.train_tokenizer(texts, 512)
        base.pretrain(texts, tokenizer, folder / "hf", steps=60, progress=lambda step, loss: None, batch_size=4)
        (folder / "held_out.jsonl").write_text("\n".join(lines[:8]) + "\n")
        for name in ("en", "held_out"):
            prepare(folder / f"{name}.jsonl", folder / name, folder / "hf", quiet=True)
        import_hf(folder / "hf", folder / "base")
    return [
        "tiny", f"base={folder / 'base'}", f"tokenizer={folder / 'hf'}", f"data={json.dumps(data)}", "max_steps=3",
        "val_check_interval=3", "global_batch_size=4", "micro_batch_size=4",
    ]  # fmt: skip


def _first_step(folder: Path, recipe: list[str]) -> dict[str, float]:
    """Seconds from the command to the first training step's line, and the way there."""
    command = [BIN / "nemo-cpt", "run", *recipe, f"directory={folder / f'results_{time.time_ns()}'}"]
    marks = {
        "job's process started": r"Launched app",
        "NeMo imported, trainer built": r"GPU available|Global seed|Tokenizer|NeMo . ",
        "model built": r"Trainable params",
        "first step": r"iteration 0/",
    }
    started = time.monotonic()
    found: dict[str, float] = {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        for line in process.stdout or ():
            for name, pattern in marks.items():
                if name not in found and re.search(pattern, line):
                    found[name] = round(time.monotonic() - started, 1)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    found["done"] = round(time.monotonic() - started, 1)
    return {f"run tiny: {name}": seconds for name, seconds in found.items()}


def _slurm(folder: Path, recipe: list[str]) -> dict[str, float | str]:
    from tests.support.slurm_cluster import SlurmCluster, missing

    if reason := missing():
        return {"slurm": reason}
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="slurm_")))
    cluster.start()
    try:
        os.environ |= cluster.environ
        command = [BIN / "nemo-cpt", "run", *recipe, "--executor", "slurm", "executor.time=5", "--detach"]
        took = _seconds(command)
        submitted = cluster.run("scontrol", "show", "job").partition("SubmitTime=")[2].split()[0]
        accepted = datetime.fromisoformat(submitted).timestamp() - (time.time() - took)
        return {"slurm: submitted after": round(accepted, 1), "slurm: run --detach returned after": round(took, 1)}
    finally:
        for job in cluster.jobs():
            cluster.run("scancel", job)
        cluster.stop()


if __name__ == "__main__":
    main()
