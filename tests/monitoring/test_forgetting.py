"""The forgetting alarm's arithmetic, on series made up: what is beyond doubt, and what is noise."""

import math
import random

import pytest

from nemo_cpt.errors import CptError
from nemo_cpt.monitoring.forgetting import (
    STUDENT,
    SURE,
    Validation,
    begun,
    beyond,
    change,
    changes,
    in_bits_per_byte,
    limits,
    told,
)

FIRST = 3.0


def series(losses: list[float], interval: int = 50) -> list[Validation]:
    return [Validation(index * interval, loss) for index, loss in enumerate([FIRST, *losses])]


def noisy(seed: int, drift: float = 0.0, count: int = 10, noise: float = 0.01) -> list[Validation]:
    drawn = random.Random(seed)
    return series([FIRST + drift * index + drawn.gauss(0, noise) for index in range(1, count + 1)])


def worse(validations: list[Validation]) -> bool:
    found = change("en", validations)
    return found is not None and found.worse


def metrics(validations: list[Validation], name: str = "en") -> list[dict]:
    return [{"step": each.step, f"val_loss_{name}": each.loss, f"val_batches_{name}": each.batches}
            for each in validations]  # fmt: skip


def test_noise_alone_is_rarely_called_worse() -> None:
    """Two standard errors on one side: 2.3 %, also where only three validations tell of the noise."""
    for count in (3, 5, 10, 20):
        rate = sum(worse(noisy(seed, count=count)) for seed in range(2000)) / 2000
        assert rate < 0.05, count


def test_a_drift_of_the_size_of_the_noise_is_found() -> None:
    """After ten validations, of which each alone says little."""
    assert sum(worse(noisy(seed, drift=0.005)) for seed in range(500)) > 490


def test_what_gets_better_is_never_worse() -> None:
    assert not any(worse(noisy(seed, drift=-0.01)) for seed in range(500))
    found = change("ja", noisy(0, drift=-0.02))
    assert found is not None
    assert found.better


def test_without_noise_level_slope_and_end_are_those_of_the_line() -> None:
    found = change("en", series([FIRST + 0.01 * index for index in range(1, 7)]), max_steps=1000)
    assert found is not None
    assert found.value == pytest.approx(FIRST + 0.06)
    assert found.slope == pytest.approx(0.01 / 50)
    assert found.at_end == pytest.approx(FIRST + 0.01 * 1000 / 50)
    assert found.percent == pytest.approx(2.0)


def test_the_smoothed_value_is_nearer_to_the_truth_than_the_last_one() -> None:
    smoothed, last = 0.0, 0.0
    for seed in range(500):
        validations = noisy(seed, drift=0.005)
        found = change("en", validations)
        assert found is not None
        smoothed += (found.value - (FIRST + 0.05)) ** 2
        last += (validations[-1].loss - (FIRST + 0.05)) ** 2
    assert smoothed < 0.7 * last


def test_the_standard_error_is_the_scatter_of_the_smoothed_value() -> None:
    """But for the widening, as the scatter is known from eight values."""
    found = [change("en", noisy(seed, count=60)) for seed in range(400)]
    values = [each.value for each in found if each]
    spread = math.sqrt(sum((value - FIRST) ** 2 for value in values) / len(values))
    errors = [each.standard_error for each in found if each and each.standard_error]
    assert sum(errors) / len(errors) / (STUDENT[8] / SURE) == pytest.approx(spread, rel=0.1)


def test_batches_tell_of_the_noise_at_the_second_validation() -> None:
    """The same texts were harder by the same amount: sure; harder and easier in turn: not."""
    before = (2.0, 3.0, 4.0, 3.0)
    for after, sure in ((2.1, 3.11, 4.1, 3.1), True), ((2.6, 2.7, 4.5, 2.7), False):
        found = change("en", [Validation(0, 3.0, before), Validation(50, sum(after) / 4, after)])
        assert found is not None
        assert found.worse == sure
        assert found.noise == "the spread between batches"


def test_before_anything_tells_of_the_noise_nothing_is_claimed() -> None:
    assert change("en", series([])) is None
    for losses in ([4.0], [4.0, 4.1]):
        found = change("en", series(losses))
        assert found is not None
        assert (found.standard_error, found.worse, found.better) == (None, False, False)
        assert "not known" in found.noise


def test_uneven_intervals_and_a_resumed_runs_first_step() -> None:
    """A straight line has no kinks, however its points are spaced."""
    steps = [0, 15, 20, 70, 71, 200]
    found = change("en", [Validation(step, 3 + 0.001 * step) for step in steps])
    assert found is not None
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    assert found.value == pytest.approx(3.2)


def test_a_warning_is_given_once() -> None:
    lines = metrics(noisy(1, drift=0.01, count=12))
    first = [step for step in range(2, 13) if begun(lines[: step + 1])]
    assert len(first) == 1
    assert begun([]) == []


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    lines = metrics(series([3.1, 3.2, 3.3]))
    lines[2]["val_loss_en"] = None
    lines[3]["val_batches_en"] = [None, 1.0]
    assert changes(lines)["en"].value == pytest.approx(3.3)


def test_a_last_loss_that_is_not_finite_is_not_hidden_behind_the_one_before() -> None:
    lines = metrics(series([3.1, 3.2, 3.3]))
    lines[3]["val_loss_en"] = None
    found = changes(lines, max_steps=1000)["en"]
    assert (found.step, math.isnan(found.value), found.at_end) == (150, True, None)
    assert (found.worse, found.better) == (False, False)
    assert math.isnan(changes([lines[0], lines[3]])["en"].percent)  # the first validation after that of step 0
    assert changes([lines[3]]) == {}


def test_what_is_compared_with_a_later_validation_says_so() -> None:
    """Of a run that was resumed with other samples, or not validated before its first step."""
    later = [Validation(each.step + 200, each.loss) for each in series([FIRST + 0.03 * n for n in range(1, 6)])]
    found = change("en", later)
    assert found is not None
    assert found.since == 200
    assert told(found).startswith("en has got worse: 3.0000 (step 200) -> 3.1500 nats per token (+5.0 %")


def test_what_is_said() -> None:
    found = change("en", series([FIRST + 0.03 * index for index in range(1, 6)]), max_steps=500)
    assert found is not None
    said = told(found, bytes_per_token=4.0, shares={"ds/ja_text_document": 0.95, "ds/en_text_document": 0.05})
    scale, unit = in_bits_per_byte(4.0)
    assert f"{FIRST * scale:.4f} -> {(FIRST + 0.15) * scale:.4f} {unit} (+5.0 %" in said
    assert "would make +10.0 % by the end" in said
    assert "arXiv:2403.08763" in said
    assert said.endswith("this run trains on ja 95 %, en 5 %")
    assert "nats per token" in told(found)


def test_limits_are_percentages() -> None:
    assert limits({"en": "+3%", "code": "0.5 %"}) == {"en": 3.0, "code": 0.5}
    assert limits(None) == {}
    for wrong in ("3", "-3%", "0%", "three", "+3% ", ""):
        with pytest.raises(CptError, match=r"stop_when\['en'\] is .* such as '\+3%'"):
            limits({"en": wrong})


def test_a_limit_is_reached_by_the_smoothed_loss_and_not_by_one_bad_validation() -> None:
    steady = changes(metrics(series([FIRST + 0.02 * index for index in range(1, 7)])))
    assert beyond(steady, {"en": 3.9}) is not None
    assert beyond(steady, {"en": 4.1}) is None
    outlier = changes(metrics(series([3.0, 3.001, 2.999, 3.0, 3.15])))
    assert beyond(outlier, {"en": 3.0}) is None
