"""The files of a run's metrics. Apart from the callbacks that measure, so that reading them does not import NeMo.

FOLDER/metrics/steps.jsonl     what was measured, a line a logged step and a line a validation
FOLDER/metrics/run.json        what the run is (`nemo_cpt.monitoring.description`)
FOLDER/metrics/end.json        how its last start ended; not there while it goes on
FOLDER/metrics/warnings.jsonl  what the run itself found worth a warning: step, time, text
FOLDER/metrics/replies.jsonl   what the model replied at a validation: step, id, prompt, reply
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics/steps.jsonl"  # in a folder: NeMo moves plain files away when a run is resumed
RUN_FILE = "metrics/run.json"
END_FILE = "metrics/end.json"
WARNINGS_FILE = "metrics/warnings.jsonl"
REPLIES_FILE = "metrics/replies.jsonl"
LOSS = "val_loss_"  # before a validation set's name: its mean loss, in nats per token
BATCHES = "val_batches_"  # the losses of its global batches, in their order, where there are several
RESUMED_FROM = "resumed_from"  # in a line of its own: a start of the job, and the step that it goes on from
VALIDATED_OTHERWISE = "validated_otherwise"  # in that line: sets whose losses are of other samples from here on


def append_metrics(run_folder: str | Path, values: Mapping[str, Any], file: str = METRICS_FILE) -> None:
    """Append a line to one of a run's files of JSON lines, behind one that a killed job or a full disk cut off."""
    path = Path(run_folder, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as lines:
        size = lines.seek(0, 2)
        lines.seek(max(size - 1, 0))
        # A torn line is ended rather than cut: what others have read of the file stays where it was.
        torn = lines.read(1) not in (b"", b"\n")
        # What is no Unicode, of a path's odd bytes, remains as JSON's own escape: \udcff.
        line = json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace")
        lines.write(b"\n" * torn + line + b"\n")


def read_metrics(run_folder: str | Path) -> list[dict[str, Any]]:
    """What a run measured, one dict a step in their order: its training's metrics and its validation's.

    Where a run was killed and resumed at an earlier step, the steps since then count as they were done again. Where it
    was resumed with other samples to validate a set on, the set's losses before that are left out: the later ones must
    not be compared with them. Lines that are no JSON are left out: a killed job leaves its last one unfinished.
    """
    return MetricsReader(run_folder).read()


class MetricsReader:
    """Reads a run's metrics as `read_metrics` does, and at each further time what has been appended since.

    Args:
        run_folder: the run's.
    """

    def __init__(self, run_folder: str | Path) -> None:
        self._path = Path(run_folder, METRICS_FILE)
        self._by_step: dict[float, dict[str, Any]] = {}
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """What was measured up to now."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:  # another file, of a run that was begun anew
                self._by_step, self._offset = {}, 0
            file.seek(self._offset)
            for text in file:
                self._take(text)
                # A line that is being written is read again, and the same once more changes nothing.
                self._offset += len(text) if text.endswith(b"\n") else 0
        return [self._by_step[step] for step in sorted(self._by_step)]

    def _take(self, text: bytes) -> None:
        line = _parsed(text)
        if line is None:
            return
        if (start := line.get(RESUMED_FROM)) is not None:
            # What a killed job measured behind its checkpoint is done again, and comes again.
            self._by_step = {step: values for step, values in self._by_step.items() if step <= start}
            for name in line.get(VALIDATED_OTHERWISE, ()):
                for values in self._by_step.values():
                    values.pop(f"{LOSS}{name}", None)
                    values.pop(f"{BATCHES}{name}", None)
        elif isinstance(step := line.get("step"), int | float):  # else the rest of a line that was cut
            # Training and validation write lines of their own for one step.
            self._by_step.setdefault(step, {}).update(line)


def read_lines(run_folder: str | Path, file: str) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where it is not there."""
    path = Path(run_folder, file)
    found = map(_parsed, path.read_bytes().splitlines() if path.exists() else [])
    return [line for line in found if line is not None]


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of JSON; None for what is no object."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def read_file(run_folder: str | Path, file: str) -> dict[str, Any]:
    """A file that is one JSON object; empty where it is not there."""
    try:
        return json.loads(Path(run_folder, file).read_bytes())
    except (OSError, ValueError):
        return {}


def validation_losses(run_folder: str | Path) -> list[dict[str, float | None]]:
    """Each set's loss at the first and at the last validation of a run, by name, with the `step`; empty without one.

    None stands for a loss that was NaN or infinite.
    """
    found = [
        {"step": int(line["step"])}
        | {name.removeprefix(LOSS): value for name, value in line.items() if name.startswith(LOSS)}
        for line in read_metrics(run_folder)
        if any(name.startswith(LOSS) for name in line)
    ]
    return found if len(found) < 2 else [found[0], found[-1]]
