"""In which language a model replies, and how often in the one that it was asked in.

A reply is cut to what is language (no code, formulas, addresses, markup, numbers), and judged sentence by sentence; a
sentence counts by its bytes in UTF-8, by which a Han character weighs as much as three Latin letters. What stands in
quotes or brackets inside a line, and names in Latin letters, do not change the language of the sentence around them.

Japanese, Korean and Chinese are told apart by their characters. Kana make a sentence Japanese and Hangul Korean. Han
alone is Chinese or Japanese: Traditional Chinese where Big5 has more of its characters than GB 2312, Simplified where
GB 2312 has more, Japanese where only JIS X 0208 has them all. Where they are characters of several (東京), the rest of
the reply decides, and then the language asked in. Everything else is told by lingua, restricted to `KNOWN`.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, get_args

from nemo_cpt.errors import CptError
from nemo_cpt.installed import extra

if TYPE_CHECKING:
    from nemo_cpt.inference.engine import Message, Prompt

KNOWN = {  # as BCP 47 names them, but for what lingua calls Chinese
    "ja": "Japanese",
    "zh-tw": "Traditional Chinese",
    "zh-cn": "Simplified Chinese",
    "ko": "Korean",
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "nl": "Dutch",
    "pl": "Polish",
    "tr": "Turkish",
    "id": "Indonesian",
    "vi": "Vietnamese",
    "th": "Thai",
    "hi": "Hindi",
    "ar": "Arabic",
    "ru": "Russian",
    "uk": "Ukrainian",
}
MIXED, UNDECIDED, EMPTY, ROMAJI, OTHER = "mixed", "undecided", "empty", "ja-latn", "other"
LARGEST_FOREIGN = 0.15  # of a reply in other languages before it is mixed
FEWEST_LETTERS = 16  # by which a language that is neither English nor the one asked in can be told
READ = 200  # characters of a sentence that lingua reads; in long repetitions its probabilities underflow to 0
LONGEST_QUOTE = 60  # characters; a longer one is a text of its own
MOST_KANJI = 20  # different ones in a row without kana in Japanese: names of offices, not sentences

Wrapper = Literal["none", "system", "chat"]
WRAPPERS: tuple[Wrapper, ...] = get_args(Wrapper)
SYSTEM_PROMPTS = {
    "ja": "あなたは親切なアシスタントです。質問には日本語で答えてください。",
    "zh-tw": "你是一位樂於助人的助理。請用繁體中文回答問題。",
    "zh-cn": "你是一位乐于助人的助理。请用简体中文回答问题。",
    "ko": "당신은 친절한 비서입니다. 질문에 한국어로 답하세요.",
}

_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`"  # code, also of a fence that the reply's end cut
    r"|\$\$.{,999}?\$\$|\\\[.{,999}?\\\]|\\\(.{,999}?\\\)|\$(?!\s)[^$\n]*[^$\s]\$(?!\d)"  # formulas
    r"|<\|[^|<>\n]*\|>|</?[A-Za-z][^<>\n]*>|^(?:assistant|user|system):?$"  # special tokens, tags, roles
    r"|(?:https?|ftp)://[!-~]+|www\.[!-~]+|(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.-]+"  # addresses
    r"|(?<![A-Za-z_.-])[A-Za-z_.-]*[0-9_][A-Za-z0-9_.-]*",  # numbers, H2O, snake_case
    re.DOTALL | re.ASCII | re.MULTILINE,
)
_QUOTED = re.compile(
    rf"\([^()\n]{{,{LONGEST_QUOTE}}}\)|\"[^\"\n]{{,{LONGEST_QUOTE}}}\"|“[^“”\n]{{,{LONGEST_QUOTE}}}”"
    rf"|「[^「」\n]{{,{LONGEST_QUOTE}}}」|『[^『』\n]{{,{LONGEST_QUOTE}}}』|《[^《》\n]{{,{LONGEST_QUOTE}}}》"
)
_SENTENCE_END = re.compile(r"(?<=。)|(?<=[.!?])(?![!-~])")  # not in 3.14 or example.com
_KANA, _HANGUL = r"\u3041-\u3096\u30a1-\u30fa", r"\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_EAST_ASIAN = re.compile(f"[{_KANA}{_HANGUL}{_HAN}]")
_GRAMMAR = re.compile(f"[\u3041-\u3096{_HANGUL}]")  # Hiragana and Hangul: what makes sentences of names
_HAN_RUN = re.compile(f"[{_HAN}々]+")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+(?:['’-][A-Za-z\u00c0-\u024f\u1e00-\u1eff]+)*")
_WORD = re.compile(r"[^\W\d_]{3}")  # π and Ω are no Greek
_LATIN_RUN = re.compile(f"[^{_KANA}{_HANGUL}{_HAN}。、，]+")
_CLAUSE_WORDS = 4
_ENGLISH = re.compile(  # words that no list of names has
    r"\b(?:an|and|answer|any|are|as|at|be|by|but|can|did|do|does|for|from|had|has|have|he|hello|her|here|hi|his|how|if|in|is"
    r"|it|just|me|my|no|not|of|okay|on|or|our|please|she|should|so|sorry|sure|thanks?|that|the|their|them|then|there"
    r"|these|they|this|to|was|we|well|were|what|when|where|which|who|why|will|with|would|yes|you|your)\b",
    re.IGNORECASE,
)
# Words of Chinese sentences that no Japanese text has without kana beside them.
_CHINESE = re.compile(
    "[是了你她它這这們们很嗎吗呢吧啊就沒没您哪什麼么嘛咱俺]|我[^々]|不(?:知|能|會|会|要|用)|可以|所以|因[為为]|如果|有[幾几哪]|多[久少]|的[^々的]"
)
_SYLLABLES = re.compile(
    r"(?:(?:[kgsztdnhbpmrfjwy]|[kgsztcnhbpmr]y|sh|ch|ts|([kstpcg])\1[hs]?|([kstp])\2y)?[aiueoāīūēō]|n(?![aiueoāīūēōy]))+",
    re.IGNORECASE,
)
_PARTICLE = re.compile(r"\b(?:wa|ga|wo|no|ni|de|to|mo|o|e|ka)\b", re.IGNORECASE)
_ROMAJI_WORD = re.compile(
    r"\b(?:wa|ga|wo|hai|iie|kore|sore|watashi|nihon|nihongo|desu|deshita|deshou|kudasai|sumimasen|arigatou?|gozaimashita"
    r"|konnichiwa|konbanwa|ohayou|sayounara|\w*(?:masu|mashita|masen))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """What a reply is in.

    Attributes:
        language: one of `KNOWN`, `ja-latn` for Japanese in Latin letters, `other` for scripts that none of `KNOWN`
            has, `mixed`, `undecided` where nothing tells a language (numbers, code, names), or `empty`.
        shares: the part of its text in each language, where any can be told.
    """

    language: str
    shares: dict[str, float]


def judge_language(reply: str, asked: str) -> Verdict:
    """Say in which language a reply is; the same for the same reply, always.

    Args:
        reply: what the model replied.
        asked: the language of the question, one of `KNOWN`: what a word or name that exists in several is taken for.

    Raises:
        CptError: the language is not known, or lingua is not installed.
    """
    language_name(asked)
    # Full-width Latin letters and half-width kana are the same letters.
    text = unicodedata.normalize("NFKC", reply)
    if not text.strip():
        return Verdict(EMPTY, {})
    weights, names, shared = Counter[str](), Counter[str](), list[tuple[int, tuple[str, ...]]]()
    for line in _NO_LANGUAGE.sub(" ", text).splitlines():
        # A quotation in another language does not change the sentence's, unless it is all there is.
        unquoted = _QUOTED.sub(" ", line)
        for sentence in _SENTENCE_END.split(unquoted if _letters(unquoted) else line):
            for part in _parts(sentence):
                candidates = _candidates(part, asked)
                if len(candidates) == 1:
                    (names if _only_names(part) else weights)[candidates[0]] += _weight(part)
                elif candidates:
                    shared.append((_weight(part), candidates))
    # From what could be told alone, so that the shared ones do not decide about one another.
    told = Counter(weights)
    for weight, candidates in shared:
        weights[max(candidates, key=lambda each: (told[each], each == asked))] += weight
    # A name says something of a reply that has nothing else: every language has it.
    return _verdict(+weights or +names)  # without what has no letters that Python's Unicode knows


def _verdict(weights: Mapping[str, int]) -> Verdict:
    if not weights:
        return Verdict(UNDECIDED, {})
    total = sum(weights.values())
    shares = {code: weight / total for code, weight in sorted(weights.items(), key=lambda each: (-each[1], each[0]))}
    first = next(iter(shares))
    return Verdict(first if 1 - shares[first] < LARGEST_FOREIGN else MIXED, shares)


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def _weight(text: str) -> int:
    return sum(len(char.encode()) for char in text if char.isalpha())


def _parts(sentence: str) -> list[str]:
    """Return what to judge by itself: clauses in Latin letters, and what is left of the sentence around them."""
    if not _EAST_ASIAN.search(sentence):
        return [sentence]
    clauses = [run for run in _LATIN_RUN.findall(sentence) if _is_clause(run)]
    for clause in clauses:
        # Once each: the clause may stand elsewhere as a part of another one.
        sentence = sentence.replace(clause, " ", 1)
    return [*clauses, sentence]


def _is_clause(run: str) -> bool:
    words = _LATIN_WORD.findall(run)
    return len(words) >= _CLAUSE_WORDS and sum(word[0].islower() for word in words) * 2 > len(words)  # no title


def _candidates(part: str, asked: str) -> tuple[str, ...]:
    """Return the languages that a sentence may be in; none where nothing tells."""
    east_asian, words = _EAST_ASIAN.findall(part), _LATIN_WORD.findall(part)
    if not east_asian:
        return _of_other_scripts(part, words, asked)
    # By bytes, as sentences are weighed: a Han character is as much as three Latin letters.
    outweighed = sum(map(len, words)) > len("".join(east_asian).encode())
    if outweighed and _ENGLISH.search(part) and not _GRAMMAR.search(part):
        return ("en",)
    return _of_east_asian(part)


def _of_east_asian(part: str) -> tuple[str, ...]:
    hangul, kana, han = (len(re.findall(f"[{script}]", part)) for script in (_HANGUL, _KANA, _HAN))
    if hangul > kana:
        return ("ko",)
    if kana * 6 > han:  # a Chinese sentence may name something in kana
        return ("ja",)
    return _of_han(part)


def _of_han(part: str) -> tuple[str, ...]:
    runs = _HAN_RUN.findall(part)
    letters = "".join(runs).replace("々", "")
    traditional, simplified, japanese = (_missing(letters, code) for code in ("big5", "gb2312", "shift_jis"))
    # How many of its characters a standard lacks: the fewest tell where it was written.
    chinese = {"zh-cn": simplified, "zh-tw": traditional}
    nearest = tuple(code for code, missing in chinese.items() if missing == min(chinese.values()))
    if japanese or _CHINESE.search(part) or max(len(set(run)) for run in runs) > MOST_KANJI:
        return nearest
    return ("ja",) if min(chinese.values()) else (*nearest, "ja")


def _missing(letters: str, encoding: str) -> int:
    return len(letters) - len(letters.encode(encoding, "ignore").decode(encoding))


def _of_other_scripts(part: str, words: list[str], asked: str) -> tuple[str, ...]:
    others = _LATIN_WORD.sub(" ", part)
    only_names = all(word[0].isupper() for word in words) and not _ENGLISH.search(part)
    # Latin words among another script's do not decide: less than half of the letters, or names alone.
    if _letters(others) * 2 > _letters(part) or (only_names and _WORD.search(others)):
        return _first(_confidences(others)) or ((OTHER,) if _WORD.search(others) else ())
    if not words:
        return ()
    if _is_romaji(part, words):
        return (ROMAJI,)
    if only_names:
        return _of_names(part, asked)
    return _of_latin(part, words, asked)


def _only_names(part: str) -> bool:
    """Whether a sentence is made of names in Latin letters."""
    words = _LATIN_WORD.findall(part)
    if not words or _letters(_LATIN_WORD.sub(" ", part)):
        return False
    return all(word[0].isupper() for word in words) and not _ENGLISH.search(part)


def _of_names(part: str, asked: str) -> tuple[str, ...]:
    """Names in Latin letters are words of a language asked in that is written so, and of no language elsewhere."""
    return _of_latin(part, [], asked) if _is_latin(asked) else ()


def _of_latin(part: str, words: list[str], asked: str) -> tuple[str, ...]:
    confidences = _confidences(part)
    expected = {code: confidences.get(code, 0.0) for code in ("en", asked) if _is_latin(code)}
    guess = _first(confidences)
    # Short texts are told badly by n-grams: only a clear guess may contradict what was asked in.
    if not guess or sum(map(len, words)) < FEWEST_LETTERS or confidences[guess[0]] < 2 * max(expected.values()):
        return _first(expected)
    return guess


def _is_latin(language: str) -> bool:
    return language not in ("ja", "zh-tw", "zh-cn", "ko", "th", "hi", "ar", "ru", "uk")


def _first(confidences: Mapping[str, float]) -> tuple[str, ...]:
    best = max(confidences, key=lambda code: confidences[code], default=None)
    return (best,) if best is not None and confidences[best] > 0 else ()


def _is_romaji(part: str, words: list[str]) -> bool:
    spelled = sum(len(word) for word in words if _SYLLABLES.fullmatch(word))
    told = _ROMAJI_WORD.search(part) or len(_PARTICLE.findall(part)) > 2
    return bool(told) and spelled > 0.9 * sum(map(len, words))


@lru_cache(4096)
def _confidences(text: str) -> dict[str, float]:
    values = _detector().compute_language_confidence_values(text[:READ])
    return {_code(each.language): each.value for each in values if each.value > 0}


def _code(language: Any) -> str:
    code = language.iso_code_639_1.name.lower()
    return "zh-cn" if code == "zh" else code


@cache
def _detector() -> Any:
    try:
        from lingua import IsoCode639_1, LanguageDetectorBuilder
    except ImportError as error:
        raise CptError(f"the language of replies is told by lingua, which is not installed: {extra('eval')}") from error
    codes = {IsoCode639_1.from_str(code.partition("-")[0].upper()) for code in KNOWN}
    return LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()


def language_name(code: str) -> str:
    """Return a language's name in English.

    Raises:
        CptError: it is not one of `KNOWN`.
    """
    if code not in KNOWN:
        raise CptError(f"the language {code!r} is not known; known are {', '.join(KNOWN)}")
    return KNOWN[code]


@dataclass(frozen=True)
class LanguageShare:
    """How many replies to questions in a language are in it.

    Attributes:
        asked: the language of the questions.
        counts: replies of each class: languages, `mixed`, `undecided`, `empty`; most frequent first.
        confidence: of the interval.
    """

    asked: str
    counts: dict[str, int]
    confidence: float = 0.95

    @property
    def replies(self) -> int:
        """All replies."""
        return sum(self.counts.values())

    @property
    def judged(self) -> int:
        """Replies but for those that tell no language; empty ones are among them."""
        return self.replies - self.counts.get(UNDECIDED, 0)

    @property
    def share(self) -> float | None:
        """The part of the judged replies that is in the language asked in; None where there are none."""
        return self.counts.get(self.asked, 0) / self.judged if self.judged else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the share."""
        return wilson_interval(self.counts.get(self.asked, 0), self.judged, self.confidence)

    @property
    def summary(self) -> str:
        """One line for people."""
        others = ", ".join(f"{code} {count}" for code, count in self.counts.items() if code != self.asked)
        low, high = self.interval
        share = "undecided" if self.share is None else f"{self.share:.1%} ({low:.1%} to {high:.1%})"
        return f"{self.asked}: {share} of {self.judged} replies" + (f"; {others}" if others else "")


