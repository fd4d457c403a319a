"""Before against after: a measure of each, their difference, and how sure it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nemo_cpt.errors import CptError

RESAMPLES, CONFIDENCE = 1000, 0.95


@dataclass(frozen=True)
class Measure:
    """A number that a set's units (documents, sequences, replies) give together.

    Attributes:
        name: such as `bits per byte`.
        units: how many there are.
        value: the number for a selection of units, an array of their indices with repetitions.
        better: which way it improves; None where neither is better by itself.
        unit: what it counts.
        note: how it was computed, such as sacrebleu's signature.
        resampled: whether the units are independent, so that resamples of them tell how sure the number is.
        counted: units that add to the number, where these are not all: an empty document has no bytes.
    """

    name: str
    units: int
    value: Callable[[Any], float]
    better: Literal["higher", "lower"] | None = None
    unit: str = ""
    note: str = ""
    resampled: bool = True
    counted: int | None = None

    @property
    def can_be_resampled(self) -> bool:
        """Whether resamples can tell anything: those of a single unit are all alike, which is no certainty."""
        return self.resampled and (self.units if self.counted is None else self.counted) > 1

    @property
    def whole(self) -> float | None:
        """The number for all units; None where it is not defined, such as a share of no replies."""
        value = self.value(np.arange(self.units))
        return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        group: the set, and how it was asked.
        measure: the name of what was measured, with its unit.
        before: of the model compared with; None where there is none, or its value is not defined.
        after: of the model; None where it is not defined, such as a share of no replies.
        low: lower end of the 95 % interval of the difference, or of `after` where there is nothing to compare with.
        high: its upper end.
        better: as in `Measure`.
        note: as in `Measure`.
    """

    group: str
    measure: str
    before: float | None
    after: float | None
    low: float | None = None
    high: float | None = None
    better: str | None = None
    note: str = ""

    @property
    def difference(self) -> float | None:
        """After minus before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval of the difference leaves 0 out and the measure says which."""
        if self.difference is None or self.low is None or self.high is None or self.better is None:
            return ""
        if self.low <= 0 <= self.high:
            return ""
        return "better" if (self.low > 0) == (self.better == "higher") else "worse"


def compare(group: str, before: Measure | None, after: Measure, seed: int = 0, resamples: int = RESAMPLES) -> Row:
    """Measure both, and the interval of the difference by a paired bootstrap (Koehn, EMNLP 2004).

    Every resample takes the same units of both; the percentiles of their difference are the interval.

    Args:
        group: the row's.
        before: of the model compared with; None measures one alone.
        after: of the model, on the same units.
        seed: of the resamples.
        resamples: how many.

    Raises:
        CptError: the two do not have the same units.
    """
    if before is not None and before.units != after.units:
        raise CptError(f"{group}, {after.name}: {before.units} units before and {after.units} after cannot be paired")
    sure = after.can_be_resampled and (before is None or before.can_be_resampled)
    low, high = _interval(before, after, seed, resamples) if sure else (None, None)
    name = f"{after.name}, {after.unit}" if after.unit else after.name
    return Row(group, name, before.whole if before else None, after.whole, low, high, after.better, after.note)


def _interval(
    before: Measure | None, after: Measure, seed: int, resamples: int
) -> tuple[float, float] | tuple[None, None]:
    """The percentiles of the resamples in which both are defined; None where that is none of them."""
    rng = np.random.default_rng(seed)
    values = np.empty(resamples)
    for number in range(resamples):
        # The same units of both: what is hard for one is hard for the other, and cancels in the difference.
        chosen = rng.integers(after.units, size=after.units)
        values[number] = after.value(chosen) - (before.value(chosen) if before else 0)
    # A resample may hold no unit of which the measure is defined, such as a share of no replies.
    values = values[np.isfinite(values)]
    if not len(values):
        return None, None
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))


def mean(name: str, values: Any, **kwargs: Any) -> Measure:
    """The mean of one number a unit."""
    column = np.asarray(values, dtype=float)
    return Measure(name, len(column), lambda chosen: float(column[chosen].mean()), **kwargs)


def ratio(name: str, numerators: Any, denominators: Any, **kwargs: Any) -> Measure:
    """The sum of one number a unit over the sum of another."""
    above, below = (np.asarray(each, dtype=float) for each in (numerators, denominators))

    def value(chosen: Any) -> float:
        total = below[chosen].sum()
        # A ratio of sums, not the mean of ratios: long units count by their length.
        return float(above[chosen].sum() / total) if total else float("nan")

    return Measure(name, len(above), value, counted=int(np.count_nonzero(below)), **kwargs)


def percentile(name: str, values: Any, percent: float, **kwargs: Any) -> Measure:
    """A percentile of one number a unit."""
    column = np.asarray(values, dtype=float)
    return Measure(name, len(column), lambda chosen: float(np.percentile(column[chosen], percent)), **kwargs)
