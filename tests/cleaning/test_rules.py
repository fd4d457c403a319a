"""Each rule keeps prose and drops what it is there for; rules are the same as objects and as YAML."""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.cleaning import examine, read_rules, rules_for
from nemo_cpt.cleaning.contamination import Contamination
from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.duplicates import Duplicates
from nemo_cpt.cleaning.heuristics import Boilerplate, CharacterRepetition, Duplication, Length, Lines, WordRepetition
from nemo_cpt.cleaning.language import Language
from nemo_cpt.cleaning.masking import Masking
from nemo_cpt.cleaning.repetition import character_ngrams, word_ngrams
from nemo_cpt.cleaning.rule import Rule
from nemo_cpt.cleaning.rules import RULES, Rules
from nemo_cpt.cleaning.tallies import bin_edge, histogram
from nemo_cpt.errors import CptError
from tests.cleaning.conftest import CHINESE, KOREAN

LANGUAGES = ("ja", "en", "zh", "ko")
MORE_THAN_WHOLE = ("hash_share", "ellipsis_share", "newline_share")  # against the words, which may be fewer
STOP_WORDS = r"(?i)\b(the|be|to|of|and|that|have|with)\b"
CHINESE_STOP_WORDS = "的年在月是和日了於于為有被人中为他與后後也而由"


def failed(text: str, language: str) -> str:
    found = examine(text, rules_for(language)).failed
    return "" if found is None else f"{found[0]}.{found[1].measure}"


def test_prose_is_kept(japanese: list[str], english: list[str]) -> None:
    assert Counter(failed(text, "ja") for text in japanese)[""] >= 0.95 * len(japanese)
    assert Counter(failed(text, "en") for text in english)[""] >= 0.95 * len(english)
    assert failed(CHINESE, "zh") == ""
    assert failed(KOREAN, "ko") == ""


def test_languages_are_told_apart(japanese: list[str], english: list[str]) -> None:
    texts = {"ja": "\n".join(japanese[:3]), "en": "\n".join(english[:3]), "zh": CHINESE * 2, "ko": KOREAN * 2}
    for language in LANGUAGES:
        for other, text in texts.items():
            assert (
                not failed(text, language).startswith(("japanese", "chinese", "korean", "language"))
                or other != language
            )
            assert other == language or failed(text, language)
    german = "Die Bibliothek wurde vor dreißig Jahren gebaut, als die Felder noch bis an die Stadt reichten. " * 8
    assert failed(german, "en") == "language.language_score"


def lines(count: int, words: int = 6) -> list[str]:
    """English lines, no two alike."""
    noise = random.Random(1)
    chosen = [
        "river",
        "stone",
        "garden",
        "winter",
        "letter",
        "market",
        "harbour",
        "teacher",
        "window",
        "engine",
        "forest",
        "morning",
    ]
    return [f"The {' '.join(noise.choices(chosen, k=words))} was not with {each} of them." for each in range(count)]