def language_share(replies: Iterable[str], asked: str, confidence: float = 0.95) -> LanguageShare:
    """Judge the replies to questions in one language.

    Raises:
        CptError: the language is not known, or lingua is not installed.
    """
    language_name(asked)
    counts = Counter(judge_language(reply, asked).language for reply in replies)
    return LanguageShare(asked, dict(sorted(counts.items(), key=lambda each: (-each[1], each[0]))), confidence)


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a probability (Wilson 1927, JASA 22); (0, 1) without trials.

    Raises:
        CptError: `successes` is not between 0 and `trials`, or `confidence` not between 0 and 1.
    """
    if not (0 <= successes <= trials and 0 < confidence < 1):
        raise CptError(
            f"{successes} successes of {trials} trials with confidence {confidence}: there is no such interval"
        )
    if trials == 0:
        return 0.0, 1.0
    # As if z² further trials had succeeded half the time: no interval of 0 of 5 or 5 of 5 has a width of 0.
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def wrap(question: str, wrapper: str, asked: str, *, chat_template: bool) -> "Prompt":
    """Return the prompt that asks a question.

    Args:
        question: its text.
        wrapper: "none" for the bare text, "system" for a system prompt in the question's language that asks for replies
            in it, "chat" for a user's message alone.
        asked: the question's language.
        chat_template: whether the model has one; without it a system prompt stands as text above the question.

    Raises:
        CptError: there is no such wrapper or language, or the model has no chat template to wrap with.
    """
    if wrapper not in WRAPPERS:
        raise CptError(f"there is no wrapper {wrapper!r}; there are {', '.join(WRAPPERS)}")
    default = f"You are a helpful assistant. Answer the questions in {language_name(asked)}."
    system = SYSTEM_PROMPTS.get(asked, default)
    if wrapper == "none":
        return question
    if not chat_template:
        if wrapper == "chat":
            raise CptError('the model has no chat template, which the wrapper "chat" needs; take "none" or "system"')
        return f"{system}\n\n{question}\n"
    before: list[Message] = [{"role": "system", "content": system}] if wrapper == "system" else []
    return [*before, {"role": "user", "content": question}]
