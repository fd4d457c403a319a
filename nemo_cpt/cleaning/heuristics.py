"""Rules of thumb for what is prose, by counting; their limits are published ones wherever there are any.

Sources:
    Gopher: Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A.1.1 and table A1.
    C4: Raffel et al. 2020, https://jmlr.org/papers/v21/20-074.html, section 2.2.
    FineWeb: Penedo et al. 2024, https://arxiv.org/abs/2406.17557, section 3.5 and appendix D.
    FineWeb-2: Penedo et al. 2025, https://arxiv.org/abs/2506.20920; https://github.com/huggingface/fineweb-2, configs.
    Swallow: Okazaki et al. 2024, https://arxiv.org/abs/2404.17733, section 3.3;
        https://github.com/swallow-llm/swallow-corpus, `apply_v1` of quality.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from nemo_cpt.cleaning.characters import JAPANESE, Kind
from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.repetition import character_ngrams, duplicate_shares, word_ngrams
from nemo_cpt.cleaning.rule import Check, Rule
from nemo_cpt.errors import CptError

# By n of the n-grams.
GOPHER_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
GOPHER_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
GOPHER_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_BULLETS = ("•", "●", "○", "■", "□", "◆", "◇", "・", "*", "-", "‣", "▪")
_ELLIPSES = ("...", "…", "‥")
_ENDS = (".", "'", '"', "!", "?", "。", "！", "？", "．", "」", "』", "”", "’", "…")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")


@dataclass(frozen=True)
class Length(Rule):
    """Drops what is too short to learn from, or too long to be one document.

    Attributes:
        min_characters: Of the whole text. Swallow: 400.
        max_characters: None for any.
    """

    name: ClassVar[str] = "length"

    min_characters: int | None = 200
    max_characters: int | None = None

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure the length."""
        yield Check("characters", len(document.text), self.min_characters, self.max_characters)


@dataclass(frozen=True)
class JapaneseScript(Rule):
    """Keeps what is written as Japanese prose is: a mixture of kana and kanji in which hiragana make the grammar.

    Japanese characters are hiragana, katakana, kanji, and the marks 、，。．！？. The limits are Swallow's.

    Attributes:
        min_japanese_share: Of all characters.
        min_japanese_characters: Of the whole text.
        min_hiragana_share: Of the Japanese characters; lists of names, and Chinese, have less.
        max_katakana_share: Of the Japanese characters; lists of products have more.
        min_punctuation_share: Of 、，。．！？ in the Japanese characters; no limit in Swallow.
    """

    name: ClassVar[str] = "japanese_script"

    min_japanese_share: float | None = 0.5
    min_japanese_characters: int | None = 400
    min_hiragana_share: float | None = 0.2
    max_katakana_share: float | None = 0.5
    min_punctuation_share: float | None = None

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure the scripts."""
        counts, japanese = document.counts, document.count(JAPANESE)
        yield Check("japanese_share", japanese / max(len(document.text), 1), self.min_japanese_share)
        yield Check("japanese_characters", japanese, self.min_japanese_characters)
        of = max(japanese, 1)
        yield Check("hiragana_share", counts[Kind.HIRAGANA] / of, self.min_hiragana_share)
        yield Check("katakana_share", counts[Kind.KATAKANA] / of, at_most=self.max_katakana_share)
        marks = counts[Kind.COMMA] + counts[Kind.STOP]
        yield Check("punctuation_share", marks / of, self.min_punctuation_share)


@dataclass(frozen=True)
class ChineseScript(Rule):
    """Keeps what is written as Chinese prose is: ideographs, no kana, and the words that no prose does without.

    Attributes:
        min_han_share: Of all characters.
        min_han_characters: Of the whole text.
        max_kana_share: Of kana in the letters; Japanese has more.
        min_stop_words: Different ones of `stop_words` in the text, as Gopher asks of English.
        stop_words: FineWeb-2's, in both ways of writing.
        min_punctuation_share: Of ，、。！？ in the ideographs and these marks.
    """

    name: ClassVar[str] = "chinese_script"

    min_han_share: float | None = 0.5
    min_han_characters: int | None = 100
    max_kana_share: float | None = 0.02
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = tuple("的年在月是和日了於於為有被人中为他與后後也而由")
    min_punctuation_share: float | None = 0.01

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure the scripts and look for the words."""
        counts, han = document.counts, document.counts[Kind.HAN]
        yield Check("han_share", han / max(len(document.text), 1), self.min_han_share)
        yield Check("han_characters", han, self.min_han_characters)
        kana = counts[Kind.HIRAGANA] + counts[Kind.KATAKANA]
        yield Check("kana_share", kana / max(document.letters, 1), at_most=self.max_kana_share)
        # By characters: Chinese words stand without spaces, and each of these is one character.
        found = sum(word in document.text for word in set(self.stop_words))
        yield Check("stop_words", found, self.min_stop_words)
        marks = counts[Kind.COMMA] + counts[Kind.STOP]
        yield Check("punctuation_share", marks / max(han + marks, 1), self.min_punctuation_share)


