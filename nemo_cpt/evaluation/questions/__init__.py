"""Questions that come with the package, so that an evaluation runs offline. Written for it, dedicated to the public
domain (CC0 1.0): everyday life, facts, instructions; none asks for code or for another language than its own."""

from dataclasses import dataclass
from importlib.resources import files

import orjson

from nemo_cpt.errors import CptError

SHIPPED = ("ja", "zh-tw", "ko", "en")


@dataclass(frozen=True)
class Question:
    """A question in a language.

    Attributes:
        id: its name, such as `ja-001`.
        category: what it is about.
        prompt: its text.
        language: as `evaluation.language.KNOWN` names it.
    """

    id: str
    category: str
    prompt: str
    language: str


def shipped_questions(language: str) -> list[Question]:
    """Return the questions in a language: 210 in Japanese, 100 in Traditional Chinese and Korean, 50 in English.

    Raises:
        CptError: none are shipped in this language.
    """
    if language not in SHIPPED:
        raise CptError(
            f"no questions are shipped in {language!r}; there are some in {', '.join(SHIPPED)}. Give a file of your "
            'own, one {"prompt": ...} a line.'
        )
    return [Question(**orjson.loads(line), language=language) for line in shipped_file(language).splitlines()]


def shipped_file(name: str) -> bytes:
    """Return the content of `NAME.jsonl` beside this module."""
    return (files(__name__) / f"{name}.jsonl").read_bytes()
