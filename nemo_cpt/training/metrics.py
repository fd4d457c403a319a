"""The file of a run's metrics. Apart from the callbacks that write it, so that reading it does not import NeMo."""

import json
from pathlib import Path

METRICS_FILE = "metrics/steps.jsonl"  # in a folder: NeMo moves plain files away when a run is resumed


def read_metrics(run_folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics/steps.jsonl`; a line that a killed run left unfinished is left out."""
    path = Path(run_folder, METRICS_FILE)
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