@dataclass(frozen=True)
class KoreanScript(Rule):
    """Keeps what is written as Korean prose is: Hangul, and words that end in particles and endings.

    Attributes:
        min_hangul_share: Of all characters, spaces included.
        min_hangul_characters: Of the whole text.
        min_endings: Words that end in one of `endings`, as Gopher asks for stop words in English.
        endings: Particles and endings, most of FineWeb-2's stop words: in Korean they are parts of words.
    """

    name: ClassVar[str] = "korean_script"

    min_hangul_share: float | None = 0.5
    min_hangul_characters: int | None = 150
    min_endings: int | None = 3
    endings: tuple[str, ...] = (
        "의",
        "다",
        "이",
        "는",
        "에",
        "을",
        "은",
        "를",
        "고",
        "에서",
        "가",
        "로",
        "으로",
        "와",
        "과",
    )

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure the script and look for the endings."""
        hangul = document.counts[Kind.HANGUL]
        yield Check("hangul_share", hangul / max(len(document.text), 1), self.min_hangul_share)
        yield Check("hangul_characters", hangul, self.min_hangul_characters)
        # A word at a sentence's end has its mark behind the ending.
        found = sum(word.rstrip(".,!?").endswith(self.endings) for word in document.text.split())
        yield Check("endings", found, self.min_endings)


@dataclass(frozen=True)
class Sentences(Rule):
    """Drops headings, menus and lists, which have short sentences or none, and what runs on without a full stop.

    A sentence ends at 。．！？!? or at the line's end. The limits are Swallow's, for Japanese.

    Attributes:
        min_mean_length: Characters of a sentence on average.
        max_mean_length: The same.
        max_length: Characters of the longest sentence.
        max_ellipsis_share: Of sentences that end in … or ・: what a page shows the beginning of.
    """

    name: ClassVar[str] = "sentences"

    min_mean_length: float | None = 20
    max_mean_length: float | None = 90
    max_length: int | None = 200
    max_ellipsis_share: float | None = 0.2

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure the sentences."""
        sentences = document.sentences
        lengths = list(map(len, sentences))
        mean = sum(lengths) / max(len(lengths), 1)
        yield Check("mean_sentence_length", mean, self.min_mean_length, self.max_mean_length)
        yield Check("longest_sentence", max(lengths, default=0), at_most=self.max_length)
        cut = sum(sentence.rstrip().endswith(("・", "…")) for sentence in sentences)
        yield Check("ellipsis_sentence_share", cut / max(len(sentences), 1), at_most=self.max_ellipsis_share)


