"""Encodings and Unicode repaired, persons' data masked: what is meant changes, and nothing else."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.masking import Masking
from nemo_cpt.cleaning.repair import Repair

REPAIR, MASKING = Repair(), Masking()
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="&"), max_size=80)


def repaired(text: str, rule: Repair = REPAIR) -> str:
    document = Document(text)
    list(rule.apply(document))
    return document.text


def masked(text: str) -> tuple[str, dict[str, int]]:
    document = Document(text)
    list(MASKING.apply(document))
    return document.text, dict(document.changes)


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("こんにちは、世界".encode().decode("latin-1"), "こんにちは、世界"),
        ("schÃ¶n und cafÃ©", "schön und café"),
        ("ひらがな".encode().decode("cp932"), "ひらがな"),
        ("ﾊﾟｿｺﾝとｶﾞｽ", "パソコンとガス"),
        ("か\u3099き\u3099", "がぎ"),
        ("a &amp; b", "a & b"),
        ("\ufeffゼロ\u200b幅\u00ad文字\x00", "ゼロ幅文字"),
        ("左\u206aから\u206f右", "左から右"),
        ("一\r\n二\r三", "一\n二\n三"),
        ("一\n\n \n\n二", "一\n\n二"),
    ],
)
def test_what_is_broken_is_mended(broken: str, whole: str) -> None:
    assert repaired(broken) == whole


@pytest.mark.parametrize(
    "text", ["（ＡＢＣ）１２３！？　全角", "①㈱㎡…", "“quotes” and ﬁne", "👨‍👩‍👧", "<p>a &amp; b</p>", "Ünïcödé"]
)
def test_what_people_wrote_stays(text: str) -> None:
    assert repaired(text) == text


def test_nfkc_where_it_is_asked_for() -> None:
    assert repaired("ＡＢＣ①", Repair(form="NFKC")) == "ABC1"
    assert repaired("ﾊﾟｿｺﾝ", Repair(halfwidth_katakana=False)) == "ﾊﾟｿｺﾝ"


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_repaired_text_is_in_one_form_and_stays_as_it_is(text: str) -> None:
    once = repaired(text)
    assert unicodedata.is_normalized("NFC", once)
    assert not {"\r", "\x00", "\ufeff", "\u200b"} & set(once)
    assert repaired(once) == once


@pytest.mark.parametrize(
    ("text", "expected", "what"),
    [
        ("メールはtaro.yamada+news@mail.example.co.jpまで", "メールは<EMAIL>まで", "email"),
        ("電話03-1234-5678です", "電話<PHONE>です", "phone"),
        ("ＴＥＬ：０３－１２３４－５６７８", "ＴＥＬ：<PHONE>", "phone"),
        ("携帯は09012345678、", "携帯は<PHONE>、", "phone"),
        ("(06)6123-4567", "<PHONE>", "phone"),
        ("+81 3-1234-5678", "<PHONE>", "phone"),
        ("03(1234)5678", "<PHONE>", "phone"),
        ("TEL 0312345678 FAX", "TEL <PHONE> FAX", "phone"),
        ("携帯 090 1234 5678", "携帯 <PHONE>", "phone"),
        ("ｔａｒｏ＠ｅｘａｍｐｌｅ．ｃｏｍまで", "<EMAIL>まで", "email"),
        ("2001:4860:4860::8888", "<IP>", "ip"),
        ("Call (212) 555-2368 now", "Call <PHONE> now", "phone"),
        ("手机13812345678。", "手机<PHONE>。", "phone"),
        ("전화 02-1234-5678", "전화 <PHONE>", "phone"),
        ("個人番号 1234 5678 9018", "個人番号 <ID>", "identity"),
        ("身份证11010519491231002X", "身份证<ID>", "identity"),
        ("주민번호 900101-1234567", "주민번호 <ID>", "identity"),
        ("SSN 123-45-6789", "SSN <ID>", "identity"),
        ("card 4111-1111-1111-1111", "card <ID>", "identity"),
        ("IPは203.0.113.7です", "IPは<IP>です", "ip"),
        ("2001:0db8:0000:0000:0000:ff00:0042:8329", "<IP>", "ip"),
    ],
)
def test_persons_and_machines_are_masked(text: str, expected: str, what: str) -> None:
    assert masked(text) == (expected, {f"masked {what}": 1})


@pytest.mark.parametrize(
    "text",
    [
        "平成10年11月12日、1998-2003年",
        "2,000,000円、2024-11-12 12:34:56",
        "ISBN 978-4-06-519981-7",
        "3.14159265358979",
        "192.168.0.1 and 127.0.0.1 and v1.2.3, 1.3.5.7号",
        "個人番号 1234 5678 9012",  # a wrong check digit
        "card 4111 1111 1111 1112",
        "〒604-8571 京都市",
        "a@b and @user",
        "12:34:56, std::vector, 2020::",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert masked(text) == (text, {})


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab.@-+() 0123456789０９年:。", max_size=80))
def test_masking_twice_is_masking_once(text: str) -> None:
    once, _ = masked(text)
    assert masked(once) == (once, {})


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(categories=["Lo", "Po", "Zs"], exclude_characters="@＠"), max_size=80))
def test_text_without_digits_and_signs_is_untouched(text: str) -> None:
    assert masked(text) == (text, {})


def test_the_counts_are_of_what_was_masked() -> None:
    text = "a@example.com, b@example.org; 03-1234-5678"
    assert masked(text) == ("<EMAIL>, <EMAIL>; <PHONE>", {"masked email": 2, "masked phone": 1})


def test_long_runs_take_no_longer_for_it() -> None:
    """A quadratic pattern would take minutes, and the suite's limit ends it."""
    for unit in ("a", "a.", "1-", "1.", "0", "a@"):
        masked(unit * 200_000)
