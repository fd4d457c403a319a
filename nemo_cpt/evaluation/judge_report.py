"""What a judge's verdicts come to: scores, preferences, and how far the judge agrees with itself."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from nemo_cpt.evaluation.judge_questions import JudgeQuestion
from nemo_cpt.evaluation.language import wilson_interval


@dataclass(frozen=True)
class Verdict:
    """What a judge said of an answer, or of two.

    Attributes:
        question: its id.
        category: of the question.
        turn: of the answer, from 0.
        models: whose answer; of two, in the order in which the judge saw them.
        repeat: which of the verdicts on the same answers, from 0.
        value: a score from 1 to 10, or for two `first`, `second` or `tie`; None where it cannot be read.
        reply: the judge's, whole.
    """

    question: str
    category: str
    turn: int
    models: tuple[str, ...]
    repeat: int
    value: float | str | None
    reply: str


@dataclass(frozen=True)
class Preferences:
    """Which of two models a judge prefers, question by question.

    A turn is won by a model that is preferred in both orders, and else tied; a question by the one that won more of its
    turns, over all repeats.

    Attributes:
        wins: questions won, by model.
        ties: questions that neither won.
        share: of the questions that either won, those that the second model won; None where there are none.
        interval: Wilson's 95 % interval of the share.
    """

    wins: dict[str, int]
    ties: int
    share: float | None
    interval: tuple[float, float]


@dataclass(frozen=True)
class JudgeReport:
    """The questions, answers and verdicts of a run, and what follows from them.

    Attributes:
        judge: the judge's name.
        models: the names of the judged, the first before the second.
        prompt_version: of `prompts`.
        prompts: what the judge is told, for scores and for pairs.
        repeats: of each verdict.
        temperature: of the verdicts.
        questions: what was asked.
        answers: by model and question, one for each turn.
        verdicts: all of them.
        calls: of the judge, repeated attempts and earlier runs included.
        prompt_tokens: that the judge read, as far as its endpoint says.
        completion_tokens: that it wrote.
    """

    judge: str
    models: tuple[str, ...]
    prompt_version: int
    prompts: dict[str, str]
    repeats: int
    temperature: float
    questions: tuple[JudgeQuestion, ...]
    answers: dict[str, dict[str, list[str]]]
    verdicts: tuple[Verdict, ...]
    calls: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def unreadable(self) -> int:
        """Verdicts without a value."""
        return sum(verdict.value is None for verdict in self.verdicts)

    def scores(self, model: str, *, category: str | None = None, turn: int | None = None) -> dict[str, float]:
        """Return a model's mean score on each question, over its turns and repeats; paired by id with another's."""
        found = dict[str, list[float]]()
        for verdict in self.verdicts:
            wanted = category in (None, verdict.category) and turn in (None, verdict.turn)
            # A score is of one model; a preference names two, and what cannot be read is None.
            if wanted and verdict.models == (model,) and isinstance(verdict.value, float):
                found.setdefault(verdict.question, []).append(verdict.value)
        return {question: fmean(values) for question, values in found.items()}

    def mean_score(self, model: str, *, category: str | None = None, turn: int | None = None) -> float | None:
        """Return the mean of `scores`, in which every question counts the same; None where there are none."""
        scores = self.scores(model, category=category, turn=turn)
        return fmean(scores.values()) if scores else None

    def preferences(self, category: str | None = None) -> Preferences | None:
        """Return how the two models compare; None where no pairs were judged."""
        balance = dict[str, int]()
        for one, other in self._both_orders():
            if category in (None, one.category):
                # Preferred in one order alone is no preference: it may be that order's.
                winner = _winner(one) if _winner(one) == _winner(other) else None
                balance.setdefault(one.question, 0)
                balance[one.question] += 0 if winner is None else 1 if winner == self.models[1] else -1
        if not balance:
            return None
        won, lost = sum(each > 0 for each in balance.values()), sum(each < 0 for each in balance.values())
        share = won / (won + lost) if won + lost else None
        wins = dict(zip(self.models, (lost, won), strict=True))
        return Preferences(wins, len(balance) - won - lost, share, wilson_interval(won, won + lost))

    def order_agreement(self) -> float | None:
        """Return the share of pairs on which the judge says the same in both orders; None without pairs."""
        return _mean(_winner(one) == _winner(other) for one, other in self._both_orders())

    def first_preferred(self) -> float | None:
        """Return the share of preferences that go to the answer shown first: 0.5 of a judge without a bias."""
        return _mean(verdict.value == "first" for verdict in self._pairs() if verdict.value in ("first", "second"))

    def repeat_agreement(self) -> dict[str, float | None]:
        """Return the share of equal verdicts among all pairs of repeats: scores within 1 point, scores, preferences."""

        def agreement(scores: bool, same: Callable[[Any, Any], bool]) -> float | None:
            groups = dict[tuple[Any, ...], list[Any]]()
            for verdict in self.verdicts:
                if verdict.value is not None and (len(verdict.models) == 1) == scores:
                    groups.setdefault((verdict.question, verdict.turn, verdict.models), []).append(verdict.value)
            return _mean(same(one, other) for values in groups.values() for one, other in combinations(values, 2))

        return {
            "scores": agreement(True, lambda one, other: one == other),
            "scores_within_1": agreement(True, lambda one, other: abs(one - other) <= 1),
            "preferences": agreement(False, lambda one, other: one == other),
        }

    def _pairs(self) -> Iterator[Verdict]:
        return (verdict for verdict in self.verdicts if len(verdict.models) == 2)

    def _both_orders(self) -> Iterator[tuple[Verdict, Verdict]]:
        """Yield the two verdicts on the same answers, where both can be read."""
        waiting = dict[tuple[Any, ...], Verdict]()
        for verdict in self._pairs():
            if verdict.value is None:
                continue
            # The two orders of one pair have everything else in common.
            key = verdict.question, verdict.turn, verdict.repeat
            if key in waiting:
                yield waiting.pop(key), verdict
            else:
                waiting[key] = verdict

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it: the figures, then what they were made of."""
        categories = list(dict.fromkeys(question.category for question in self.questions))
        turns = range(max(len(question.turns) for question in self.questions))
        preferences = self.preferences()
        return {
            "scores": {
                model: {
                    "mean": self.mean_score(model),
                    "categories": {category: self.mean_score(model, category=category) for category in categories},
                    "turns": [self.mean_score(model, turn=turn) for turn in turns],
                }
                for model in self.models
            },
            "preferences": asdict(preferences) if preferences else None,
            "order_agreement": self.order_agreement(),
            "first_preferred": self.first_preferred(),
            "repeat_agreement": self.repeat_agreement(),
            "unreadable": self.unreadable,
        } | asdict(self)

    def lines(self) -> list[str]:
        """Return what people want to read first."""
        lines = [
            f"{model}: {_figure(self.mean_score(model), '.2f')} of 10 on {len(self.scores(model))} questions"
            for model in self.models
        ]
        if preferences := self.preferences():
            first, second = self.models
            low, high = preferences.interval
            lines.append(
                f"{second} is preferred on {preferences.wins[second]} questions, {first} on {preferences.wins[first]}, "
                f"neither on {preferences.ties}: {_figure(preferences.share)} of those decided "
                f"({low:.1%} to {high:.1%}); the judge says the same in both orders of "
                f"{_figure(self.order_agreement())} of the pairs"
            )
        if self.repeats > 1:
            agreement = self.repeat_agreement()
            lines.append(
                f"repeated verdicts: {_figure(agreement['scores'])} of the scores are equal, "
                f"{_figure(agreement['scores_within_1'])} within 1 point, {_figure(agreement['preferences'])} of the "
                "preferences are equal"
            )
        lines.append(
            f"{self.judge}, prompt {self.prompt_version}: {self.calls:,} calls, {self.prompt_tokens:,} tokens read, "
            f"{self.completion_tokens:,} written, {self.unreadable} verdicts that cannot be read"
        )
        return lines


def _winner(verdict: Verdict) -> str | None:
    """The preferred model; None for neither."""
    return {"first": verdict.models[0], "second": verdict.models[1]}.get(str(verdict.value))


def _mean(values: Iterable[bool]) -> float | None:
    known = list(values)
    return fmean(known) if known else None


def _figure(value: float | None, form: str = ".1%") -> str:
    return "none" if value is None else f"{value:{form}}"