@dataclass(frozen=True)
class Duplication(Rule):
    """Drops texts in which lines, paragraphs or sentences come back: menus, templates, what a crawler glued together.

    Attributes:
        max_line_share: Of lines that repeat an earlier one. Gopher and Swallow: 0.3.
        max_line_character_share: Of characters in such lines. Gopher and Swallow: 0.2.
        max_paragraph_share: Of paragraphs (parted by blank lines) that repeat an earlier one. Gopher: 0.3.
        max_paragraph_character_share: Of characters in such. Gopher: 0.2.
        max_sentence_share: Of sentences (see `sentences`) that repeat an earlier one. Swallow: 0.3.
        max_sentence_character_share: Of characters in such. Swallow: 0.2.
    """

    name: ClassVar[str] = "duplication"

    max_line_share: float | None = 0.3
    max_line_character_share: float | None = 0.2
    max_paragraph_share: float | None = 0.3
    max_paragraph_character_share: float | None = 0.2
    max_sentence_share: float | None = None
    max_sentence_character_share: float | None = None

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure lines, paragraphs and, where they have limits, sentences."""
        parts, characters = duplicate_shares(document.lines)
        yield Check("duplicate_line_share", parts, at_most=self.max_line_share)
        yield Check("duplicate_line_character_share", characters, at_most=self.max_line_character_share)
        parts, characters = duplicate_shares(document.paragraphs)
        yield Check("duplicate_paragraph_share", parts, at_most=self.max_paragraph_share)
        yield Check("duplicate_paragraph_character_share", characters, at_most=self.max_paragraph_character_share)
        if self.max_sentence_share is not None or self.max_sentence_character_share is not None:
            parts, characters = duplicate_shares(document.sentences)
            yield Check("duplicate_sentence_share", parts, at_most=self.max_sentence_share)
            yield Check("duplicate_sentence_character_share", characters, at_most=self.max_sentence_character_share)


@dataclass(frozen=True)
class Lines(Rule):
    """Drops texts whose lines are no paragraphs: lists, menus, teasers.

    Attributes:
        min_punctuated_share: Of lines that end in a mark. FineWeb: 0.12; FineWeb-2: 0.167 (Japanese), 0.106 (Chinese),
            0.062 (Korean).
        max_short_share: Of lines of `short` characters and less. FineWeb: 0.67.
        short: Characters of a short line. FineWeb: 30.
        max_bullet_share: Of lines that begin with a bullet. Gopher: 0.9.
        max_ellipsis_share: Of lines that end in an ellipsis. Gopher: 0.3.
        max_duplicate_character_share: Of characters in lines that repeat an earlier one. FineWeb: 0.01.
    """

    name: ClassVar[str] = "lines"

    min_punctuated_share: float | None = 0.12
    max_short_share: float | None = 0.67
    short: int = 30
    max_bullet_share: float | None = 0.9
    max_ellipsis_share: float | None = 0.3
    max_duplicate_character_share: float | None = 0.01

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure the lines that are not blank."""
        lines = document.lines
        of = max(len(lines), 1)
        # Blanks at a line's end are no ends of their own: many programs leave one.
        ends = [line.rstrip() for line in lines]
        punctuated = sum(line.endswith(_ENDS) for line in ends)
        yield Check("punctuated_line_share", punctuated / of, self.min_punctuated_share)
        short = sum(len(line) <= self.short for line in lines)
        yield Check("short_line_share", short / of, at_most=self.max_short_share)
        bullets = sum(line.lstrip().startswith(_BULLETS) for line in lines)
        yield Check("bullet_line_share", bullets / of, at_most=self.max_bullet_share)
        cut = sum(line.endswith(_ELLIPSES) for line in ends)
        yield Check("ellipsis_line_share", cut / of, at_most=self.max_ellipsis_share)
        _, characters = duplicate_shares(lines)
        yield Check("repeated_line_character_share", characters, at_most=self.max_duplicate_character_share)


