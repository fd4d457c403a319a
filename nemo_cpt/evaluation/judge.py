"""A model as the judge of others: their answers to questions of several turns, scored, and compared in pairs.

Every answer and every verdict goes into `judge.jsonl` as it comes, and what is there is not asked for again: neither an
interruption nor an endpoint that fails loses anything that was paid for.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import judge_prompts
from nemo_cpt.evaluation.journal import Journal, key_of
from nemo_cpt.evaluation.judge_prompts import ask_for_preference, ask_for_score, read_preference, read_score
from nemo_cpt.evaluation.judge_questions import JudgeQuestion
from nemo_cpt.evaluation.judge_report import JudgeReport, Verdict
from nemo_cpt.inference.endpoint import EndpointEngine
from nemo_cpt.inference.engine import Engine, Message, Prompt, Sampling

FILE = "judge.jsonl"
TEMPERATURES = {  # of answers by category, as MT-bench's (FastChat, llm_judge/common.py)
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
REPEATED_TEMPERATURE = 0.7  # of verdicts that are asked for more than once; else 0
ATTEMPTS = 3  # at a verdict that can be read
TRIAL = 8  # verdicts to ask for before the others are paid for
MOST_UNREADABLE = 0.1
BYTES_PER_TOKEN = 3  # of UTF-8, about, and rather too few: a Japanese character, or three Latin letters

Answers = dict[str, list[str]]  # of a model, by question


@dataclass(frozen=True)
class Cost:
    """What remains to be asked for.

    Attributes:
        answers: of the models.
        verdicts: of the judge.
        prompt_tokens: that the judge reads, about.
        completion_tokens: that the judge writes, at most.
    """

    answers: int
    verdicts: int
    prompt_tokens: int
    completion_tokens: int

    def __str__(self) -> str:
        answers = f"{self.answers:,} answers and " if self.answers else ""
        return (
            f"{answers}{self.verdicts:,} verdicts to ask for; the judge reads about "
            f"{self.prompt_tokens:,} tokens and writes at most {self.completion_tokens:,}"
        )


@dataclass(frozen=True)
class _Ask:
    """A verdict to ask for: a score of one model, or a preference between two, the first shown first."""

    question: JudgeQuestion
    turn: int
    models: tuple[str, ...]
    repeat: int
    messages: list[Message]

    def verdict(self, reply: str) -> Verdict:
        value = read_score(reply) if len(self.models) == 1 else read_preference(reply)
        return Verdict(self.question.id, self.question.category, self.turn, self.models, self.repeat, value, reply)


def expected_cost(
    questions: Sequence[JudgeQuestion],
    models: int,
    *,
    compare: bool | None = None,
    repeats: int = 1,
    answer_tokens: int = 1024,
    verdict_tokens: int = 1024,
) -> Cost:
    """Count what `run_judge` with the same arguments asks for from its beginning, if all answers are of full length.

    Args:
        questions: as for `run_judge`.
        models: how many are judged.
        compare: as for `run_judge`.
        repeats: as for `run_judge`.
        answer_tokens: as for `run_judge`.
        verdict_tokens: as for `run_judge`.

    Raises:
        CptError: it is neither one model nor two, there is nothing to compare or to ask, or `repeats` is below 1.
    """
    names = [str(number) for number in range(models)]
    _check(names, questions, compare, repeats)
    # Answers of the greatest length, so that the cost is an upper bound.
    full = "x" * answer_tokens * BYTES_PER_TOKEN
    answers = {name: {question.id: [full] * len(question.turns) for question in questions} for name in names}
    asks = list(_asks(questions, answers, _compares(names, compare), repeats))
    return _cost(asks, verdict_tokens, answers=models * sum(len(question.turns) for question in questions))


@checked
def run_judge(
    models: Mapping[str, Engine],
    judge: EndpointEngine,
    questions: Sequence[JudgeQuestion],
    folder: str | os.PathLike[str],
    *,
    repeats: int = 1,
    compare: bool | None = None,
    answer_tokens: int = 1024,
    verdict_tokens: int = 1024,
    seed: int = 0,
    identities: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> JudgeReport:
    """Let models answer questions, and a judge score every answer and compare those of two models, in both orders.

    Args:
        models: one, or two to compare, by the names that the report gives them. One without a chat template is asked in
            plain text: the turns and answers so far, one below the other.
        judge: the judge's endpoint.
        questions: what the models are asked, `judge_questions()` for the shipped ones.
        folder: where `judge.jsonl` is kept; made if it is not there.
        repeats: how often each verdict is asked for, with another seed; more than once at `REPEATED_TEMPERATURE`.
        compare: whether to compare pairs; by default where there are two models.
        answer_tokens: the most of an answer.
        verdict_tokens: the most of a verdict with its explanation.
        seed: of the models' answers and the judge's verdicts.
        identities: by model, what changes when its weights do, such as a hash; its engine's name by default.
        say: told what is to be asked, before it is.
        progress: told what is being asked for, how much of it is done, and how much there is.

    Raises:
        CptError: the models cannot be compared, a model cannot be asked, or the endpoint is down or gives verdicts that
            cannot be read; run it again to go on.
    """
    _check(list(models), questions, compare, repeats)
    identities = {name: engine.name for name, engine in models.items()} | dict(identities or {})
    with Journal(Path(folder) / FILE) as journal:
        answers = dict[str, Answers]()
        for name, engine in models.items():
            asker = _Asker(engine, identities[name], journal, answer_tokens, seed)
            answers[name] = asker.answers(questions, partial(progress, name))
        asks = list(_asks(questions, answers, _compares(list(models), compare), repeats))
        # At temperature 0 every repeat would be the same verdict.
        sampling = Sampling(max_tokens=verdict_tokens, temperature=REPEATED_TEMPERATURE if repeats > 1 else 0.0)
        bench = _Bench(judge, journal, sampling, seed)
        say(f"{judge.name}: {_cost(bench.open(asks), verdict_tokens)}")
        verdicts = bench.verdicts(asks, lambda done: progress("verdicts", done, len(asks)))
    return JudgeReport(
        judge=judge.model,
        models=tuple(models),
        prompt_version=judge_prompts.VERSION,
        prompts={"score": judge_prompts.SCORE, "compare": judge_prompts.COMPARE},
        repeats=repeats,
        temperature=sampling.temperature,
        questions=tuple(questions),
        answers=answers,
        verdicts=tuple(verdicts),
        calls=bench.calls,
        prompt_tokens=bench.prompt_tokens,
        completion_tokens=bench.completion_tokens,
    )


def _check(models: Sequence[str], questions: Sequence[JudgeQuestion], compare: bool | None, repeats: int) -> None:
    if len(models) not in (1, 2):
        raise CptError(f"a judge scores one model or compares two; there are {len(models)}: {', '.join(models)}")
    if compare and len(models) == 1:
        raise CptError(f"there is only {models[0]}, and nothing to compare it with: name another model")
    if repeats < 1:
        raise CptError(f"repeats is {repeats}; it must be 1 or more")
    if not questions:
        raise CptError("there are no questions to judge the answers to")


def _compares(models: Sequence[str], compare: bool | None) -> bool:
    return len(models) == 2 if compare is None else compare


def _asks(
    questions: Sequence[JudgeQuestion], answers: Mapping[str, Answers], compare: bool, repeats: int
) -> Iterator[_Ask]:
    names = tuple(answers)
    for repeat in range(repeats):
        for question in questions:
            for turn in range(len(question.turns)):
                for name in names:
                    messages = ask_for_score(question, answers[name][question.id], turn)
                    yield _Ask(question, turn, (name,), repeat, messages)
                # In both orders: judges prefer what they see first (arXiv 2306.05685).
                for first, second in (names, names[::-1]) if compare else ():
                    texts = answers[first][question.id], answers[second][question.id]
                    yield _Ask(question, turn, (first, second), repeat, ask_for_preference(question, *texts, turn))


def _cost(asks: Iterable[_Ask], verdict_tokens: int, answers: int = 0) -> Cost:
    read = [sum(len(each["content"].encode()) for each in ask.messages) // BYTES_PER_TOKEN for ask in asks]
    return Cost(answers, len(read), sum(read), len(read) * verdict_tokens)


class _Asker:
    """Asks one model, turn by turn, for what the journal does not have."""

    def __init__(self, engine: Engine, identity: str, journal: Journal, tokens: int, seed: int) -> None:
        self._engine, self._identity, self._journal = engine, identity, journal
        self._tokens, self._seed = tokens, seed

    def answers(self, questions: Sequence[JudgeQuestion], progress: Callable[[int, int], None]) -> Answers:
        found: Answers = {question.id: [] for question in questions}
        done, total = 0, sum(len(question.turns) for question in questions)
        by_temperature = sorted(questions, key=_temperature)
        # Turn by turn: a second question is asked with the answer to the first.
        for turn in range(max(len(question.turns) for question in questions)):
            # One batch has one temperature.
            for temperature, group in groupby(by_temperature, _temperature):
                sampling = Sampling(max_tokens=self._tokens, temperature=temperature, seed=self._seed)
                asked = [question for question in group if turn < len(question.turns)]
                for question, text in self._turn(asked, turn, found, sampling):
                    found[question.id].append(text)
                    done += 1
                    progress(done, total)
        return found

    def _turn(
        self, questions: list[JudgeQuestion], turn: int, found: Answers, sampling: Sampling
    ) -> Iterator[tuple[JudgeQuestion, str]]:
        missing = list[tuple[JudgeQuestion, Prompt, str]]()
        for question in questions:
            prompt = self._prompt(question.turns[: turn + 1], found[question.id])
            key = key_of("answer", self._identity, prompt, sampling)
            if (record := self._journal.get(key)) is not None:
                yield question, record["text"]
            else:
                missing.append((question, prompt, key))
        # In the order in which they end: each is kept at once, so that a killed run has it.
        for index, reply in self._engine.generate((prompt for _, prompt, _ in missing), sampling):
            question, _, key = missing[index]
            record = {"kind": "answer", "model": self._identity, "question": question.id, "turn": turn}
            self._journal.keep(key, record | {"text": reply.text, "finish_reason": reply.finish_reason})
            yield question, reply.text

    def _prompt(self, turns: Sequence[str], answers: Sequence[str]) -> Prompt:
        if not getattr(self._engine, "has_chat_template", True):
            said = [text for pair in zip(turns, answers, strict=False) for text in pair]
            return "\n\n".join([*said, turns[-1]]) + "\n\n"
        messages = list[Message]()
        for asked, answer in zip(turns, answers, strict=False):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": turns[-1]}]


def _temperature(question: JudgeQuestion) -> float:
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


class _Bench:
    """Asks the judge for what the journal does not have, and counts what its replies took, in earlier runs too."""

    def __init__(self, judge: EndpointEngine, journal: Journal, sampling: Sampling, seed: int) -> None:
        self._judge, self._journal, self._sampling, self._seed = judge, journal, sampling, seed
        self._used = set[str]()
        self.prompt_tokens = self.completion_tokens = 0

    @property
    def calls(self) -> int:
        """Replies of the judge that were used."""
        return len(self._used)

    def open(self, asks: Iterable[_Ask]) -> list[_Ask]:
        """Return those that the judge has yet to be asked, each once."""
        # By the first attempt: further ones are for replies that nobody could read, which are not foreseen.
        keyed = {self._key(ask, 0): ask for ask in asks}
        return [ask for key, ask in keyed.items() if self._journal.get(key) is None]

    def verdicts(self, asks: Sequence[_Ask], progress: Callable[[int], None]) -> list[Verdict]:
        """Return the verdicts in the order of `asks`; those that cannot be read have no value.

        Raises:
            CptError: the endpoint fails, or too many verdicts cannot be read.
        """
        # A judge that does not keep to the form is found out for the price of a few verdicts.
        trial = self._readable(asks[:TRIAL], progress, 0)
        # Only where not one can be read: of eight, some may fail by chance.
        _check_readable(trial, self._judge.name, most=1 - 1 / len(trial), path=self._journal.path)
        rest = self._readable(asks[TRIAL:], progress, len(trial))
        _check_readable([*trial, *rest], self._judge.name, MOST_UNREADABLE, self._journal.path)
        return [*trial, *rest]

    def _readable(self, asks: Sequence[_Ask], progress: Callable[[int], None], before: int) -> list[Verdict]:
        """Ask again for what cannot be read, up to ATTEMPTS times in all."""
        found = dict[int, Verdict]()
        for attempt in range(ATTEMPTS):
            unread = [index for index in range(len(asks)) if index not in found or found[index].value is None]
            # Each repeat has a seed of its own, and so a batch.
            for _, same in groupby(unread, lambda index: asks[index].repeat):
                for index, verdict in self._attempt(asks, list(same), attempt):
                    found[index] = verdict
                    progress(before + len(found))
        return [found[index] for index in range(len(asks))]

    def _attempt(self, asks: Sequence[_Ask], indices: list[int], attempt: int) -> Iterator[tuple[int, Verdict]]:
        missing = dict[str, list[int]]()  # equal answers are judged once
        for index in indices:
            key = self._key(asks[index], attempt)
            record = self._journal.get(key)
            if record is None:
                missing.setdefault(key, []).append(index)
            else:
                yield index, asks[index].verdict(self._counted(key, record))
        if not missing:
            return
        keys, places = list(missing), list(missing.values())
        # All of one repeat (see `_readable`), and so of one seed.
        sampling = self._draw(asks[indices[0]].repeat, attempt)
        prompts = (asks[place[0]].messages for place in places)
        for number, reply in self._judge.generate(prompts, sampling):
            ask = asks[places[number][0]]
            record = {
                "kind": "verdict",
                "judge": self._judge.model,
                "question": ask.question.id,
                "turn": ask.turn,
                "models": ask.models,
                "repeat": ask.repeat,
                "attempt": attempt,
                "text": reply.text,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
            }
            self._journal.keep(keys[number], record)
            text = self._counted(keys[number], record)
            for index in places[number]:
                yield index, asks[index].verdict(text)

    def _counted(self, key: str, record: dict[str, Any]) -> str:
        if key not in self._used:
            # Once a key: equal answers share a reply, which was paid for once.
            self._used.add(key)
            self.prompt_tokens += record["prompt_tokens"]
            self.completion_tokens += record["completion_tokens"]
        return str(record["text"])

    def _draw(self, repeat: int, attempt: int) -> Sampling:
        return Sampling(
            max_tokens=self._sampling.max_tokens,
            temperature=self._sampling.temperature,
            # Distinct for every repeat and attempt, or the same reply would come again.
            seed=self._seed + repeat * ATTEMPTS + attempt,
        )

    def _key(self, ask: _Ask, attempt: int) -> str:
        return key_of("verdict", self._judge.model, ask.messages, self._draw(ask.repeat, attempt))


def _check_readable(verdicts: Sequence[Verdict], judge: str, most: float, path: Path) -> None:
    unreadable = [verdict for verdict in verdicts if verdict.value is None]
    if len(unreadable) > most * len(verdicts):
        raise CptError(
            f"{len(unreadable)} of {len(verdicts)} verdicts of {judge} cannot be read after {ATTEMPTS} attempts each; "
            f"one is {unreadable[0].reply[-200:]!r}. Take a judge that keeps to the form that it is asked for ([[5]], "
            f"[[A]]); its replies are in {path}"
        )
