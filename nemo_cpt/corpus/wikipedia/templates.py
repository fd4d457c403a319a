"""Templates whose text belongs to the sentence they stand in, and those that make a page a disambiguation.

Templates are not expanded: that takes MediaWiki, all templates of the wiki and its Lua modules. A call yields what is
simply written in it, where the name is known here, and nothing otherwise; infoboxes, navigation and notes go so.
"""

import re
from collections.abc import Callable
from functools import cache, lru_cache

from nemo_cpt.corpus.wikipedia.names import DISAMBIGUATIONS

Arguments = dict[str, str]  # positional ones as "1", "2", …; blanks around those belong to the text
_Render = Callable[[Arguments], str]

PIPE = "\x01"  # a bar that separates no arguments; XML allows no such character in a page
_SUPERSCRIPTS = str.maketrans("0123456789+-−=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ")
_SUBSCRIPTS = str.maketrans("0123456789+-−=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")
_SUPER, _SUB = re.compile(r"[0-9+\-−=()n]+"), re.compile(r"[0-9+\-−=()]+")
_UNITS = {"km2": "km²", "m2": "m²", "cm2": "cm²", "m3": "m³", "cm3": "cm³", "sqmi": "sq mi", "sqft": "sq ft"}
_UNITS |= {"C": "°C", "F": "°F", "mph": "mph", "kph": "km/h", "km/h": "km/h", "acre": "acres", "cuft": "cu ft"}
_RANGES = {"to": " to ", "and": " and ", "or": " or ", "by": " by ", "x": " × ", "×": " × ", "*": " × "}
_RANGES |= {"-": "–", "–": "–", "to(-)": "–", "&": " & ", "+/-": " ± ", "±": " ± "}


def superscript(text: str) -> str:
    """Return a text set above: ten to the fifth must not become 105."""
    return text.translate(_SUPERSCRIPTS) if _SUPER.fullmatch(text) else text


def subscript(text: str) -> str:
    """Return a text set below."""
    return text.translate(_SUBSCRIPTS) if _SUB.fullmatch(text) else text


def _first(*names: str) -> _Render:
    """Return the first of these arguments that says something."""
    return lambda given: next((given[name] for name in names if given.get(name, "").strip()), "")


def _last(given: Arguments) -> str:
    return (_positional(given) or [""])[-1]


def _joined(separator: str = "") -> _Render:
    return lambda given: separator.join(part.strip() for part in _positional(given))


def _before(text: str) -> _Render:
    return lambda given: text + given["1"].strip() if "1" in given else ""


def _around(text: str, *names: str) -> _Render:
    """Set an argument between the two halves of `text`."""
    before, _, after = text.partition("…")
    return lambda given: before + value + after if (value := _first(*names or ("1",))(given)) else ""


def _positional(given: Arguments) -> list[str]:
    return [value for name, value in given.items() if name.isdigit()]


def _reading(given: Arguments) -> str:
    base, reading = given.get("1", "").strip(), given.get("2", "").strip()
    return f"{base}（{reading}）" if base and reading else base or reading


def _nihongo(given: Arguments) -> str:
    said = [part for name in ("1", "2", "3", "extra", "4") if (part := given.get(name, "").strip())]
    return f"{said[0]} ({', '.join(said[1:])})" if len(said) > 1 else "".join(said)


def _convert(given: Arguments) -> str:
    parts = [part.strip() for part in _positional(given)]
    text = parts.pop(0) if parts else ""
    while len(parts) > 1 and parts[0] in _RANGES:
        text += _RANGES[parts[0]] + parts[1]
        parts = parts[2:]
    return f"{text} {_UNITS.get(parts[0], parts[0])}" if parts else text


def _value(given: Arguments) -> str:
    text = given.get("1", "").strip()
    if exponent := given.get("e", "").strip():
        text += "×10" + superscript(exponent)
    unit = (given.get("u") or given.get("ul") or "").strip()
    return f"{text} {unit}" if unit else text


def _fraction(given: Arguments) -> str:
    parts = [part.strip() for part in _positional(given)]
    if len(parts) == 3:
        return f"{parts[0]} {parts[1]}/{parts[2]}"
    return "/".join(["1", *parts] if len(parts) == 1 else parts)