@pytest.mark.parametrize(
    ("language", "reason", "make"),
    [
        ("ja", "repair.unreadable_share", lambda text: text.replace("。", "\ufffd。")),
        ("ja", "length.characters", lambda text: text[:200]),
        ("ja", "japanese_script.japanese_share", lambda text: text + "ABC 123 " * 400),
        ("ja", "japanese_script.japanese_characters", lambda text: text[:250] + "abc defg " * 20),
        ("ja", "japanese_script.hiragana_share", lambda text: re.sub("[ぁ-ん]", "", text) * 3),
        ("ja", "japanese_script.katakana_share", lambda text: text + "アイウエオカキクケコ。" * 200),
        ("ja", "sentences.mean_sentence_length", lambda text: re.sub("(.{9})", r"\1。", text)),
        ("ja", "sentences.longest_sentence", lambda text: text + "これはとても長い文で、" * 20),
        ("ja", "sentences.ellipsis_sentence_share", lambda text: text.replace("。", "…\n")),
        ("ja", "duplication.duplicate_line_share", lambda text: text + "\n同じことがまた書いてあるのです。" * 20),
        ("ja", "character_repetition.repeated_5gram_share", lambda text: re.sub("([^。]+)。", r"\1。\1、と。", text)),
        ("ja", "prose.filler", lambda text: text + "Lorem ipsum dolor sit amet."),
        ("en", "word_statistics.words", lambda text: "\n".join(lines(3, 8))),
        ("en", "word_statistics.mean_word_length", lambda text: text.replace(" ", " a ")),
        ("en", "word_statistics.hash_share", lambda text: text.replace(" ", " # ")),
        ("en", "word_statistics.lettered_word_share", lambda text: re.sub(" ", " 12345 ", text)),
        ("en", "word_statistics.stop_words", lambda text: re.sub(STOP_WORDS, "thus", text)),
        ("en", "prose.curly_brackets", lambda text: text + " function() { return; }"),
        ("en", "prose.sentences", lambda text: re.sub("[.?!]", ",", text)),
        ("en", "lines.punctuated_line_share", lambda text: "\n".join(lines(40)).replace(".", "") + " A. B. C. D. E. F"),
        ("en", "lines.short_line_share", lambda text: text + "".join(f"\nIt is {n}." for n in range(60))),
        ("en", "lines.bullet_line_share", lambda text: "\n".join(f"* {line}" for line in lines(40))),
        ("en", "lines.ellipsis_line_share", lambda text: "\n".join(lines(9)) + " So...\n" + " So...\n".join(lines(9))),
        ("en", "lines.repeated_line_character_share", lambda text: "\n".join([*lines(30), *lines(3)])),
        ("en", "word_repetition.repeated_5gram_share", lambda text: " ".join(line + line for line in lines(30))),
        ("zh", "chinese_script.kana_share", lambda text: CHINESE + "これはとても長い文である。" * 4),
        ("zh", "chinese_script.stop_words", lambda text: re.sub(f"[{CHINESE_STOP_WORDS}]", "图", CHINESE)),
        ("zh", "chinese_script.punctuation_share", lambda text: re.sub("[，。、]", "书", CHINESE)),
        ("ko", "korean_script.hangul_share", lambda text: KOREAN + "ABC 123 " * 200),
        ("ko", "korean_script.endings", lambda text: re.sub("[의다이는에을은를고가로와과]", "문", KOREAN)),
    ],
)  # fmt: skip
def test_each_drops_what_it_is_for(language: str, reason: str, make, japanese: list[str], english: list[str]) -> None:
    # Some of the texts are dropped by a rule that comes before, whatever is done to them.
    text = "\n\n".join((english if language == "en" else japanese)[:2])
    assert failed(make(text), language) == reason


def test_boilerplate_is_removed_and_counted(japanese: list[str]) -> None:
    text = japanese[0]
    page = f"この記事をシェア\n{text}\n関連記事はこちら\n無断転載を禁じます。"
    found = examine(page, rules_for("ja"))
    assert found.document.text == text.strip()
    assert found.document.changes["removed lines"] == 3
    told = "利用規約とは何か、という話である。" * 8
    assert examine(f"{text}\n{told}", Rules("ja", (Boilerplate(("利用規約",)),))).document.text.endswith(told)


def test_paragraphs_are_parted_by_any_number_of_blank_lines() -> None:
    """As a removed line leaves them: what lies between two blank lines is no paragraph that comes back."""
    page = "\n\n".join(each for line in lines(12) for each in (line, "Read more"))
    found = examine(page, rules_for("en"), to_the_end=True)
    assert "Read more" not in found.document.text
    values = {check.measure: check.value for _, check in found.checks}
    assert (values["duplicate_paragraph_share"], values["duplicate_paragraph_character_share"]) == (0, 0)
    for gap in ("\n\n", "\n\n\n", "\n \t\n\n"):
        document = Document(gap.join(["one two", "three", "one two", "four"]))
        values = {check.measure: check.value for check in Duplication().apply(document)}
        assert values["duplicate_paragraph_share"] == 1 / 4
        assert values["duplicate_paragraph_character_share"] == 7 / 23


