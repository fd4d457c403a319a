"""The language of replies, against labels given by hand before the judge was written, and the questions that ship."""

import json
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import language
from nemo_cpt.evaluation.language import (
    EMPTY,
    KNOWN,
    MIXED,
    OTHER,
    ROMAJI,
    UNDECIDED,
    judge_language,
    language_share,
    wilson_interval,
    wrap,
)
from nemo_cpt.evaluation.questions import SHIPPED, shipped_questions

CHECKOUT = Path(__file__).parents[2]
LABELLED = Path(__file__).with_name("replies.jsonl")
REPLIES = [json.loads(line) for line in LABELLED.read_text("utf-8").splitlines()]
SENTENCES = {
    "ja": "明日は友達と海へ行くつもりです。",
    "zh-tw": "明天我打算和朋友去海邊游泳。",
    "zh-cn": "明天我打算和朋友去海边游泳，你们要来吗？",
    "ko": "내일은 친구와 바다에 갈 생각입니다.",
    "en": "Tomorrow I am going to the sea with a friend.",
    "de": "Morgen fahre ich mit einem Freund ans Meer.",
    "fr": "Demain, je vais à la mer avec une amie.",
    "es": "Mañana voy a la playa con un amigo.",
    "it": "Domani vado al mare con un'amica.",
    "pt": "Amanhã vou à praia com um amigo, não é longe.",
    "nl": "Morgen ga ik met een vriend naar het strand.",
    "pl": "Jutro jadę z przyjacielem nad morze.",
    "tr": "Yarın bir arkadaşımla denize gideceğim.",
    "id": "Besok saya akan pergi ke pantai dengan teman.",
    "vi": "Ngày mai tôi sẽ đi biển với một người bạn.",
    "th": "พรุ่งนี้ฉันจะไปทะเลกับเพื่อน",
    "hi": "कल मैं एक दोस्त के साथ समुद्र तट पर जाऊँगा।",
    "ar": "غدا سأذهب إلى البحر مع صديق لي.",
    "ru": "Завтра я поеду на море с другом.",
    "uk": "Завтра я поїду на море з другом.",
}
NO_LANGUAGE = [
    "```python\nprint('hello there, how are you')\n```",
    "`rm -rf build`",
    "https://example.com/what/is/this?answer=true",
    "mail@example.com",
    "$a^2 + b^2 = c^2$",
    "<|eot_id|>",
    "<b></b>",
    "3.14 42 1868",
    "NVIDIA",
    "😀",
]


class TestAgreement:
    """Labels: empty; undecided, where there are only numbers, code, addresses or names in Latin letters; a language,
    whatever stands in quotes, brackets and terms; mixed, where another language has about a fifth of the text or more
    in clauses of its own. Nothing was tuned on the half that is held out."""

    @pytest.mark.parametrize("half", ["tuned", "held_out"])
    def test_with_labels_by_hand_is_98_percent(self, half: str) -> None:
        replies = [each for each in REPLIES if each["half"] == half]
        assert len(replies) >= 100
        wrong = [each for each in replies if judge_language(each["reply"], each["asked"]).language != each["label"]]
        assert len(wrong) <= 0.02 * len(replies), wrong

    def test_every_class_is_among_the_labels(self) -> None:
        labels = {each["label"] for each in REPLIES}
        assert labels >= {"ja", "zh-tw", "zh-cn", "ko", "en", MIXED, UNDECIDED, EMPTY, ROMAJI}
        assert len({(each["asked"], each["reply"]) for each in REPLIES}) == len(REPLIES) >= 200

    def test_is_the_same_in_another_process(self) -> None:
        code = (
            "import json, sys; from nemo_cpt.evaluation.language import judge_language\n"
            "replies = [json.loads(line) for line in open(sys.argv[1], encoding='utf-8')]\n"
            "print(json.dumps([judge_language(each['reply'], each['asked']).shares for each in reversed(replies)]))"
        )
        command = [sys.executable, "-c", code, str(LABELLED)]
        other = subprocess.run(command, env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(CHECKOUT)}, capture_output=True)
        here = [judge_language(each["reply"], each["asked"]).shares for each in reversed(REPLIES)]
        assert json.loads(other.stdout) == here