def _life(given: Arguments) -> str:
    """Chinese `bd`: years and days of birth and death."""
    born, died = (given.get(a, "").strip() + given.get(b, "").strip() for a, b in (("1", "2"), ("3", "4")))
    return f"（{born}—{died}）" if born or died else ""


def _always(text: str) -> _Render:
    return lambda given: text


def _named(names: str, render: _Render) -> dict[str, _Render]:
    return dict.fromkeys(names.split("; "), render)


_TEXTS: dict[str, _Render] = {
    # What only shows its first argument in another way
    **_named(
        "nowrap; nobr; nobreak; no wrap; small; smaller; big; large; larger; em; strong; bold; b; italic; i; u; "
        "underline; overline; strikethrough; strike; s; del; ins; center; normal; nobold; noitalic; no italic; sc; "
        "smallcaps; small caps; sc1; sc2; smallcaps all; allcaps; abbr; tooltip; mvar; math; var; code; mono; tt; kbd; "
        "samp; pre; char; unicode; visible anchor; vanchor; anchord; term; defn; not a typo; proper name; sic; "
        "linktext; chem2; nastaliq; hebrew; polytonic; flag; flagu; flagcountry; flag country; 국기나라; 국기; "
        "cnspan; columns-list; columns list; col-list; plainlist; plain list; flatlist; div; span; poem; "
        "ルビなし; 下線; 太字; 大文字; 小文字; 縦書き; 圏点; 傍点; 旗; lj; 僻字; 删除线; 한자; 작게; 크게",
        _first("1", "text", "content"),
    ),
    **_named("lang; langx; llang; rtl-lang; script; wikt-lang; langue; wikt lang", _first("2", "text")),
    **_named("transl; transliteration; resize; font size; fontsize; 字号", _last),
    **_named("color; colour; fontcolor; font color; font colour; colored; 色; 색", _first("3", "2", "text")),
    **_named("audio; pronunciation", _first("2")),
    # Quotations: on lines of their own
    **_named(
        "quote; quotation; blockquote; block quote; bquote; cquote; quote box; quote frame; centered pull quote; "
        "pull quote; rquote; poemquote; poem quote; 引用; 引用文; 引用枠; quote2; 인용문; 인용; 引文; zitat",
        _around("\n\n…\n\n", "text", "quote", "1", "content"),
    ),
    # A word and its reading, or its original
    **_named("ruby; ruby-ja; ルビ; ふりがな; 読み仮名; 読み仮名 ruby不使用; furigana; よみがな; 注音; zy", _reading),
    **_named("nihongo; nihongo2; nihongo3; nihongo krt; 日本語", _nihongo),
    **_named("nihongo foot", _first("1", "2")),
    **_named("zh; lang-zh; chinese", _first("c", "s", "t", "p", "1")),
    **_named("korean; lang-ko2; ko-hhrm", _first("hangul", "1")),
    **_named("jpn", _first("j", "1", "hg", "kk")),
    **_named("bd; bdx", _life),
    # Links to articles that this language does not have
    **_named("仮リンク; ill; illm; ill2; interlanguage link; interlanguage link multi", _first("label", "lt", "1")),
    **_named("le; lang link; link-interwiki", _first("3", "lt", "zh", "1")),
    **_named("lien", _first("texte", "fr", "1")),
    **_named("tsl; translink; translated link; internal link helper", _first("4", "3", "2")),
    **_named("section link; slink", _joined(" § ")),
    # Numbers and signs
    **_named("convert; cvt; 換算; convert2", _convert),
    **_named("val; 値", _value),
    **_named("frac; sfrac; fraction; 分数; frac2", _fraction),
    **_named("chem; chemf; gaps; hanzi", _joined()),
    **_named("nombre; unité; date", _joined(" ")),
    **_named("formatnum; num; number; nts; lcfirst; ucfirst", _first("1")),
    "lc": lambda given: given.get("1", "").lower(),
    "uc": lambda given: given.get("1", "").upper(),
    **_named("key press; keypress; key", _joined("+")),
    "sup": lambda given: superscript(given.get("1", "").strip()),
    "sub": lambda given: subscript(given.get("1", "").strip()),
    "e": lambda given: "×10" + superscript(given.get("1", "").strip()),
    "radic": _before("√"),
    **_named("angbr; angle bracket; angle brackets", _around("⟨…⟩")),
    **_named("gloss", _around("'…'")),
    **_named("circa; c.; ca.; ca", lambda given: "c. " + "–".join(part.strip() for part in _positional(given))),
    **_named("floruit; fl.; fl", lambda given: "fl. " + "–".join(part.strip() for part in _positional(given))),
    **_named("reign; r.", lambda given: "r. " + "–".join(part.strip() for part in _positional(given))),
    **_named("as of; asof", lambda given: ("as of " if given.get("lc") else "As of ") + given.get("1", "").strip()),
    **_named("us$; usd", _before("US$")),
    **_named("€; euro; eur", _before("€")),
    **_named("£; gbp; gb£", _before("£")),
    **_named("jp¥; jpy; ¥", _before("¥")),
    **_named("inr; indian rupee", _before("₹")),
    **{name.lower(): _before(f"{name} ") for name in ("USS", "HMS", "SS", "MV", "RMS", "HMAS", "HMCS", "USCGC", "MS")},
    "!": _always(PIPE),
    **_named("=", _always("=")),
    **_named("'; `; apostrophe", _always("'")),
    "'s": _always("'s"),
    **_named("pi", _always("π")),
    **_named("okina", _always("ʻ")),
    **_named("nbsp; space; sp; spaces; thin space; thinsp; zwsp; hair space; ,", _always(" ")),
    **_named("ndash; en dash; –", _always("–")),
    **_named("mdash; em dash; —; emdash", _always("—")),
    **_named("snd; spnd; spaced ndash; spaced en dash; snds; dash", _always(" – ")),
    **_named("·; dot; middot; •; bull; bullet", _always(" · ")),
}
_BY_END = {"フォント": _first("1"), "範囲": _first("1"), " span": _first("1"), "-span": _first("1")}
_BY_BEGINNING = {
    "lang-": _first("1", "text"),
    "script/": _first("1"),
    "link-": _first("3", "1"),
    "internal link helper/": _first("1"),
}
_PREFIX = re.compile(r"^(?:(?:safesubst|subst|template|テンプレート|模板|틀|t)\s*:\s*)+", re.IGNORECASE)
_FUNCTIONS = ("formatnum", "lc", "uc", "lcfirst", "ucfirst")
_OF_THE_TITLE = ("pagename", "basepagename", "fullpagename", "subjectpagename")


