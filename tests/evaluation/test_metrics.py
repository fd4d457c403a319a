"""The measures of replies against hand-counted values, sacrebleu's own scores and slower definitions."""

import random
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import metrics
from nemo_cpt.evaluation.bootstrap import Row, compare, mean, percentile, ratio
from nemo_cpt.evaluation.metrics import answer_measures, character_f1, exact_match, normalized, reply_measures, rouge_l
from nemo_cpt.inference.engine import Reply


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  東京。", "東京"),
        ("Ｔｏｋｙｏ!", "tokyo"),
        ("「１２３」円", "123円"),
        ("COVID-19", "covid19"),
        ("3.14 %", "3.14"),
        ("−５．", "-5"),
        ("x = -3", "x-3"),
        ("1,000", "1000"),
        ("½", "1/2"),
        ("+", "+"),
        ("…", "..."),
    ],
)
def test_the_normalization(text: str, wanted: str) -> None:
    assert normalized(text) == wanted


@pytest.mark.parametrize(
    ("reply", "answers", "match", "f1", "rouge"),
    [
        ("東京。", ["東京", "東京都"], 1, 1, 1),
        ("東京都です", ["東京都"], 0, 2 * 3 / 8, 2 * 3 / 8),
        ("大阪", ["東京"], 0, 0, 0),
        ("", ["東京"], 0, 0, 0),
        ("都京東", ["東京都"], 0, 1, 2 * 1 / 6),
        ("The capital is Tokyo", ["tokyo is the capital"], 0, 1, 2 * 2 / 8),
        ("今々", ["今"], 0, 2 / 3, 2 / 3),
        ("-5", ["5"], 0, 2 / 3, 1),
        ("15", ["1.5"], 0, 4 / 5, 0),
        ("34", ["3/4"], 0, 4 / 5, 0),
        ("-", ["+"], 0, 0, 0),
    ],
)
def test_scores_of_a_reply(reply: str, answers: list[str], match: float, f1: float, rouge: float) -> None:
    assert exact_match(reply, answers) == match
    assert character_f1(reply, answers) == pytest.approx(f1)
    assert rouge_l(reply, answers) == pytest.approx(rouge)


