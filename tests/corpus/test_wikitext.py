"""Wikitext to plain text: the constructs of real articles, and any others without an exception or a stall."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_cpt.corpus.wikipedia.pages import Site, address
from nemo_cpt.corpus.wikipedia.templates import is_disambiguation
from nemo_cpt.corpus.wikipedia.wikitext import Cleaner
from tests.support.cost import within_cpu_seconds

CLEANERS = {
    "ja": Cleaner("ja", {6: "ファイル", 14: "Category", 2: "利用者"}),
    "zh": Cleaner("zh", {6: "File", 14: "Category"}),
    "en": Cleaner("en", {6: "File", 14: "Category"}),
    "fr": Cleaner("fr", {6: "Fichier", 14: "Catégorie"}),
}
CASES = {
    # Links
    "a link": ("en", "[[Kyoto]] and [[Kyoto (city)|the city]]s", "Kyoto and the citys"),
    "a link with a bar in its label": ("en", "[[a|b|c]]", "b|c"),
    "a link to a section": ("en", "[[Kyoto#History]]", "Kyoto#History"),
    "a link with markup": ("en", "[[Kyoto|''old'' '''town''']]", "old town"),
    "a title that looks like a prefix": ("ja", "[[Re:ゼロから始める異世界生活]]", "Re:ゼロから始める異世界生活"),
    "another language": ("ja", "東京\n[[en:Tokyo]]\n[[zh-min-nan:Tang-kiaⁿ]]", "東京"),
    "another language in the text": ("en", "see [[:fr:Paris|Paris]] and [[:de:Wien]]", "see Paris and de:Wien"),
    "a category": ("ja", "東京\n[[Category:東京|*]]\n[[カテゴリ:都市]]", "東京"),
    "a category in the text": ("en", "in [[:Category:Cities]]", "in Category:Cities"),
    "a file whose caption has links": ("en", "a [[File:X.jpg|thumb|The [[Kyoto|old [[city]]]] {{x|y}}]] b", "a b"),
    "an address at a caption's end": ("ja", "あ[[画像:X.jpg|thumb|説明[http://x y]]]い", "あい"),
    "an address at a label's end": (
        "en",
        "a [[b|c [http://x y]]] d [[File:X.jpg|[[e|f [http://x y]]]]] g",
        "a c y d g",
    ),
    "a bracket behind a label with a template": ("en", "[a [[b|c {{nowrap|d}}]]]", "[a c d]"),
    "an old name of the namespace": ("ja", "あ[[画像:X.jpg|thumb|説明]]い[[Image:y.png]]う", "あいう"),
    "a file of another language": ("fr", "a[[Fichier:X.jpg|vignette|l'[[église]]]]b", "ab"),
    "an external link": ("en", "[https://e.org/a?b=c The site] [http://e.org] [//e.org/x y]", "The site y"),
    "brackets that are none": ("en", "[sic] a[1] [ http ]", "[sic] a[1] [ http ]"),
    "a link in brackets": ("en", "[[[Kyoto]]]", "[Kyoto]"),
    # Templates
    "templates within each other": ("en", "a{{x|{{y|{{z}}}}|b={{w|[[c|d]]}}}}b", "ab"),
    "an infobox": (
        "en",
        "{{Infobox city\n| name = Kyoto\n| map = {{Map|{{{1|}}}}}\n}}\nKyoto is a city.",
        "Kyoto is a city.",
    ),
    "a language": ("en", "({{lang|ja|京都}}, {{lang-fr|Kyōto}}, {{langx|de|Kioto}})", "(京都, Kyōto, Kioto)"),
    "nihongo": ("en", "{{Nihongo|'''Kyoto'''|京都|Kyōto|lit. \"capital\"}}", 'Kyoto (京都, Kyōto, lit. "capital")'),
    "convert": (
        "en",
        "{{convert|5|km|mi|abbr=on}}, {{cvt|3|to|4|km2}}, {{convert|2|x|3|m}}",
        "5 km, 3 to 4 km², 2 × 3 m",
    ),
    "a reading": ("ja", "{{読み仮名|京都|きょうと}}、{{ruby|都|みやこ}}", "京都（きょうと）、都（みやこ）"),
    "a link that this language lacks": ("ja", "{{仮リンク|表示|en|Target}}と{{仮リンク|甲|en|B|label=乙}}", "表示と乙"),
    "the same in others": ("zh", "{{link-en|京都|Kyoto}}、{{tsl|en|Foo|甲}}、{{le|乙|Bar|丙}}", "京都、甲、丙"),
    "a rare character": ("ja", "{{JIS2004フォント|葛}}飾", "葛飾"),
    "a Chinese life": ("zh", "王某{{bd|1900年|1月2日|1980年|3月4日}}，诗人", "王某（1900年1月2日—1980年3月4日），诗人"),
    "small marks": ("en", "a{{snd}}b{{!}}c {{nowrap|10 km}} {{frac|1|2}} {{e|-5}} {{'}}", "a – b|c 10 km 1/2 ×10⁻⁵ '"),
    "a named argument": ("en", "{{lang|ja|text=京都}} {{nowrap|1=a=b}}", "京都 a=b"),
    "a quotation": ("en", "He said:{{Quote|text=To be.|author=W.}}Then", "He said:\n\nTo be.\n\nThen"),
    "an argument with a table's bar": ("en", "{{nowrap|a{{!}}b}} {{small|[[x|y]]}}", "a|b y"),
    "a parameter": ("en", "{{{1|default}}} {{{none}}}", "default"),
    "functions": ("en", "{{PAGENAME}}: {{formatnum:1,234}} {{#if:x|y|z}}{{DISPLAYTITLE:x}}", "T: 1,234"),
    "brackets that a template leaves": (
        "ja",
        "京都（{{IPA|x}}）は（{{x}}、みやこ）、a (b, {{y}}) c",
        "京都は（みやこ）、a (b) c",
    ),
    "brackets that nothing was in": ("en", "call f() and g( )", "call f() and g( )"),
    "a stop after a template": ("en", "the end {{cn|date=May}}.", "the end."),
    # Tables
    "a table": ("en", 'a\n{| class="x"\n! h\n|-\n| b || c\n|}\nd', "a\n\nd"),
    "a table within a table": ("en", "a\n{|\n|\n{|\n| x\n|}\n| y\n|}\nd", "a\n\nd"),
    "an argument in a table that begins with a brace": ("en", "{|\n| {{nowrap\n|}b}}\n| c\n|}\nd", "d"),
    "an argument that begins with a brace": ("en", "a {{nowrap\n|}b}} c {{nowrap\n|}\n}} d", "a }b c }\nd"),
    "a template without an end in a table": ("en", "{|\n| {{nowrap|b\n|}\nd", "d"),
    "a table within a template": ("en", "{{box|\n{|\n| x\n|}\n}}d", "d"),
    "a table that does not end": ("en", "a\n{| class=x\n! head\n| cell\n|-\n\nText below.", "a\n\nText below."),
    "an HTML table": ("en", "a<table><tr><td>x<table><tr><td>y</table></table>b", "a\nb"),
    # What is no wikitext
    "references": (
        "en",
        'a<ref>{{cite|x}} [[b]]</ref>, b<ref name="n" />.<references><ref>x</ref></references>',
        "a, b.",
    ),
    "a reference that does not end": ("en", "a<ref>b [[c]]\n\nd", "ab c\n\nd"),
    "a comment": ("en", "a<!-- [[x]] {{ -->b\n<!-- a line -->\nc", "ab\nc"),
    "a comment that does not end": ("en", "a\n<!-- rest", "a"),
    "nowiki": ("en", "<nowiki>[[x]] {{y}} ''z'' &lt;</nowiki> <nowiki/>a", "[[x]] {{y}} ''z'' < a"),
    "a formula": ("en", "with <math>a_{i} = \\{b | c\\}</math> and {{mvar|x}}", "with $a_{i} = \\{b | c\\}$ and x"),
    "code": (
        "en",
        "as <code>f(x)</code> or\n<syntaxhighlight lang=c>\nif (a) {{\n  b[[1]];\n}}\n</syntaxhighlight>",
        "as f(x) or\nif (a) {{\n  b[[1]];\n}}",
    ),
    "a gallery": ("en", "a\n<gallery mode=packed>\nFile:X.jpg|[[x]]\n</gallery>\nb", "a\n\nb"),
    # Characters
    "raised and lowered": ("en", "H<sub>2</sub>O, 10<sup>-5</sup>, m<sup>th</sup>", "H₂O, 10⁻⁵, mth"),
    "ruby": ("ja", "<ruby>漢字<rp>(</rp><rt>かんじ</rt><rp>)</rp></ruby>", "漢字（かんじ）"),
    "entities": ("en", "a&nbsp;b &amp; &lt;i&gt; &ndash; &#x4EAC;", "a b & <i> – 京"),
    "tags": ("en", 'a<br />b <span style="x">c</span> <b>d</b> x < y > z <foo>', "a\nb c d x < y > z <foo>"),
    "quotes": ("en", "'''''a''''' ''b'' '''c''' it's ''''d''''", "a b c it's 'd'"),
    "an apostrophe before italics": ("fr", "l'''Iliade'' d'Homère, '''ici'''", "l'Iliade d'Homère, ici"),
    "switches": ("ja", "__NOTOC__あ__目次強制__ __init__", "あ __init__"),
    # Lines
    "headings": ("en", "a\n==B==\nc\n=== D ===\ne", "a\n\nB\n\nc\n\nD\n\ne"),
    "sections that nothing is left of": (
        "en",
        "a\n== B ==\n=== C ===\n{{x}}\n== D ==\ne\n== References ==\n{{reflist}}",
        "a\n\nD\n\ne",
    ),
    "lists": ("en", "* a\n** b\n# c\n: d\n; e : f\n* {{x}}\n* .", "- a\n  - b\n- c\nd\ne : f"),
    "a rule": ("en", "a\n----\nb", "a\n\nb"),
    # Conversion between scripts
    "two scripts": ("zh", "-{zh-hans:计算机;zh-hant:電腦}-和-{zh-tw:網路; zh-cn:网络;}-", "计算机和网络"),
    "one form for all": ("zh", "-{重庆}-和-{zh|原文}-", "重庆和原文"),
    "rules that show nothing": ("zh", "-{T|zh-hans:甲;zh-hant:乙}-丙-{H|丁=>zh-cn:戊;}-", "丙"),
    "a template in a form": ("zh", "-{zh-hans:{{lang|en|A}};zh-hant:B}-", "A"),
    "marks where nothing is converted": ("en", "x-{y}-z", "x-{y}-z"),
    # Broken
    "a template that does not end": (
        "en",
        "{{Infobox city\n| name = [[Kyoto]]\n| x = y\n}\n\nKyoto is a city.",
        "}\n\nKyoto is a city.",
    ),
    "a link that does not end": ("en", "a [[b\n\nc", "a b\n\nc"),
    "a link that its template ends": ("en", "a{{x|[[b}}c", "ac"),
    "ends of nothing": ("en", "a]] b}} c\n|}\nd", "a b c\n\nd"),
    "braces in a row": ("en", "{{{{{1}}}}}a{{ {{x}} }}b", "ab"),
    "nothing": ("en", "", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_a_construct(name: str) -> None:
    language, wikitext, expected = CASES[name]
    assert CLEANERS[language].text(wikitext, "T") == expected


PIECES = [
    "[[", "]]", "{{", "}}", "{{{", "}}}", "|", "\n{|", "\n|}", "\n|-", "-{", "}-", "zh-hans:", ";", "=",
    "\n== a ==\n", "<ref>", "</ref>", "<ref name=a />", "<!--", "-->", "<nowiki>", "</nowiki>", "<math>", "</math>",
    "''", "'''", "*", ":", "lang|ja|", "nihongo|", "File:", "Category:", "en:", ":", "[http://a.b ", "]", "<br>",
    "<table>", "</table>", "&lt;", "&amp;nbsp;", "__TOC__", "\n", " ", "京都", "a", "（", "）", "\x02",
    "\x02" + "0\x03", "\x04", "<ruby><rt>", "#", "convert|1|",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.sampled_from(sorted(CLEANERS)))
@example("{{nihongo|\x020\x03}}", "en")
def test_any_wikitext_goes_through(wikitext: str, language: str) -> None:
    text = CLEANERS[language].text(wikitext, "T")
    text.encode("utf-8")
    if not re.search("<(?:nowiki|math)|&", wikitext):  # which may well show braces
        assert not re.search(r"\{\{|\[\[|[\x00-\x08]", text)


WORD = st.sampled_from(
    ["京都", "a b", "x = y", "1868", "。", "''i''", "<br>", "{ b", "} b", "[ b", "] b", "a|b", "<ref>x</ref>"]
)
BALANCED = st.recursive(
    WORD,
    lambda inner: st.one_of(
        st.tuples(
            st.sampled_from(["x", "lang|ja", "nihongo", "Infobox\n", "convert|3"]), st.lists(inner, max_size=3)
        ).map(lambda made: "{{" + "|".join((made[0], *made[1])) + "}}"),
        st.tuples(st.sampled_from(["京都", "File:x.jpg|thumb", "Category:a", "en:b"]), inner).map(
            lambda made: f"[[{made[0]}|{made[1]}]]"
        ),
        st.lists(inner, max_size=3).map(lambda cells: "\n{| class=x\n| " + "\n|-\n| ".join(cells) + "\n|}\n"),
        st.lists(inner, min_size=2, max_size=4).map(" ".join),
    ),
    max_leaves=25,
)


@settings(max_examples=300, deadline=None)
@given(BALANCED)
def test_what_is_balanced_leaves_no_marks(wikitext: str) -> None:
    text = CLEANERS["ja"].text(f"はじめ {wikitext} おわり", "T")
    assert not re.search(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}", text)


HOSTILE = [
    "{{", "[[", "[[a", "<ref ", "{{a|[[", "[[a|{{", "\n{|\n|", "<ref>", "<ref", "<!--", "<nowiki>", "''", "'''a",
    "[http://a", "(", "\n==a", "-{", "{{a}} ", "({{a}}", "{{a}}, ", "{{{1|", "}}", "]]", "\n|}", "}-", "{{a\n|",
    "<table>", "a " * 3, "{{lang|ja|", "</ref>",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_grows_with_length_alone(piece: str) -> None:
    """A fifth of a megabyte of one mark: a quadratic pass would take minutes."""
    with within_cpu_seconds(4):
        CLEANERS["zh"].text(piece * (200_000 // len(piece)), "T")


@pytest.mark.parametrize(
    ("language", "wikitext"),
    [
        ("en", "{{disambiguation|geo}}"),
        ("en", "{{Hndis|name=Smith}}"),
        ("ja", "a\n{{Aimai}}"),
        ("ja", "{{人名の曖昧さ回避}}"),
        ("zh", "{{ 消歧义 }}"),
        ("zh", "{{disambig}}"),
        ("ko", "{{동음이의}}"),
        ("de", "{{Begriffsklärung}}"),
        ("fr", "{{Homonymie}}"),
        ("en", "{{Place_name disambiguation}}"),
        ("it", "__DISAMBIG__"),
    ],
)
def test_disambiguations_are_known_by_their_template(language: str, wikitext: str) -> None:
    assert is_disambiguation(wikitext, language)


@pytest.mark.parametrize(
    "wikitext", ["{{About|x|y (disambiguation)}}", "{{Otheruses}}", "曖昧さ回避", "{{disambiguation needed}}"]
)
def test_an_article_that_points_to_one_is_none(wikitext: str) -> None:
    assert not is_disambiguation(wikitext, "ja")


def test_an_address_is_as_the_wiki_writes_it() -> None:
    site = Site("enwiki", "en", "https://en.wikipedia.org/wiki/", "CC BY-SA 4.0", {})
    assert address("AC/DC: Let There Be Rock?", site) == "https://en.wikipedia.org/wiki/AC/DC:_Let_There_Be_Rock%3F"
    assert address("京都", site) == "https://en.wikipedia.org/wiki/%E4%BA%AC%E9%83%BD"
