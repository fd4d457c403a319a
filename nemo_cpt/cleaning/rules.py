"""All rules of a cleaning, in their order: as Python objects, and as YAML."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from nemo_cpt.arguments import checked
from nemo_cpt.cleaning.characters import folded, kinds
from nemo_cpt.cleaning.contamination import Contamination
from nemo_cpt.cleaning.duplicates import Duplicates
from nemo_cpt.cleaning.heuristics import (
    Boilerplate,
    CharacterRepetition,
    ChineseScript,
    Duplication,
    JapaneseScript,
    KoreanScript,
    Length,
    Lines,
    Prose,
    Sentences,
    WordRepetition,
    WordStatistics,
)
from nemo_cpt.cleaning.language import Language
from nemo_cpt.cleaning.masking import Masking
from nemo_cpt.cleaning.repair import Repair
from nemo_cpt.cleaning.rule import Rule
from nemo_cpt.errors import CptError
from nemo_cpt.strict_yaml import StrictLoader

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Repair,
        Boilerplate,
        Length,
        JapaneseScript,
        ChineseScript,
        KoreanScript,
        Language,
        Prose,
        WordStatistics,
        Lines,
        Sentences,
        Duplication,
        CharacterRepetition,
        WordRepetition,
        Masking,
        Contamination,
    )
}


@checked
@dataclass(frozen=True)
class Rules:
    """What a document goes through, and what is done with those that are left.

    Attributes:
        language: Of the texts: what `Contamination` takes for words.
        rules: In order.
        duplicates: Compared last, over the whole corpus: what was repaired and masked is equal then.
    """

    language: str
    rules: tuple[Rule, ...]
    duplicates: Duplicates = field(default_factory=Duplicates)

    @checked
    def with_limits(self, **limits: Mapping[str, Any] | None) -> "Rules":
        """Return these rules with other limits, such as `with_limits(length={"min_characters": 200}, prose=None)`.

        Args:
            limits: By rule, or `duplicates`, the limits that change; None leaves the rule out.

        Raises:
            CptError: There is no such rule among these, or no such limit.
        """
        described = self.as_dict()
        _refuse_unknown(limits, [*(rule.name for rule in self.rules), "duplicates"], "limits")
        duplicates = limits.get("duplicates", {})
        # What is compared over the corpus is no rule in the list that could be left out.
        described["duplicates"] |= {"exact": False, "near": None} if duplicates is None else duplicates
        kept = [each for each in described["rules"] if limits.get(each["rule"], {}) is not None]
        described["rules"] = [each | dict(limits.get(each["rule"]) or {}) for each in kept]
        return rules_of(described, "limits")

    def without_contamination_of(self, files: tuple[str, ...]) -> "Rules":
        """Return these rules with further evaluation sets, of which no document may hold a part."""
        if not files:
            return self
        # Widened where it stands: its place among the rules decides what the others have changed of the text by then.
        known = next((rule for rule in self.rules if isinstance(rule, Contamination)), None)
        if known is None:
            rules = (*self.rules, Contamination.of(self.language, files))
        else:
            wider = replace(known, files=(*known.files, *files))
            rules = tuple(wider if rule is known else rule for rule in self.rules)
        return replace(self, rules=rules)

    def load(self) -> None:
        """Read what the rules need.

        Raises:
            CptError: Something cannot be had, or a limit makes no sense.
        """
        kinds(), folded()  # here, so that forked workers share the tables
        for rule in self.rules:
            rule.load()

    def as_dict(self) -> dict[str, Any]:
        """Return them as plain data."""
        # The name is a class variable, which `asdict` leaves out.
        rules = [{"rule": rule.name} | _plain(asdict(rule)) for rule in self.rules]
        return {"language": self.language, "rules": rules, "duplicates": asdict(self.duplicates)}

    def to_yaml(self) -> str:
        """Return them as YAML, which `read_rules` reads."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=120)


def chosen_rules(rules: Rules | str) -> Rules:
    """Return the rules that `clean` is given: themselves, those of a language, or those of a YAML file.

    Raises:
        CptError: There are none for the language, or the file holds none.
    """
    if isinstance(rules, Rules):
        return rules
    return read_rules(rules) if rules.endswith((".yaml", ".yml")) else rules_for(rules)


