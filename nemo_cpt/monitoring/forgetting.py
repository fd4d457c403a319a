"""Whether a validation set has got worse since before the training, how surely, and where that leads.

A set's loss is smoothed by a straight line through its last validations, taken where the line ends. How far that can be
trusted comes from two sources, whose variances add up:

- **between validations**: how far they scatter around the line (optimizer noise); known from three of them on.
- **between batches**: how unequally the batches of the set have changed since the first validation, which ran over the
  same ones (which texts they happen to be); known where a set is validated on several global batches.

With few of them a standard error is itself uncertain. It is widened as the Guide to the Expression of Uncertainty in
Measurement does (JCGM 100:2008, table G.2: Student's t at 95.45 %), so that "two standard errors" mean the same for
three validations as for thirty. Plain arithmetic, without numpy: the live view starts in half a second.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, stdev
from typing import Any

from nemo_cpt.errors import CptError
from nemo_cpt.training.metrics import BATCHES, LOSS

WINDOW = 5  # validations that the line goes through
TELLING = 10  # those whose scatter tells of the noise
SURE = 2.0  # standard errors
# Degrees of freedom, and Student's t at 95.45 % of them; a larger number has that of the next smaller one here.
STUDENT = {1: 13.97, 2: 4.53, 3: 3.31, 4: 2.87, 5: 2.65, 6: 2.52, 7: 2.43, 8: 2.37, 9: 2.32, 10: 2.28, 15: 2.18,
           20: 2.13, 30: 2.09, 50: 2.05, 100: 2.02}  # fmt: skip
REPLAY = (
    "replaying 5 % of old text is enough against a weak shift of the data, 25 % against a strong one such as another "
    "language (Ibrahim et al. 2024, arXiv:2403.08763)"
)


@dataclass(frozen=True)
class Change:
    """How a validation set's loss has changed since before the training, in nats per token.

    Attributes:
        name: the set's.
        since: the step of the first loss: 0, before the training, unless the run was not validated there, or has been
            resumed with other samples to validate the set on.
        step: of the last validation.
        first: the loss at `since`.
        value: the smoothed loss at `step`; NaN where the last validation's was NaN or infinite.
        standard_error: of their difference; None where nothing tells yet.
        noise: what the standard error was measured from, in words.
        slope: nats a step, over the last validations.
        at_end: the loss at the run's last step, if it went on like that; None where its length is not known.
    """

    name: str
    since: int
    step: int
    first: float
    value: float
    standard_error: float | None
    noise: str
    slope: float
    at_end: float | None

    @property
    def first_step(self) -> str:
        """What is written behind the first loss where that is not the one before the training."""
        return f" (step {self.since})" if self.since else ""

    @property
    def difference(self) -> float:
        """Nats per token; above 0 the set has got worse."""
        return self.value - self.first

    @property
    def percent(self) -> float:
        """The difference in percent of the first loss; the same for bits per byte."""
        return 100 * self.difference / self.first

    @property
    def worse(self) -> bool:
        """Whether the set has got worse beyond doubt."""
        return self.standard_error is not None and self.difference > SURE * self.standard_error

    @property
    def better(self) -> bool:
        """Whether the set has got better beyond doubt."""
        return self.standard_error is not None and -self.difference > SURE * self.standard_error


def changes(metrics: Sequence[Mapping[str, Any]], max_steps: int | None = None) -> dict[str, Change]:
    """How each validation set has changed, by its name; empty before the second validation.

    Args:
        metrics: a run's, as `read_metrics` gives them.
        max_steps: the run's length.
    """
    names = validation_sets(metrics)
    found = {name: _change_up_to_now(metrics, name, max_steps) for name in names}
    return {name: each for name, each in found.items() if each is not None}


def _change_up_to_now(metrics: Sequence[Mapping[str, Any]], name: str, max_steps: int | None) -> Change | None:
    validations = list(_validations(metrics, name))
    last = next(line for line in reversed(metrics) if f"{LOSS}{name}" in line)
    if last[f"{LOSS}{name}"] is not None or not validations:
        return change(name, validations, max_steps)
    # Of a run that has diverged not the change to its last good loss.
    return Change(
        name=name,
        since=validations[0].step,
        step=int(last["step"]),
        first=validations[0].loss,
        value=math.nan,
        standard_error=None,
        noise="not known: the last loss is NaN or infinite",
        slope=math.nan,
        at_end=None,
    )


def validation_sets(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sets that a run validated on."""
    measured = dict.fromkeys(chain.from_iterable(metrics))
    return [name.removeprefix(LOSS) for name in measured if name.startswith(LOSS)]


