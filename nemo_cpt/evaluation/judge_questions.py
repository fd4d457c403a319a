"""Questions of several turns for a judge, in MT-bench's format (arXiv 2306.05685): the shipped ones, or a file's."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.questions import shipped_file

SHIPPED = ("ja",)
EXAMPLE = '{"question_id": 1, "category": "math", "turns": ["2+3?", "And doubled?"], "reference": ["5", "10"]}'


@dataclass(frozen=True)
class JudgeQuestion:
    """A conversation's questions.

    Attributes:
        id: its name.
        category: one of MT-bench's eight, or the file's own.
        turns: what the user asks, one after the other.
        references: right answers to the turns; empty where there is not one right answer.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


def judge_questions(path: str | os.PathLike[str] | None = None, language: str = "ja") -> list[JudgeQuestion]:
    """Return the questions of a file, or the 80 Japanese ones that ship (10 in each of MT-bench's categories; CC0 1.0).

    Args:
        path: JSON lines with `question_id`, `category`, `turns` and, where there is a right answer, `reference`.
        language: of the shipped questions.

    Raises:
        CptError: there is no such file, a line of it is not like `EXAMPLE`, or none are shipped in the language.
    """
    if path is None:
        if language not in SHIPPED:
            raise CptError(
                f"no questions for a judge are shipped in {language!r}, only in {', '.join(SHIPPED)}. Give a file of "
                f"your own with lines such as {EXAMPLE}"
            )
        return _parse(shipped_file(f"judge-{language}"), f"judge-{language}.jsonl")
    try:
        return _parse(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise CptError(f"cannot read {path}: {error.strerror}") from error


def _parse(content: bytes, name: str) -> list[JudgeQuestion]:
    questions = dict[str, JudgeQuestion]()
    # Editors on Windows begin files with a mark of UTF-8.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            question = _question(orjson.loads(line))
        except ValueError as error:
            raise CptError(f"{name}, line {number} is no question ({error}); one is like {EXAMPLE}") from error
        if question.id in questions:
            raise CptError(f"{name}, line {number}: the question_id {question.id} is there twice")
        questions[question.id] = question
    if not questions:
        raise CptError(f"{name} has no questions; one is like {EXAMPLE}")
    return list(questions.values())


def _question(entry: Any) -> JudgeQuestion:
    if not isinstance(entry, dict):
        raise ValueError("it is no object")
    turns, references = entry.get("turns"), entry.get("reference") or []
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("turns are not a list of texts")
    if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
        raise ValueError("reference is not a list of texts")
    if len(references) > len(turns):
        raise ValueError(f"there are {len(references)} references to {len(turns)} turns")
    identity, category = entry.get("question_id"), entry.get("category")
    if isinstance(identity, bool) or not isinstance(identity, int | str) or not isinstance(category, str):
        raise ValueError("question_id or category is missing")
    return JudgeQuestion(str(identity), category, tuple(turns), tuple(references))
