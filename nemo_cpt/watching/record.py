"""What a run's folder tells of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from nemo_cpt.errors import CptError
from nemo_cpt.launching.results import Run
from nemo_cpt.monitoring.forgetting import Change, changes, in_bits_per_byte, validation_sets
from nemo_cpt.training.metrics import (
    END_FILE,
    METRICS_FILE,
    REPLIES_FILE,
    RUN_FILE,
    WARNINGS_FILE,
    MetricsReader,
    read_file,
    read_lines,
)

TRAIN_LOSS, STEP_SECONDS, GPU_MEMORY = "reduced_train_loss", "train_step_timing in s", "gpu_memory_gib"
LAST_STEPS = 20  # of which the speed is the median: single steps wait for checkpoints
PACE_STEPS = 100  # of which the pace is the mean, with what lies between them


@dataclass(frozen=True)
class Record:
    """A run as its files have it at one moment; runs of older versions have less.

    Attributes:
        folder: the run's.
        reader: of its metrics, which has read them up to an earlier moment; a new one when None.
    """

    folder: Path
    reader: MetricsReader | None = None

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """What was measured, a dict a step."""
        return (self.reader or MetricsReader(self.folder)).read()

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the run is (`nemo_cpt.monitoring.description`)."""
        return read_file(self.folder, RUN_FILE)

    @cached_property
    def end(self) -> dict[str, Any]:
        """How its last start ended; empty while it goes on, and of a job that was killed."""
        return read_file(self.folder, END_FILE)

    @cached_property
    def warnings(self) -> list[dict[str, Any]]:
        """What the run itself found worth a warning."""
        return read_lines(self.folder, WARNINGS_FILE)

    @cached_property
    def replies(self) -> list[dict[str, Any]]:
        """What it replied at its validations."""
        return read_lines(self.folder, REPLIES_FILE)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last step that was measured."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @cached_property
    def max_steps(self) -> int | None:
        """The run's length; None where nothing says it."""
        # As this start was asked for, which may be more than the newest checkpoint knows of.
        return self.description.get("max_steps") or Run(self.folder).max_steps

    @cached_property
    def changes(self) -> dict[str, Change]:
        """How each validation set has changed since before the training."""
        return changes(self.metrics, self.max_steps)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a value was measured, and its values there."""
        points = [(int(line["step"]), line[name]) for line in self.metrics if line.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, name: str) -> float | None:
        """A value as it was measured last: NaN, which files hold as null, of a run that diverged; None of none."""
        found = next((line for line in reversed(self.metrics) if name in line), None)
        return None if found is None else math.nan if found[name] is None else found[name]

    @property
    def validation_sets(self) -> list[str]:
        """The sets that it validated on."""
        return validation_sets(self.metrics)

    def unit(self, validation_set: str) -> tuple[float, str]:
        """What a set's loss in nats per token is multiplied with, and the unit that it then has."""
        return in_bits_per_byte(self.description.get("validation", {}).get(validation_set, {}).get("bytes_per_token"))

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of a global batch."""
        return self.description.get("tokens_per_step")

    def speeds(self) -> tuple[list[int], list[float]]:
        """Tokens a second of each logged step, without what lies between steps."""
        steps, seconds = self.series(STEP_SECONDS)
        # NaN leaves a gap in a picture, where 0 or an error would tell of a step that was none.
        return steps, [(self.tokens_per_step or math.nan) / (each or math.nan) for each in seconds]

    @property
    def tokens_per_second(self) -> float | None:
        """The median speed of the last steps; None where it is not known yet."""
        seconds = self._last_steps(LAST_STEPS, STEP_SECONDS)
        return self.tokens_per_step / median(seconds) if seconds and self.tokens_per_step else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the last ones, with the validations and checkpoints among them."""
        if not self.max_steps or not self.metrics:
            return None
        pace = self._pace()
        return None if pace is None else max(self.max_steps - self.step, 0) * pace

    def _pace(self) -> float | None:
        """Seconds a step, of wall time over the last steps, else of the steps alone."""
        last = [line for line in self.metrics[-PACE_STEPS:] if TRAIN_LOSS in line and "time" in line]
        timed = [(line["step"], line["time"]) for line in last]
        # From line to line, which are log_every_n_steps apart: what lies between two steps is in it.
        whole = [(end - start) / (after - before) for (before, start), (after, end) in pairwise(timed)]
        seconds = self._last_steps(LAST_STEPS, STEP_SECONDS)
        if len(whole) < 2:
            return median(seconds) if seconds else None
        pauses = [each for each in whole if each < 10 * median(whole) + 60]  # not the time between two starts
        return sum(pauses) / len(pauses)

    def _last_steps(self, count: int, name: str) -> list[float]:
        return [line[name] for line in self.metrics[-count:] if line.get(name)]

    @property
    def plan(self) -> Mapping[str, Any]:
        """The planner's figures; empty where there are none."""
        found = self.description.get("plan", {})
        return {} if "unknown" in found else found

    @property
    def training_sets(self) -> Sequence[Mapping[str, Any]]:
        """Each training set with its `prefix`, `share`, and for plain text `tokens` and `epochs`."""
        return self.description.get("training", [])


def record(folder: Path) -> Record:
    """A run's record.

    Raises:
        CptError: nothing was measured in the folder.
    """
    found = Record(folder)
    if not found.metrics and not found.description:
        raise CptError(
            f"{folder} has no {METRICS_FILE}: the run has measured nothing yet, or was trained without the recipes' "
            "callbacks (MetricsFile)"
        )
    return found