class TestVerdict:
    @settings(deadline=None)
    @given(st.text(max_size=200), st.sampled_from(sorted(KNOWN)))
    def test_of_any_text_is_a_class_with_shares(self, text: str, asked: str) -> None:
        verdict = judge_language(text, asked)
        assert verdict.language in {*KNOWN, MIXED, UNDECIDED, EMPTY, ROMAJI, OTHER}
        assert not verdict.shares or sum(verdict.shares.values()) == pytest.approx(1)
        assert bool(verdict.shares) == (verdict.language not in (UNDECIDED, EMPTY))

    @pytest.mark.parametrize("other", NO_LANGUAGE)
    def test_does_not_change_with_what_is_no_language(self, other: str) -> None:
        for reply in (each for each in REPLIES if each["label"] in KNOWN):
            alone = judge_language(reply["reply"], reply["asked"])
            assert judge_language(f"{other}\n{reply['reply']}", reply["asked"]) == alone, reply

    @pytest.mark.parametrize(
        ("reply", "asked", "expected"),
        [
            ("東京", "ja", "ja"),
            ("東京", "zh-tw", "zh-tw"),
            ("東京", "en", "zh-tw"),  # 東 is in Big5 and not in GB 2312
            ("东京", "ja", "zh-cn"),
            ("駅前", "zh-tw", "ja"),  # 駅 is in neither
            ("東京\nです", "zh-tw", "ja"),  # the rest of the reply decides before the language asked in
            ("可以。没问题。", "zh-tw", "zh-cn"),
            ("Я люблю Python и PyTorch.", "ja", "ru"),
            ("Python คือภาษาโปรแกรม", "ja", "th"),
            ("Το Τόκιο είναι η πρωτεύουσα.", "ja", OTHER),
            ("π", "ja", UNDECIDED),
            ("\U0003134b", "ja", UNDECIDED),  # a Han character younger than Python's Unicode
            ("大学", "en", "zh-cn"),  # nothing tells
            ("これは本です。" * 5 + "It is a book.", "ja", "ja"),
            ("これは本です。It is a book.", "ja", MIXED),
            ("NVIDIA\nはい、できます。", "en", "ja"),  # a name counts where there is nothing else
            ("NVIDIA", "en", "en"),
            ("Москва\nはい、できます。", "ja", MIXED),
        ],
    )
    def test_of_characters_that_several_languages_have(self, reply: str, asked: str, expected: str) -> None:
        assert judge_language(reply, asked).language == expected

    @pytest.mark.parametrize(
        "unit", ["na", "a", "$a", "a ", "kya", "<a", '"a', "-", "1.", "\\\\[", "は the cat sat on a mat"]
    )
    def test_of_long_repetitions_comes_soon(self, unit: str) -> None:
        verdict = judge_language(unit * 5000 + "x", "ja")
        assert verdict.language in {*KNOWN, MIXED, UNDECIDED}

    def test_tells_every_known_language(self) -> None:
        assert SENTENCES.keys() == KNOWN.keys()
        told = {asked: [judge_language(each, asked).language for each in SENTENCES.values()] for asked in ("ja", "en")}
        assert told == {"ja": list(SENTENCES), "en": list(SENTENCES)}

    def test_counts_text_by_its_bytes(self) -> None:
        shares = judge_language("これは本です。It is a book.", "ja").shares
        assert shares == {"ja": pytest.approx(18 / 27), "en": pytest.approx(9 / 27)}

    def test_of_a_language_that_is_not_known(self) -> None:
        with pytest.raises(CptError, match=r"'tlh' is not known; known are ja, zh-tw, zh-cn, ko, en"):
            judge_language("Qapla'", "tlh")
        with pytest.raises(CptError, match="'jp' is not known"):
            language_share([], "jp")

    def test_without_lingua(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lingua", None)
        language._detector.cache_clear()
        language._confidences.cache_clear()
        with pytest.raises(CptError, match=r"lingua, which is not installed: `pip install .* -e '.\[eval\]'`"):
            judge_language("It is a book.", "ja")


class TestShare:
    def test_counts_empty_replies_and_leaves_out_undecided_ones(self) -> None:
        share = language_share(
            ["はい、そうです。", "いいえ。", "Yes, it is.", "", "42", "これです。It is this one."], "ja"
        )
        assert share.counts == {"ja": 2, EMPTY: 1, "en": 1, MIXED: 1, UNDECIDED: 1}
        assert (share.replies, share.judged, share.share) == (6, 5, 0.4)
        assert share.interval == wilson_interval(2, 5)
        assert share.summary == "ja: 40.0% (11.8% to 76.9%) of 5 replies; empty 1, en 1, mixed 1, undecided 1"

    def test_of_nothing(self) -> None:
        for replies in ([], ["42"]):
            share = language_share(replies, "ja")
            assert share.share is None
            assert share.interval == (0, 1)
            assert share.summary.startswith("ja: undecided of 0 replies")

    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_has_wilsons_interval(self, successes: int, trials: int, low: float, high: float) -> None:
        """Table I of Newcombe 1998, Statistics in Medicine 17."""
        assert wilson_interval(successes, trials) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))

    def test_has_no_interval_of_nonsense(self) -> None:
        with pytest.raises(CptError, match="3 successes of 2 trials"):
            wilson_interval(3, 2)