def rendered(call: str, title: str) -> str:
    """Return the text of a template's call, "" where it has none that is known.

    Args:
        call: What stands between the braces; bars within its arguments are `PIPE`.
        title: Of the article.
    """
    name, _, rest = call.partition("|")
    name = name.strip().replace("_", " ").lower()
    if ":" in name:
        name = _PREFIX.sub("", name)
        function = name.partition(":")[0]
        if function in _FUNCTIONS:
            # As it is written: the name was made lower case.
            name, rest = function, call.partition(":")[2]
    if name in _OF_THE_TITLE:
        return title
    render = _TEXTS.get(name) or _by_a_part(name)
    return render(_arguments(rest)) if render else ""


@lru_cache(4096)
def _by_a_part(name: str) -> _Render | None:
    for ending, render in _BY_END.items():
        if name.endswith(ending):
            return render
    return next((render for start, render in _BY_BEGINNING.items() if name.startswith(start)), None)


_NAME = re.compile(r"\s*([\w .-]+?)\s*=")


def _arguments(text: str) -> Arguments:
    given: Arguments = {}
    position = 0
    for part in text.split("|"):
        if named := _NAME.match(part):
            given[named[1]] = part[named.end() :].strip()
        else:
            position += 1
            given[str(position)] = part
    return given


@cache
def _disambiguation(language: str) -> re.Pattern[str]:
    names = DISAMBIGUATIONS[""] + DISAMBIGUATIONS.get(language.partition("-")[0], ())
    known = "|".join(re.escape(name).replace(r"\ ", "[ _]") for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"\{{\{{\s*+(?:template:)?(?:{known})\s*+[|}}]|__DISAMBIG__", re.IGNORECASE)


def is_disambiguation(wikitext: str, language: str) -> bool:
    """Say whether a page only tells articles of one name apart: by its template, or the magic word."""
    return bool(_disambiguation(language).search(wikitext))