def test_a_blank_behind_a_line_does_not_hide_its_end() -> None:
    values = {check.measure: check.value for check in Lines().apply(Document("One. \nTwo...\u3000\nthree"))}
    assert (values["punctuated_line_share"], values["ellipsis_line_share"]) == (2 / 3, 1 / 3)


@pytest.mark.parametrize("language", LANGUAGES)
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_can_be_examined(language: str, text: str) -> None:
    found = examine(text, rules_for(language), to_the_end=True)
    for _, check in found.checks:
        assert check.value >= 0
        assert not check.measure.endswith("_share") or check.value <= 1 or check.measure in MORE_THAN_WHOLE, check
    first = examine(text, rules_for(language))
    assert first.failed == found.failed


def ngrams_by_hand(items: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(items[start : start + n]) for start in range(len(items) - n + 1))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="あいう漢字𠮟a \n", max_size=120))
def test_ngrams_of_characters_are_counted_exactly(text: str) -> None:
    for found in character_ngrams(Document(text).codes, 10):
        counts = ngrams_by_hand(list(text), found.size)
        repeated = sum(count > 1 for count in counts.values())
        expected = (sum(counts.values()), len(counts), repeated, max(counts.values(), default=0))
        assert found[1:] == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "12", "été"]), max_size=60))
def test_ngrams_of_words_are_measured_exactly(words: list[str]) -> None:
    whole = max(sum(map(len, words)), 1)
    for found in word_ngrams(Document(" ".join(words)).words, 10):
        counts, covered, seen = ngrams_by_hand(words, found.size), set[int](), set[tuple[str, ...]]()
        for start in range(len(words) - found.size + 1):
            gram = tuple(words[start : start + found.size])
            covered |= set(range(start, start + found.size)) if gram in seen else set()
            seen.add(gram)
        most = max(counts.values(), default=0)
        tops = [most * sum(map(len, gram)) for gram, count in counts.items() if count == most]
        assert found.top == pytest.approx(min(max(tops) / whole, 1) if most > 1 else 0)
        assert found.repeated == pytest.approx(sum(len(words[place]) for place in covered) / whole)


@pytest.mark.parametrize("language", LANGUAGES)
def test_rules_come_back_from_yaml(tmp_path: Path, language: str) -> None:
    rules = rules_for(language).without_contamination_of(("eval.jsonl",))
    (tmp_path / "rules.yaml").write_text(rules.to_yaml(), "utf-8")
    assert read_rules(tmp_path / "rules.yaml") == rules


def test_limits_are_changed_by_name() -> None:
    rules = rules_for("ja").with_limits(length={"min_characters": 7}, prose=None, duplicates={"near": 0.7})
    assert [rule.name for rule in rules.rules] == [rule.name for rule in rules_for("ja").rules if rule.name != "prose"]
    assert next(rule for rule in rules.rules if isinstance(rule, Length)) == Length(min_characters=7)
    assert rules.duplicates == Duplicates(near=0.7)
    assert rules_for("ja").with_limits() == rules_for("ja")
    assert rules_for("ja").with_limits(duplicates=None).duplicates == Duplicates(exact=False, near=None)
    for limits, message in (({"words": {}}, "no 'words'"), ({"length": {"max": 3}}, r"\(length\): there is no 'max'")):
        with pytest.raises(CptError, match=message):
            rules_for("ja").with_limits(**limits)


def test_further_evaluation_sets_join_those_of_the_rules() -> None:
    rules = rules_for("ja").without_contamination_of(("a",)).without_contamination_of(("b",))
    assert [rule.files for rule in rules.rules if isinstance(rule, Contamination)] == [("a", "b")]