@given(st.text(alphabet="abc", max_size=12), st.text(alphabet="abcd", max_size=12))
def test_the_longest_common_subsequence(one: str, other: str) -> None:
    @lru_cache(None)
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        if one[i] == other[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    assert metrics._common_subsequence(one, other) == longest(0, 0)


REPLIES = ["日本の首都は東京です。", "富士山は高い山です。", "猫が好き", ""]
ANSWERS = [["日本の首都は東京である。", "東京が首都です。"], ["富士山は日本一高い山です。"], ["犬が好きです"], ["何か"]]


@pytest.mark.parametrize(("language", "tokenize"), [("ja", "ja-mecab"), ("zh-tw", "zh"), (None, "13a")])
def test_bleu_and_chrf_are_sacrebleus(language: str | None, tokenize: str) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    found = {each.name: each for each in answer_measures(REPLIES, ANSWERS, language)}
    references = [[each[0] for each in ANSWERS], [each[1] if len(each) > 1 else None for each in ANSWERS]]
    for name, metric in (("BLEU", BLEU(tokenize=tokenize)), ("chrF", CHRF())):
        assert found[name].whole == pytest.approx(metric.corpus_score(REPLIES, references).score)
        assert found[name].note == str(metric.get_signature())
        chosen = np.array([0, 0, 2])
        some = metric.corpus_score([REPLIES[at] for at in chosen], [[each[at] for at in chosen] for each in references])
        assert found[name].value(chosen) == pytest.approx(some.score)


def test_without_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(CptError, match=r"BLEU and chrF need sacrebleu: `pip install .* -e '.\[eval\]'`"):
        list(answer_measures(REPLIES, ANSWERS, "ja"))


def test_what_replies_are_by_themselves() -> None:
    replies = [Reply("ab" * n, "length" if n > 8 else "stop", 5, n, 0.1 * n, 0.5 * n) for n in range(1, 11)]
    found = {each.name: each.whole for each in reply_measures(replies)}
    assert found["length"] == 11
    assert found["cut off at the most tokens"] == 20
    assert found["tokens a second of a reply"] == pytest.approx(2)
    assert found["time to first token, p50"] == pytest.approx(0.55)
    assert found["latency, p95"] == pytest.approx(4.775)
    assert found["tokens of a reply"] == 5.5


def test_tokens_that_an_endpoint_does_not_count_are_not_none() -> None:
    found = {each.name: each for each in reply_measures([Reply("ab", "stop", 0, 0, 0.1, 0.5)] * 2)}
    for name in ("tokens of a reply", "tokens a second of a reply"):
        row = compare("set", None, found[name])
        assert (row.after, row.low, row.high) == (None, None, None)
    assert found["length"].whole == 2


def test_the_interval_of_a_difference_is_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    before = rng.normal(size=400)
    after = before + 0.1 + rng.normal(scale=0.5, size=400)
    row = compare("set", mean("score", before, better="higher"), mean("score", after, better="higher"), seed=3)
    error = (after - before).std() / 20
    middle = (after - before).mean()
    assert row.difference == pytest.approx(middle)
    assert [row.low, row.high] == pytest.approx([middle - 1.96 * error, middle + 1.96 * error], abs=0.2 * error)
    assert row.verdict == "better"
    assert compare("set", mean("score", before), mean("score", after), seed=3).low == row.low  # seeded


def test_pairs_make_a_difference_sure() -> None:
    """Units differ much, each is a little better: a bootstrap that does not pair them cannot tell."""
    before = np.array([float(each) for each in range(50)])
    row = compare("set", mean("loss", before, better="lower"), mean("loss", before - 0.01, better="lower"))
    assert row.low == pytest.approx(-0.01)
    assert row.verdict == "better"


def test_units_that_cannot_be_paired() -> None:
    with pytest.raises(CptError, match="ja, loss: 3 units before and 2 after cannot be paired"):
        compare("ja", mean("loss", [1, 2, 3]), mean("loss", [1, 2]))


def test_one_unit_has_no_interval_and_no_verdict() -> None:
    row = compare("ja", mean("loss", [2], better="lower"), mean("loss", [1], better="lower"))
    assert (row.low, row.high, row.verdict, row.difference) == (None, None, "", -1)
    alone = compare("ja", None, mean("loss", [1, 3]))
    assert (alone.before, alone.difference, alone.after) == (None, None, 2)
    assert alone.low <= 2 <= alone.high
    assert Row("ja", "x", 1, 2, -1, 3, "higher").verdict == ""


def test_what_is_not_defined_has_no_verdict() -> None:
    """A share of no replies, before or after or in some resamples."""
    nothing = ratio("share", [0, 0], [0, 0], better="higher")
    some = ratio("share", [1, 0], [1, 0], better="higher")
    for before, after in ((nothing, some), (some, nothing), (None, nothing)):
        row = compare("ja", before, after)
        assert (row.difference, row.low, row.high, row.verdict) == (None, None, None, "")
    alone = compare("ja", None, some)
    assert (alone.low, alone.after, alone.high) == (None, 1, None)


def test_units_that_add_nothing_make_nothing_sure() -> None:
    """Of a text and an empty document every resample gives the same number, which is no certainty."""
    before, after = (ratio("bits", [nats, 0], [9, 0], better="lower") for nats in (5, 4))
    row = compare("ja", before, after)
    assert (row.low, row.high, row.verdict) == (None, None, "")
    two = compare("ja", *(ratio("bits", [nats, 0, nats], [9, 0, 8], better="lower") for nats in (5, 4)))
    assert two.verdict == "better"


def test_ratios_and_percentiles() -> None:
    assert ratio("r", [1, 3], [2, 2]).whole == 1
    assert ratio("r", [1], [0]).whole is None
    values = random.Random(0).sample(range(100), 99)
    assert percentile("p", values, 50).whole == pytest.approx(np.median(values))
