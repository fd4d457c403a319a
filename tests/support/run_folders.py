"""Folders of runs as trainings leave them, with curves made up."""

import json
import math
import random
from pathlib import Path

from nemo_cpt.training.metrics import RESUMED_FROM, RUN_FILE, WARNINGS_FILE, append_metrics

START = 1_700_000_000.0
STEP_SECONDS = 2.0
TOKENS_PER_STEP = 16 * 1024
LAUNCHED = {
    "recipe": "smollm2.continual_pretrain",
    "arguments": {"max_steps": 100, "lr": 1e-4, "data": {"train": {"ds/ja": 0.75, "ds/en": 0.25}}},
    "fields": ["trainer.log_every_n_steps=1"],
}


def describe(folder: Path, **changes: object) -> None:
    """Write `metrics/run.json`, as `DescribeRun` does."""
    path = folder / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = {"tokens_per_second": 9000.0, "peak_gib": 24.0, "reserved_gib": 20.0, "gpu": "H200"}
    about = {
        "started": "2026-01-02 03:04:05+00:00",
        "resumed": False,
        "max_steps": 100,
        "seq_length": 1024,
        "global_batch_size": 16,
        "tokens_per_step": TOKENS_PER_STEP,
        "training": [
            {"prefix": "ds/ja_text_document", "share": 0.75, "tokens": 614_400, "epochs": 2.0},
            {"prefix": "ds/en_text_document", "share": 0.25, "tokens": 4_096_000, "epochs": 0.1},
        ],
        "validation": {
            "ja": {"prefix": "ds/ja_validation_text_document", "bytes_per_token": 2.0},
            "en": {"prefix": "ds/en_validation_text_document", "bytes_per_token": 4.0},
        },
        "machine": {"host": "node1", "processes": 1, "gpu": "NVIDIA H200", "gpu_memory_gib": 139.8, "slurm_job": None},
        "plan": plan,
        "versions": {"nemo_cpt": "1", "torch": "2"},
        "launched": LAUNCHED,
        "configuration": {"optim": {"config": {"lr": 1e-4}}, "trainer": {"max_steps": 100, "callbacks": ["<script>"]}},
    }
    path.write_text(json.dumps(about | changes))


def measure(folder: Path, steps: int, *, interval: int = 10, forgetting: float = 0.002, seed: int = 0) -> None:
    """Append the metrics of a run's first steps: Japanese is learned, and English gets worse by `forgetting` a step."""
    noise = random.Random(seed)
    _validate(folder, 0, 0.0, forgetting, noise)
    append_metrics(folder, {RESUMED_FROM: 0})
    for step in range(1, steps + 1):
        append_metrics(
            folder,
            {
                "step": step,
                "time": START + STEP_SECONDS * step,
                "reduced_train_loss": 3 + 2 * math.exp(-step / 30) + noise.gauss(0, 0.05),
                "lr": 1e-4 * math.cos(step / 80),
                "grad_norm": 1 + noise.random(),
                "train_step_timing in s": STEP_SECONDS,
                "gpu_memory_gib": 19.0,
            },
        )
        if step % interval == 0:
            _validate(folder, step, STEP_SECONDS * step, forgetting, noise)


def _validate(folder: Path, step: int, seconds: float, forgetting: float, noise: random.Random) -> None:
    losses = {"ja": 4 - 1.2 * (1 - math.exp(-step / 40)), "en": 3 + forgetting * step}
    line: dict[str, object] = {"step": step, "time": START + seconds}
    for name, loss in losses.items():
        batches = [loss + 0.1 * index + noise.gauss(0, 0.002) for index in range(-2, 3)]
        line |= {f"val_loss_{name}": sum(batches) / len(batches), f"val_batches_{name}": batches}
    append_metrics(folder, line)


def reply(folder: Path, step: int, text: str) -> None:
    """Append a reply of a validation."""
    append_metrics(folder, {"step": step, "id": "1", "prompt": "日本の首都は?", "reply": text}, "metrics/replies.jsonl")


def warn(folder: Path, step: int, text: str, seconds: float = 0) -> None:
    """Append a warning of the run's own, so many seconds behind START."""
    append_metrics(folder, {"step": step, "time": START + seconds, "text": text}, WARNINGS_FILE)