@dataclass(frozen=True)
class _Repetition(Rule):
    """What n-grams of characters and of words have in common: limits by n, and the order of the checks."""

    max_top_share: dict[int, float] = field(default_factory=GOPHER_TOP.copy)
    max_repeated_share: dict[int, float] = field(default_factory=GOPHER_REPEATED.copy)

    def __post_init__(self) -> None:
        """Check the n.

        Raises:
            CptError: One is below 2.
        """
        super().__post_init__()
        sizes = (*self.max_top_share, *self.max_repeated_share)
        if sizes and min(sizes) < 2:
            raise CptError(f"{self.name}: n-grams of {min(sizes)} are not counted; the smallest n is 2.")

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure the n-grams, the shortest first."""
        # All n in one pass: each n's n-grams are found among those of n - 1.
        longest = max((*self.max_top_share, *self.max_repeated_share), default=1)
        for size, top, repeated in self._shares(document, longest):
            if (most := self.max_top_share.get(size)) is not None:
                yield Check(f"top_{size}gram_share", top, at_most=most)
            if (most := self.max_repeated_share.get(size)) is not None:
                yield Check(f"repeated_{size}gram_share", repeated, at_most=most)

    def _shares(self, document: Document, longest: int) -> Iterator[tuple[int, float, float]]:
        """By n: the share of the most frequent n-gram, and of repeated ones."""
        raise NotImplementedError


@dataclass(frozen=True)
class CharacterRepetition(_Repetition):
    """Drops texts that say the same again and again, by n-grams of characters: for languages without spaces.

    As Swallow counts: of the most frequent n-gram, its occurrences in all; of repeated ones, different n-grams that
    occur more than once in all different ones.

    Attributes:
        max_top_share: By n, the share of the most frequent n-gram. Gopher's numbers, as in Swallow.
        max_repeated_share: By n, the share of repeated n-grams.
    """

    name: ClassVar[str] = "character_repetition"

    def _shares(self, document: Document, longest: int) -> Iterator[tuple[int, float, float]]:
        for found in character_ngrams(document.codes, longest):
            yield found.size, found.top / max(found.total, 1), found.repeated / max(found.distinct, 1)


@dataclass(frozen=True)
class WordRepetition(_Repetition):
    """Drops texts that say the same again and again, by n-grams of words.

    Attributes:
        max_top_share: By n, the share of characters in the most frequent n-gram. Gopher, table A1.
        max_repeated_share: By n, the share of characters in n-grams that have occurred before.
    """

    name: ClassVar[str] = "word_repetition"

    def _shares(self, document: Document, longest: int) -> Iterator[tuple[int, float, float]]:
        for found in word_ngrams(document.words, longest):
            yield found.size, found.top, found.repeated


@dataclass(frozen=True)
class WordStatistics(Rule):
    """Keeps what has as many words, and such, as prose has. The limits are Gopher's, but for the last (FineWeb).

    A word is what stands between spaces and has a letter or a digit; its length is that of its letters and digits.

    Attributes:
        min_words: Of the whole text.
        max_words: The same.
        min_mean_length: Characters of a word on average.
        max_mean_length: The same.
        max_symbol_share: Of # and of ellipses, each for itself, against the words.
        min_lettered_share: Of words that have a letter.
        min_stop_words: Different ones of `stop_words` in the text.
        stop_words: Words that no prose does without.
        max_newline_share: Of line ends against the words. FineWeb: 0.3.
    """

    name: ClassVar[str] = "word_statistics"

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_length: float | None = 3
    max_mean_length: float | None = 10
    max_symbol_share: float | None = 0.1
    min_lettered_share: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = GOPHER_STOP_WORDS
    max_newline_share: float | None = 0.3

    def apply(self, document: Document) -> Iterator[Check]:
        """Measure the words."""
        text, lengths = document.text, document.words.lengths
        words = int((lengths > 0).sum())
        of = max(words, 1)
        yield Check("words", words, self.min_words, self.max_words)
        yield Check("mean_word_length", float(lengths.sum()) / of, self.min_mean_length, self.max_mean_length)
        yield Check("hash_share", text.count("#") / of, at_most=self.max_symbol_share)
        ellipses = sum(text.count(ellipsis) for ellipsis in _ELLIPSES)
        yield Check("ellipsis_share", ellipses / of, at_most=self.max_symbol_share)
        yield Check("lettered_word_share", int(document.words.lettered.sum()) / of, self.min_lettered_share)
        if self.min_stop_words is not None:
            found = len(set(text.lower().split()).intersection(self.stop_words))
            yield Check("stop_words", found, self.min_stop_words)
        yield Check("newline_share", text.count("\n") / of, at_most=self.max_newline_share)


@dataclass(frozen=True)
class Prose(Rule):
    """Drops pages that are no prose: filler, code, and what has hardly a sentence. C4's rules for pages.

    Attributes:
        max_filler: How often "lorem ipsum" occurs.
        max_curly_brackets: How many there are: of programs' code, hardly of text.
        min_sentences: Ended by . ! or ? before a space. C4: 5.
    """

    name: ClassVar[str] = "prose"

    max_filler: int | None = 0
    max_curly_brackets: int | None = None
    min_sentences: int | None = None

    def apply(self, document: Document) -> Iterator[Check]:
        """Look for what prose does not have, and count the sentences."""
        yield Check("filler", document.text.lower().count("lorem ipsum"), at_most=self.max_filler)
        if self.max_curly_brackets is not None:
            yield Check("curly_brackets", document.text.count("{"), at_most=self.max_curly_brackets)
        if self.min_sentences is not None:
            yield Check("sentences", len(_SENTENCE_END.findall(document.text)), self.min_sentences)


@dataclass(frozen=True)
class Boilerplate(Rule):
    """Removes lines that every page of a site has: notices of cookies and copyright, calls to share and subscribe.

    It removes whole lines, and drops nothing by itself: what is left of a page of nothing else is too short.

    Attributes:
        phrases: A line that holds one of them, in any case, is removed.
        longest: Characters of a line at most; a longer one is a paragraph that tells of such things.
        min_words: Fewer in a line, and it is removed. C4: 3; None where words have no spaces.
    """

    name: ClassVar[str] = "boilerplate"

    phrases: tuple[str, ...] = ()
    longest: int = 100
    min_words: int | None = None

    def apply(self, document: Document) -> Iterator[Check]:
        """Remove the lines; nothing is measured."""
        lines = document.text.split("\n")
        lowered = document.text.lower()
        # Most texts hold none of them: then no line is looked at.
        wanted = [phrase for phrase in self.phrases if phrase.lower() in lowered]
        if wanted or self.min_words:
            kept = [line for line in lines if not self._is_boilerplate(line, wanted)]
            document.changes["removed lines"] += len(lines) - len(kept)
            document.replace("\n".join(kept).strip())
        yield from ()

    def _is_boilerplate(self, line: str, wanted: list[str]) -> bool:
        # Blank lines part paragraphs: without words, and no boilerplate.
        if self.min_words and line and not line.isspace() and len(line.split(maxsplit=self.min_words)) < self.min_words:
            return True
        return len(line) <= self.longest and any(phrase.lower() in line.lower() for phrase in wanted)