@dataclass(frozen=True)
class Validation:
    """A set's loss at one step, and those of its batches, in their order; none where there is one."""

    step: int
    loss: float
    batches: Sequence[float] = ()


def _validations(metrics: Sequence[Mapping[str, Any]], name: str) -> Iterator[Validation]:
    for line in metrics:
        if line.get(f"{LOSS}{name}") is not None:
            batches = line.get(f"{BATCHES}{name}") or ()
            yield Validation(int(line["step"]), line[f"{LOSS}{name}"], () if None in batches else batches)


def change(name: str, validations: Sequence[Validation], max_steps: int | None = None) -> Change | None:
    """How one set has changed over its validations; None where there are fewer than two."""
    if len(validations) < 2:
        return None
    first, last = validations[0], validations[-1]
    # Without the first, which the others are compared with: the leap away from it is no course.
    line = _Line(validations[1:][-WINDOW:]) if len(validations) > 2 else None
    value = line.at(last.step) if line else last.loss
    slope = line.slope if line else (last.loss - first.loss) / max(last.step - first.step, 1)
    parts = {
        "the scatter between validations": _between_validations(validations[1:], line),
        "the spread between batches": _between_batches(first.batches, last.batches),
    }
    known = {words: size for words, size in parts.items() if size is not None}
    return Change(
        name=name,
        since=first.step,
        step=last.step,
        first=first.loss,
        value=value,
        # The two do not depend on each other: their squares add up.
        standard_error=math.hypot(*known.values()) if known else None,
        noise=" and ".join(known) or "not known before the third validation, or with one batch a set",
        slope=slope,
        at_end=value + slope * (max_steps - last.step) if max_steps and max_steps >= last.step else None,
    )


class _Line:
    """The least-squares line through validations."""

    def __init__(self, validations: Sequence[Validation]) -> None:
        self.steps = [each.step for each in validations]
        losses = [each.loss for each in validations]
        self.centre, self.mean = fmean(self.steps), fmean(losses)
        self.spread = sum((step - self.centre) ** 2 for step in self.steps)
        covered = zip(self.steps, losses, strict=True)
        self.slope = sum((step - self.centre) * (loss - self.mean) for step, loss in covered) / self.spread

    def at(self, step: float) -> float:
        """Its value at a step."""
        return self.mean + self.slope * (step - self.centre)

    def leverage(self, step: float) -> float:
        """The variance of its value at a step, in units of a single validation's."""
        return 1 / len(self.steps) + (step - self.centre) ** 2 / self.spread


def _between_validations(validations: Sequence[Validation], line: _Line | None) -> float | None:
    """The standard error of a line's end by the scatter of validations around their course; None for less than 3.

    How much a validation differs from the line between its neighbours is free of any slow course, so that more of them
    can tell of the noise than the line goes through. A warmup's leaps are to be forgotten: not the whole run.
    """
    validations = validations[-TELLING:]
    if line is None or len(validations) < 3:
        return None
    kinks = [_kink(*three) for three in zip(validations, validations[1:], validations[2:], strict=False)]
    variance = fmean(kink**2 for kink in kinks)
    # Neighbouring kinks share validations: as many independent ones as a line leaves degrees of freedom, at most.
    return math.sqrt(variance * line.leverage(validations[-1].step)) * _widening(len(kinks))


def _kink(before: Validation, middle: Validation, after: Validation) -> float:
    """A validation's distance to the line between its neighbours, in standard deviations of a single one."""
    share = (middle.step - before.step) / (after.step - before.step)
    distance = middle.loss - (1 - share) * before.loss - share * after.loss
    return distance / math.sqrt(1 + (1 - share) ** 2 + share**2)


def _between_batches(first: Sequence[float], last: Sequence[float]) -> float | None:
    """The standard error of the mean change of the same batches."""
    if len(first) != len(last) or len(first) < 2:
        return None
    changed = [after - before for before, after in zip(first, last, strict=True)]
    return stdev(changed) / math.sqrt(len(changed)) * _widening(len(changed) - 1)


