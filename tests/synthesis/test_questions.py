"""Questions that rules make out of texts, and out of templates with slots."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_cpt.errors import CptError
from nemo_cpt.synthesis.questions import (
    BLANK,
    KINDS,
    LANGUAGES,
    Document,
    Rules,
    ask,
    fill,
    language_of,
    sentences,
    untitled,
)

TEXT = (
    "京都市は、京都府の南部にある市である。平安京が置かれた794年から1868年まで日本の都であった。「古都」とも呼ばれ、"
    "寺と神社が多い。\n\nコーヒーを飲む人が多い町としても知られ、古い喫茶店が今も多く残っている。朝から開いている店も多い。"
)
KYOTO = Document(TEXT, "京都市", 7)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("これは日本語です。", "ja"),
        ("这是中文。", "zh"),
        ("This is English.", "en"),
        ("東京は高い", "ja"),
        ("42", "en"),
    ],
)
def test_a_script_tells_the_language(text: str, language: str) -> None:
    assert language_of(text) == language


def test_sentences_end_at_full_stops_of_both_kinds() -> None:
    assert sentences("一つ。二つ！「三つ。」四つ") == ["一つ。", "二つ！", "「三つ。」", "四つ"]
    assert sentences('One. Two at 3.14! "Three?" Four') == ["One.", " Two at 3.14!", ' "Three?"', " Four"]


def test_a_short_first_line_is_a_title() -> None:
    assert untitled("京都市\n\n京都市は市である。", 3) == Document("京都市は市である。", "京都市", 3)
    assert untitled("京都市は市である。\n大きい。", 3).title == ""
    assert untitled("京都市", 3) == Document("京都市", "", 3)


def test_the_kinds() -> None:
    for seed in range(20):
        made = {kind: ask(KYOTO, kind, "ja", random.Random(seed)) for kind in KINDS}
        asked = {kind: question.query.split("\n\n")[-1] for kind, question in made.items() if question}
        answer = {kind: question.answer for kind, question in made.items() if question}
        paragraphs = TEXT.split("\n\n")
        assert "京都市" in asked["title"]
        assert answer["title"] == paragraphs[0]
        assert asked["continuation"] + answer["continuation"] in paragraphs
        assert asked["summary"] == paragraphs[0]
        assert answer["summary"] == paragraphs[0].split("。")[0] + "。"
        assert asked["cloze"].count(BLANK) == 1
        assert asked["cloze"].replace(BLANK, answer["cloze"]) in TEXT
        assert answer["cloze"] in ("794年", "1868年", "古都", "コーヒー")


@given(st.text(max_size=300), st.sampled_from(KINDS), st.sampled_from(LANGUAGES), st.integers(0, 5))
def test_any_text_gives_a_whole_question_or_none(text: str, kind: str, language: str, seed: int) -> None:
    question = ask(untitled(text, 0), kind, language, random.Random(seed))
    if question is not None:
        assert question.query.strip()
        assert question.answer == question.answer.strip() != ""


def test_rules_take_turns_and_repeat_nothing() -> None:
    documents = [Document(TEXT.replace("京都", name), name, i) for i, name in enumerate(("奈良", "鎌倉", "金沢"))]
    rules = Rules(KINDS, [], None, seed=1)
    first, second = rules.make(documents, 6), rules.make(documents, 6)
    assert len(first) == len(second) == 6
    assert len({question.query for question in first + second}) == 12
    assert {question.kind for question in first + second} == set(KINDS)
    assert rules.make([], 5) == []


SLOTS: dict[str, list[Any]] = {
    "city": [{"name": "東京", "people": 1400}, {"name": "大阪", "people": 880}],
    "polite": ["教えてください", "知りたいです", "何人ですか"],
}
TEMPLATE = {"query": "{city[name]}の人口を{polite}。", "answer": "約{city[people]}万人です。"}


def test_templates_are_filled_with_what_belongs_together() -> None:
    found = fill([TEMPLATE], SLOTS, 100, random.Random(0))
    assert len(found) == len({question.query for question in found}) == 6
    assert all(("東京" in question.query) == ("1400" in question.answer) for question in found)
    assert found == fill([TEMPLATE], SLOTS, 100, random.Random(0))
    assert {q.query for q in fill([TEMPLATE], SLOTS, 3, random.Random(1))} < {q.query for q in found}


def test_many_combinations_are_not_made_to_choose_few() -> None:
    slots = {name: [str(i) for i in range(10_000)] for name in "abcdef"}
    template = {"query": "{a}{b}{c}{d}{e}", "answer": "{f}"}
    assert len(fill([template], slots, 50, random.Random(0))) == 50


def test_rules_mix_templates_with_texts() -> None:
    rules = Rules(KINDS, fill([TEMPLATE], SLOTS, 100, random.Random(0)), "ja", seed=0)
    kinds = [question.kind for question in rules.make([KYOTO], 5)]
    assert kinds.count("slots") == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"query": "{town}", "answer": "a"}, r"KeyError\('town'\)"),
        ({"query": "{city[mayor]}", "answer": "a"}, "mayor"),
        ({"query": "{city", "answer": "a"}, "cannot be filled"),
        ({"query": "q"}, "has not the two texts"),
        ("q", "has not the two texts"),
    ],
)
def test_a_template_that_cannot_be_filled_is_named(template: Any, message: str) -> None:
    with pytest.raises(CptError, match=message):
        fill([template], SLOTS, 3, random.Random(0))