@checked
def read_rules(path: str | Path) -> Rules:
    """Read rules from YAML.

    Raises:
        CptError: The file cannot be read, or names a rule, a limit or a value that there is not.
    """
    try:
        described = yaml.load(Path(path).read_text("utf-8"), StrictLoader)
    except CptError as error:
        raise CptError(f"{path}, {error.message}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CptError(f"{path} cannot be read as YAML of rules: {error}") from None
    return rules_of(described, str(path))


def rules_of(described: Any, where: str = "rules") -> Rules:
    """Return the rules that plain data describe, as `Rules.as_dict` gives them.

    Raises:
        CptError: They name a rule, a limit or a value that there is not.
    """
    if not isinstance(described, Mapping) or not isinstance(described.get("rules"), list):
        raise CptError(f"{where}: no list of rules; `nemo-cpt clean --show-config --language ja` shows one.")
    _refuse_unknown(described, ("language", "rules", "duplicates"), where)
    if not isinstance(described.get("language"), str):
        raise CptError(f"{where}: language is {described.get('language')!r}; name one, such as ja.")
    rules = tuple(_rule(each, f"{where}, rule {number}") for number, each in enumerate(described["rules"], 1))
    duplicates = _made(Duplicates, described.get("duplicates", {}), f"{where}, duplicates")
    return Rules(described["language"], rules, duplicates)


def _rule(described: Any, where: str) -> Rule:
    if not isinstance(described, Mapping) or not isinstance(described.get("rule"), str):
        raise CptError(f"{where}: {described!r} names no rule; write it as rule: NAME, and its limits below.")
    name, limits = described["rule"], {key: value for key, value in described.items() if key != "rule"}
    if name not in RULES:
        raise CptError(f"{where}: there is no rule {name!r}{_meant(name, RULES)}; there are {', '.join(RULES)}.")
    return _made(RULES[name], limits, f"{where} ({name})")


def _made(kind: Any, values: Any, where: str) -> Any:
    """Return an object of a class of limits, which checks their values; here it is seen that there are such limits."""
    if not isinstance(values, Mapping):
        raise CptError(f"{where}: {values!r} is no mapping of limits.")
    _refuse_unknown(values, [each.name for each in fields(kind)], where)
    required = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise CptError(f"{where}: {', '.join(missing)} is missing.")
    try:
        return kind(**values)
    except CptError as error:
        raise CptError(f"{where}, {error.message}") from None


def _refuse_unknown(given: Mapping[Any, Any], known: Any, where: str) -> None:
    for name in given:
        if name not in known:
            raise CptError(f"{where}: there is no {name!r}{_meant(str(name), known)}; there are {', '.join(known)}.")


def _meant(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


JAPANESE_BOILERPLATE = (
    "無断転載を禁",
    "All rights reserved",
    "JavaScriptを有効",
    "JavaScript を有効",
    "スポンサーリンク",
    "スポンサードリンク",
    "この記事へのトラックバック",
    "この記事をシェア",
    "プライバシーポリシー",
    "特定商取引法に基づく表記",
    "サイトマップ",
    "利用規約",
    "Cookieを使用",
    "クッキーを使用",
    "メルマガ登録",
    "関連記事",
    "続きを読む",
    "トップページへ",
    "ページトップへ",
)
ENGLISH_BOILERPLATE = (  # C4's, and FineWeb's list of policies
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
    "all rights reserved",
)
CHINESE_BOILERPLATE = (
    "版权所有",
    "版權所有",
    "未经许可",
    "未經許可",
    "转载请注明",
    "轉載請註明",
    "隐私政策",
    "隱私政策",
    "ICP备",
    "点击查看更多",
    "扫描二维码",
    "All rights reserved",
    "javascript",
)
KOREAN_BOILERPLATE = (
    "무단 전재",
    "무단전재",
    "재배포 금지",
    "재배포금지",
    "저작권자",
    "개인정보처리방침",
    "개인정보 처리방침",
    "이용약관",
    "All rights reserved",
    "javascript",
)


@checked
def rules_for(language: str) -> Rules:
    """Return the rules for a language.

    The order: characters are repaired first, since all that follows reads them; lines that are no content go before
    anything is counted; then what is cheap and drops much, then what costs more; masking comes behind the counting,
    which its words would disturb, and evaluation sets and duplicates are looked for in what is left.

    Args:
        language: `ja`, `en`, `zh` or `ko`.

    Raises:
        CptError: There are none for that language.
    """
    if language not in _FOR:
        raise CptError(
            f"There are no rules for the language {language!r}; there are for {', '.join(_FOR)}. For another one, edit "
            "those of en (--show-config --language en), and give them with --config."
        )
    # Masking last: it is looked for in what is kept alone, and its words are not counted by the others.
    return Rules(language, (Repair(), *_FOR[language], Masking(countries=_COUNTRIES[language])))


_COUNTRIES = {"ja": ("jp",), "en": ("us",), "zh": ("cn",), "ko": ("kr",)}
# What removes lines comes before what counts them; else what is cheap comes first: behind a failure nothing is asked.
_FOR: dict[str, tuple[Rule, ...]] = {
    "ja": (
        Boilerplate(phrases=JAPANESE_BOILERPLATE),
        Length(min_characters=400),
        JapaneseScript(),
        Prose(),
        Sentences(),
        Duplication(
            max_paragraph_share=None,  # Swallow's paragraphs are lines
            max_paragraph_character_share=None,
            max_sentence_share=0.3,
            max_sentence_character_share=0.2,
        ),
        CharacterRepetition(),
    ),
    "en": (
        # As FineWeb orders them: language, Gopher's repetition and quality, C4 without its mark at each line's end, its
        # own.
        Language("en"),
        Boilerplate(phrases=ENGLISH_BOILERPLATE, min_words=3),
        Length(min_characters=200),
        WordStatistics(),
        Prose(max_curly_brackets=0, min_sentences=5),
        Lines(),
        Duplication(),
        WordRepetition(),
    ),
    "zh": (
        Boilerplate(phrases=CHINESE_BOILERPLATE),
        Length(min_characters=150),
        ChineseScript(),
        Prose(),
        Sentences(min_mean_length=8, max_mean_length=120, max_length=None),
        Lines(min_punctuated_share=0.106, short=10, max_duplicate_character_share=None),
        Duplication(max_line_share=0.287),
        CharacterRepetition(),
    ),
    "ko": (
        Boilerplate(phrases=KOREAN_BOILERPLATE),
        Length(min_characters=200),
        KoreanScript(),
        Prose(),
        WordStatistics(
            min_mean_length=1.5, max_mean_length=8, min_lettered_share=0.791, min_stop_words=None, stop_words=()
        ),
        Lines(min_punctuated_share=0.062, short=15, max_duplicate_character_share=None),
        Duplication(max_line_share=0.374),
        WordRepetition(
            max_top_share={2: 0.282, 3: 0.228, 4: 0.185},
            max_repeated_share={5: 0.201, 6: 0.184, 7: 0.168, 8: 0.154, 9: 0.14, 10: 0.127},
        ),
    ),
}
