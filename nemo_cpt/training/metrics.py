"""The file of a run's metrics. Apart from the callbacks that measure, so that reading it does not import NeMo."""

import json
from collections.abc import Mapping
from pathlib import Path

METRICS_FILE = "metrics/steps.jsonl"  # in a folder: NeMo moves plain files away when a run is resumed
_LOSS = "val_loss_"
RESUMED_FROM = "resumed_from"  # in a line of its own: a start of the job, and the step that it goes on from


def append_metrics(run_folder: str | Path, values: Mapping[str, float | None]) -> None:
    """Append a line to a run's `metrics/steps.jsonl`, behind one that a killed job or a full disk cut off."""
    path = Path(run_folder, METRICS_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + json.dumps(values).encode() + b"\n")


def read_metrics(run_folder: str | Path) -> list[dict[str, float]]:
    """What a run measured, one dict a step in their order: its training's metrics and its validation's.

    Where a run was killed and resumed at an earlier step, the steps since then count as they were done again. Lines
    that are no JSON are left out: a killed job leaves its last one unfinished.
    """
    path = Path(run_folder, METRICS_FILE)
    by_step: dict[float, dict[str, float]] = {}
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if (start := line.get(RESUMED_FROM)) is not None:
            by_step = {step: values for step, values in by_step.items() if step <= start}
        else:
            by_step.setdefault(line["step"], {}).update(line)
    return [by_step[step] for step in sorted(by_step)]


def validation_losses(run_folder: str | Path) -> list[dict[str, float]]:
    """Each set's loss at the first and at the last validation of a run, by name, with the `step`; empty without one."""
    found = [
        {"step": int(line["step"])}
        | {name.removeprefix(_LOSS): value for name, value in line.items() if name.startswith(_LOSS)}
        for line in read_metrics(run_folder)
        if any(name.startswith(_LOSS) for name in line)
    ]
    return found if len(found) < 2 else [found[0], found[-1]]