def _widening(degrees_of_freedom: int) -> float:
    # Of the table's next lower number, whose value is the larger: rather too wide than too narrow.
    smaller = [number for number in STUDENT if number <= degrees_of_freedom]
    return STUDENT[smaller[-1]] / SURE


def told(change: Change, bytes_per_token: float | None = None, shares: Mapping[str, float] | None = None) -> str:
    """What to say of a set that has got worse.

    Args:
        change: the set's.
        bytes_per_token: of the set, where they are known: the loss is then said in bits per byte.
        shares: of the training sets, by prefix.
    """
    scale, unit = in_bits_per_byte(bytes_per_token)
    end = ""
    if change.at_end is not None:
        end = f", which would make {100 * (change.at_end / change.first - 1):+.1f} % by the end"
    mixed = ", ".join(f"{set_name(prefix)} {100 * share:.0f} %" for prefix, share in (shares or {}).items())
    return (
        f"{change.name} has got worse: {change.first * scale:.4f}{change.first_step} -> {change.value * scale:.4f} "
        f"{unit} "
        f"({change.percent:+.1f} %, standard error {100 * (change.standard_error or 0) / change.first:.1f} %) at step "
        f"{change.step}. Slope: {1000 * change.slope * scale:+.4f} per 1000 steps{end}. Against forgetting: {REPLAY}"
        + (f"; this run trains on {mixed}" if mixed else "")
    )


def set_name(prefix: str) -> str:
    """A training set's name, from its prefix."""
    return prefix.rpartition("/")[2].removesuffix("_text_document")


def in_bits_per_byte(bytes_per_token: float | None) -> tuple[float, str]:
    """What a loss in nats per token is multiplied with, and the unit that it then has."""
    if not bytes_per_token:
        return 1.0, "nats per token"
    return 1 / (math.log(2) * bytes_per_token), "bits per byte"


def limits(stop_when: Mapping[str, str] | None, names: Iterable[str] | None = None) -> dict[str, float]:
    """The percent at which each set stops a run, from `{"en": "+3%"}`.

    Args:
        stop_when: the limits, by the validation sets' names.
        names: of the sets that are validated on; not looked at when None.

    Raises:
        CptError: a limit is not written like that, or is one of a set that nobody validates.
    """
    if stop_when is not None and not isinstance(stop_when, Mapping):
        raise CptError(f"stop_when is {stop_when!r}: give limits by validation set, such as {{'en': '+3%'}}")
    validated = None if names is None else list(names)
    if validated is not None and (unknown := [name for name in stop_when or () if name not in validated]):
        raise CptError(
            f"stop_when names {', '.join(unknown)}, and the run validates on {', '.join(validated) or 'nothing'}: give "
            "the name of a validation set (data.validation)"
        )
    found = {}
    for name, text in (stop_when or {}).items():
        number = re.fullmatch(r"\+?(\d+(?:\.\d+)?) ?%", str(text))
        if number is None or float(number[1]) <= 0:
            raise CptError(
                f"stop_when[{name!r}] is {text!r}: give by how many percent the set's loss may rise over that before "
                "the training, such as '+3%'"
            )
        found[name] = float(number[1])
    return found


def beyond(found: Mapping[str, Change], limit: Mapping[str, float]) -> Change | None:
    """The first set whose smoothed loss is beyond its limit, and worse beyond doubt; None if there is none."""
    # Both: a limit within the noise would stop runs by chance.
    over = (each for name, each in found.items() if name in limit and each.worse and each.percent >= limit[name])
    return next(over, None)


def begun(metrics: Sequence[Mapping[str, Any]], max_steps: int | None = None) -> list[Change]:
    """The sets that are worse at the last validation, and were not at the one before."""
    steps = [line["step"] for line in metrics if any(name.startswith(LOSS) for name in line)]
    # As it stood at the validation before: so a set is told of once, not at every validation from then on.
    before = changes([line for line in metrics if line["step"] < steps[-1]], max_steps) if steps else {}
    now = changes(metrics, max_steps)
    return [each for name, each in now.items() if each.worse and not (name in before and before[name].worse)]