class TestWrappers:
    def test_with_a_chat_template(self) -> None:
        user = {"role": "user", "content": "富士山の高さは？"}
        assert wrap("富士山の高さは？", "none", "ja", chat_template=True) == "富士山の高さは？"
        assert wrap("富士山の高さは？", "chat", "ja", chat_template=True) == [user]
        system, same = wrap("富士山の高さは？", "system", "ja", chat_template=True)
        assert same == user
        assert "日本語" in system["content"]  # type: ignore[index]

    def test_without_one_a_system_prompt_is_text(self) -> None:
        text = wrap("Wie hoch ist die Zugspitze?", "system", "de", chat_template=False)
        assert text == "You are a helpful assistant. Answer the questions in German.\n\nWie hoch ist die Zugspitze?\n"

    @pytest.mark.parametrize(
        ("wrapper", "asked", "message"),
        [
            ("chat", "ja", "has no chat template"),
            ("few-shot", "ja", "no wrapper 'few-shot'; there are none, system, chat"),
            ("none", "jp", "'jp' is not known"),
        ],
    )
    def test_that_cannot_be(self, wrapper: str, asked: str, message: str) -> None:
        with pytest.raises(CptError, match=message):
            wrap("?", wrapper, asked, chat_template=False)


class TestQuestions:
    @pytest.mark.parametrize(("code", "at_least"), [("ja", 200), ("zh-tw", 100), ("ko", 100), ("en", 50)])
    def test_are_many_different_and_in_their_language(self, code: str, at_least: int) -> None:
        questions = shipped_questions(code)
        assert len(questions) >= at_least
        assert len({each.id for each in questions}) == len(questions)
        assert len({each.category for each in questions}) >= 6
        assert {judge_language(each.prompt, code).language for each in questions} == {code}
        grams = {each.prompt: {each.prompt[i : i + 3] for i in range(len(each.prompt) - 2)} for each in questions}
        near = [(a, b) for a, b in combinations(grams, 2) if len(grams[a] & grams[b]) > 0.6 * len(grams[a] | grams[b])]
        assert len(grams) == len(questions)
        assert not near

    def test_there_are_none_in_other_languages(self) -> None:
        with pytest.raises(CptError, match="no questions are shipped in 'de'; there are some in ja, zh-tw, ko, en"):
            shipped_questions("de")

    def test_are_in_the_wheel(self) -> None:
        package = CHECKOUT / "nemo_cpt"
        shipped = [str(path.relative_to(package)) for path in package.glob("evaluation/questions/*.jsonl")]
        config = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
        patterns = config["tool"]["setuptools"]["package-data"]["nemo_cpt"]
        assert len(shipped) >= len(SHIPPED)
        assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in shipped)
