"""In which language a text is, where its script alone does not tell."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.rule import Check, Rule
from nemo_cpt.errors import CptError
from nemo_cpt.installed import extra

_SMALL_WORD = re.compile(r"(?<![^\s(])[^\W\d_A-Z]+(?![^\s,.;:!?)])")
# Those that a web page in Latin letters is most likely to be in; more make lingua slower, not better.
RIVALS = ("de", "fr", "es", "it", "pt", "nl", "pl", "sv", "da", "ro", "cs", "tr", "id", "vi", "fi", "hu")


@dataclass(frozen=True)
class Language(Rule):
    """Keeps texts in a language, as lingua tells it from the letters.

    Japanese, Chinese and Korean are told by their scripts, and have rules for these instead.

    It reads the words in small letters of a part of the text, half from its beginning and half from its middle: names,
    of which an encyclopedia is full, are of no language. A text that fails by these is read once more, with its names
    and four times as far.

    Attributes:
        language: ISO 639-1 code, such as `en`.
        min_score: lingua's confidence, between 0 and 1. FineWeb (fastText): 0.65.
        characters: Of the text that are read.
        rivals: Languages that it may be in instead.
    """

    name: ClassVar[str] = "language"

    language: str = "en"
    min_score: float | None = 0.65
    characters: int = 150
    rivals: tuple[str, ...] = RIVALS

    def load(self) -> None:
        """Load lingua's models of the languages.

        Raises:
            CptError: It is not installed, or does not know a language.
        """
        _detector(self.language, self.rivals)

    def apply(self, document: Document) -> Iterator[Check]:
        """Ask lingua."""
        detector, language = _detector(self.language, self.rivals)
        # More is looked at than is read: names and marks fall away.
        small = " ".join(_SMALL_WORD.findall(_sample(document.text, 2 * self.characters)))[: self.characters]
        score = detector.compute_language_confidence(small, language)
        if self.min_score is not None and score < self.min_score:
            score = detector.compute_language_confidence(_sample(document.text, 4 * self.characters), language)
        # lingua adds up in any order: the last digits of its answer differ from run to run.
        yield Check("language_score", round(score, 4), self.min_score)


def _sample(text: str, characters: int) -> str:
    # From the middle too: a menu or a notice in another language stands at the top.
    half = characters // 2
    return text if len(text) <= characters else f"{text[:half]} {text[len(text) // 2 :][:half]}"


@cache
def _detector(language: str, rivals: tuple[str, ...]) -> tuple[Any, Any]:
    try:
        from lingua import IsoCode639_1, Language, LanguageDetectorBuilder
    except ImportError as error:
        raise CptError(
            f"languages in Latin letters are told apart by lingua, which is not installed: {extra('clean')}"
        ) from error
    try:
        codes = {code: IsoCode639_1.from_str(code.upper()) for code in (language, *rivals)}
    except ValueError as error:
        raise CptError(f"language: lingua knows no such language: {error}") from None
    # Trigrams alone: the sample is long enough, and the other models take 1 GB.
    builder = LanguageDetectorBuilder.from_iso_codes_639_1(*set(codes.values())).with_low_accuracy_mode()
    return builder.with_preloaded_language_models().build(), Language.from_iso_code_639_1(codes[language])