def test_every_rule_is_documented_and_named() -> None:
    for name, rule in RULES.items():
        assert rule.name == name
        assert all(field in str(rule.__doc__) for field in [each.name for each in fields(rule)]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": [{"rule": "lenght"}]}, r"no rule 'lenght' \(did you mean length\?\)"),
        ({"rules": [{"rule": "length", "min_chars": 3}]}, r"rule 1 \(length\): there is no 'min_chars' \(did you mean"),
        (
            {"rules": [{"rule": "length", "min_characters": "many"}]},
            "min_characters='many': give a whole number",
        ),
        ({"rules": [{"rule": "length", "min_characters": True}]}, "min_characters=True: give a whole number or None"),
        ({"rules": [{"rule": "length", "min_characters": -5}]}, "min_characters: -5 is below 0"),
        ({"rules": [{"rule": "word_repetition", "max_top_share": {2: -0.2}}]}, "max_top_share: -0.2 is below 0"),
        ({"rules": [{"rule": "repair", "form": "NFD"}]}, "form='NFD': give 'NFC' or 'NFKC' or 'none'"),
        (
            {"rules": [{"rule": "word_repetition", "max_top_share": {"two": 0.2}}]},
            "max_top_share='two': give a",
        ),
        ({"rules": ["length"]}, "'length' names no rule"),
        ({"duplicates": {"near": 1.5}}, "near is 1.5"),
        ({"duplicate": {}}, r"no 'duplicate' \(did you mean duplicates\?\)"),
        ({"language": None}, "language is None"),
        ({"rules": None}, "no list of rules"),
    ],
)
def test_mistakes_in_yaml_are_named(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules_for("ja").as_dict() | change), "utf-8")
    with pytest.raises(CptError, match=message):
        read_rules(tmp_path / "rules.yaml")


def test_paths_and_numpys_numbers_are_plain_ones() -> None:
    assert Contamination(files=(Path("eval.jsonl"),), words=np.int64(13)).files == ("eval.jsonl",)
    assert Lines(max_bullet_share=np.float32(0.5)).max_bullet_share == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Masking(countries=("jp", "xx")), "no numbers are known of xx; of jp, us, cn, kr"),
        (lambda: CharacterRepetition(max_top_share={1: 0.1}), "character_repetition: n-grams of 1 are not counted"),
        (lambda: WordRepetition(max_repeated_share={0: 0.1}), "word_repetition: n-grams of 0 are not counted"),
        (lambda: Contamination(files=("no.jsonl",), words=1), "n-grams of 1 occur everywhere"),
        (lambda: Length(min_characters=-5), "min_characters: -5 is below 0"),
        (lambda: Length(min_characters="5"), "min_characters='5': give a whole number or None: min_characters=5"),
        (lambda: Length(min_characters=500, max_characters=100), "min_characters: 500 is above max_characters, 100"),
        (lambda: Lines(max_bullet_share=90), "max_bullet_share: 90 is above 1, which no share can be"),
        (lambda: WordRepetition(max_top_share={2: 20}), "max_top_share: 20 is above 1"),
        (lambda: Duplicates(near=80), "near is 80"),
        (lambda: Duplicates(near=0.3), "near is 0.3; it must lie between 0.5 and 1"),
    ],
)
def test_limits_that_cannot_be_meant_are_refused_in_python_too(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(CptError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Language("xx"), "lingua knows no such language"),
        (Contamination(files=("no.jsonl",)), "There is no input no.jsonl"),
    ],
)
def test_what_cannot_work_is_told_before_the_first_document(rule: Rule, message: str) -> None:
    with pytest.raises(CptError, match=message):
        Rules("ja", (rule,)).load()


def test_what_is_no_yaml_or_no_language(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("rules: [", "utf-8")
    with pytest.raises(CptError, match="cannot be read as YAML"):
        read_rules(tmp_path / "rules.yaml")
    with pytest.raises(CptError, match="no rules for the language 'xx'; there are for ja, en, zh, ko"):
        rules_for("xx")


def test_a_histogram_shows_where_its_values_are() -> None:
    for measure, value in (
        ("prose.filler", 0),
        ("length.characters", 1),
        ("length.characters", 400),
        ("a_share", 0.31),
    ):
        place = int(np.flatnonzero(histogram(measure, [value]))[0])
        assert bin_edge(measure, place) <= value < bin_edge(measure, place + 1)
