"""Questions with answers out of texts, without a model: a title's text, a continuation, a missing word, a summary."""

import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any

from nemo_cpt.errors import CptError

LANGUAGES = ("en", "ja", "zh")
KINDS = ("title", "continuation", "cloze", "summary")
SLOTS = "slots"
LONGEST_TITLE = 60
SHORTEST, LONGEST = 40, 600  # characters of an answer out of a text, and of the part of a text in a question
TURNS = 3  # how often a document is asked for a question of each kind
BLANK = "____"
KANA = re.compile(r"[\u3041-\u30ff]")
HAN = re.compile(r"[\u4e00-\u9fff]")
LATIN = re.compile(r"[A-Za-z]")
SENTENCE = re.compile(r".*?(?:[。！？]+[」』）]*|[.!?]+[\"')”’]*(?=\s|$)|$)", re.DOTALL)
TERM = {  # words that stand out without a dictionary: katakana, numbers with a unit, names
    "ja": re.compile(
        r"[ァ-ヺー]{3,}|[0-9０-９一二三四五六七八九十百千]+(?:年|月|日|度|人|キロ|メートル|世紀|つ)|「[^」]{2,12}」"
    ),
    "zh": re.compile(r"[0-9一二三四五六七八九十百千]+(?:年|月|日|度|人|公里|米|世纪)|《[^》]{2,12}》|“[^”]{2,12}”"),
    "en": re.compile(r"(?<=[a-z,;] )(?:[A-Z][a-z]{2,}(?: [A-Z][a-z]{2,})*|\d[\d,.]*\d|[a-z]{8,})\b"),
}
ASKED: dict[str, dict[str, tuple[str, ...]]] = {
    "ja": {
        "title": (
            "「{title}」について説明してください。",
            "「{title}」とは何ですか。",
            "{title}のことを教えてください。",
        ),
        "continuation": ("次の文章の続きを書いてください。\n\n{text}", "この文章に続く文を書いてください。\n\n{text}"),
        "cloze": (f"{BLANK}に入る言葉を答えてください。\n\n{{text}}", f"次の文の{BLANK}を埋めてください。\n\n{{text}}"),
        "summary": ("次の段落の要点を一文で述べてください。\n\n{text}", "次の文章を一文にまとめてください。\n\n{text}"),
    },
    "zh": {
        "title": ("请介绍一下“{title}”。", "什么是“{title}”？"),
        "continuation": ("请续写下面的文章。\n\n{text}", "请接着下面的文字往下写。\n\n{text}"),
        "cloze": (f"请填写{BLANK}处的词语。\n\n{{text}}", f"下面句子中的{BLANK}应该填什么？\n\n{{text}}"),
        "summary": ("请用一句话概括下面的段落。\n\n{text}", "请用一句话总结下面的文字。\n\n{text}"),
    },
    "en": {
        "title": ('Tell me about "{title}".', "What is {title}?", "Write a short introduction to {title}."),
        "continuation": ("Continue this text.\n\n{text}", "Write what comes next.\n\n{text}"),
        "cloze": (f"Which word is missing at {BLANK}?\n\n{{text}}", f"Fill in the blank ({BLANK}).\n\n{{text}}"),
        "summary": (
            "State the main point of this paragraph in one sentence.\n\n{text}",
            "Summarise in a sentence.\n\n{text}",
        ),
    },
}


@dataclass(frozen=True)
class Document:
    """A text of a corpus.

    Attributes:
        text: The text, without its title.
        title: Its title, empty if it has none.
        number: Documents before it in the inputs.
    """

    text: str
    title: str
    number: int


@dataclass(frozen=True)
class Question:
    """A question with its answer, of a kind, and the number of the document that it is about."""

    query: str
    answer: str
    kind: str
    document: int


def language_of(text: str) -> str:
    """Return the language that a text's script tells: kana make it Japanese, Chinese characters alone Chinese."""
    kana, han, latin = (len(script.findall(text)) for script in (KANA, HAN, LATIN))
    # By characters: a Latin word is several, so that a few foreign ones do not turn a Japanese text.
    if kana + han <= latin / 4:
        return "en"
    # Japanese without kana is a heading at most.
    return "ja" if kana > (kana + han) / 10 else "zh"


def untitled(text: str, number: int) -> Document:
    """Return the document that a text is; a short first line without a full stop is its title."""
    first, _, rest = text.strip().partition("\n")
    first = first.strip()
    is_title = 0 < len(first) <= LONGEST_TITLE and rest.strip() and not re.search(r"[。！？.!?]$", first)
    return Document(rest.strip(), first, number) if is_title else Document(text.strip(), "", number)


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph, with their spaces."""
    return [found for found in SENTENCE.findall(text) if found.strip()]


def ask(document: Document, kind: str, language: str, chance: random.Random) -> Question | None:
    """Return a question of a kind about a document, None where the document gives none.

    Args:
        document: The document.
        kind: One of `KINDS`: `title` (the answer is the first paragraph), `continuation` (the second half of a
            paragraph), `cloze` (a word left out of a sentence) or `summary` (a paragraph's first sentence, which in
            encyclopedias and news says what the paragraph is about).
        language: Of the question's words, one of `LANGUAGES`.
        chance: What chooses wordings, paragraphs and words.
    """
    paragraphs = [part.strip() for part in document.text.split("\n") if SHORTEST <= len(part.strip()) <= LONGEST]
    if not paragraphs:
        return None
    parts = _MAKERS[kind](document, paragraphs, language, chance)
    if parts is None:
        return None
    given, answer = parts
    asked = chance.choice(ASKED[language][kind])
    return Question(asked.replace("{title}", given).replace("{text}", given), answer.strip(), kind, document.number)


Parts = tuple[str, str] | None


def _title(document: Document, paragraphs: list[str], language: str, chance: random.Random) -> Parts:
    return (document.title, paragraphs[0]) if document.title else None


def _continuation(document: Document, paragraphs: list[str], language: str, chance: random.Random) -> Parts:
    fitting = [parts for parts in map(sentences, paragraphs) if len(parts) > 1]
    if not fitting:
        return None
    parts = chance.choice(fitting)
    half = len(parts) // 2
    return "".join(parts[:half]).strip(), "".join(parts[half:])


def _cloze(document: Document, paragraphs: list[str], language: str, chance: random.Random) -> Parts:
    fitting = [
        (sentence.strip(), term[0].strip("「」《》“”"))
        for sentence in sentences(chance.choice(paragraphs))
        for term in TERM[language].finditer(sentence)
    ]
    # Once: a word that stands elsewhere too would give its own answer away.
    fitting = [(sentence, word) for sentence, word in fitting if sentence.count(word) == 1]
    if not fitting:
        return None
    sentence, word = chance.choice(fitting)
    return sentence.replace(word, BLANK), word


def _summary(document: Document, paragraphs: list[str], language: str, chance: random.Random) -> Parts:
    fitting = [paragraph for paragraph in paragraphs if len(sentences(paragraph)) > 2]
    if not fitting:
        return None
    paragraph = chance.choice(fitting)
    return paragraph, sentences(paragraph)[0]


_MAKERS: dict[str, Callable[[Document, list[str], str, random.Random], Parts]] = {
    "title": _title,
    "continuation": _continuation,
    "cloze": _cloze,
    "summary": _summary,
}


def fill(
    templates: Sequence[Mapping[str, str]], slots: Mapping[str, Sequence[Any]], count: int, chance: random.Random
) -> list[Question]:
    """Return questions that templates with slots make, as many of each template as there are, none twice.

    Args:
        templates: Each with `query` and `answer`, in which `{city}` stands for a value of the slot `city`, and
            `{city[population]}` for a field of it: what belongs together, such as a city and its population, is one
            value with fields.
        slots: The values of each slot: texts, numbers, or objects with fields.
        count: How many questions to make at most.
        chance: What chooses them.

    Raises:
        CptError: A template has no question or answer, or names a slot or field that there is not.
    """
    columns = [_filled(number, template, slots, count, chance) for number, template in enumerate(templates)]
    # In turn, one of each template: a count that is reached early must not leave templates out.
    rows = (question for row in zip_longest(*columns) for question in row if question is not None)
    return list({question.query: question for question in rows}.values())[:count]


def _filled(
    number: int, template: Mapping[str, str], slots: Mapping[str, Sequence[Any]], count: int, chance: random.Random
) -> list[Question]:
    """Fill one template with combinations of values, chosen without making them all."""
    if not isinstance(template, Mapping) or not all(isinstance(template.get(key), str) for key in ("query", "answer")):
        raise CptError(f"Template {number} has not the two texts 'query' and 'answer': {template!r}.")
    text = template["query"] + template["answer"]
    names = [name for name in slots if re.search(rf"\{{{re.escape(name)}[}}\[]", text)]
    # `range` and `sample` count no further; nobody wants more.
    combinations = min(math.prod(len(slots[name]) for name in names), sys.maxsize)
    found = []
    for code in chance.sample(range(combinations), min(count, combinations)):
        values = {}
        for name in names:
            # A combination's number, read as digits of the slots' sizes: each number is another combination.
            code, place = divmod(code, len(slots[name]))
            values[name] = slots[name][place]
        found.append(_fill_one(template, number, values))
    return found


def _fill_one(template: Mapping[str, str], number: int, values: Mapping[str, Any]) -> Question:
    try:
        query, answer = (template[key].format(**values) for key in ("query", "answer"))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise CptError(f"Template {number} cannot be filled: {error!r}. Its slots are {sorted(values)}.") from error
    return Question(query, answer, SLOTS, number)


class Rules:
    """Makes questions by rules.

    Args:
        kinds: Some of `KINDS`.
        filled: Questions out of templates; they take as large a share of the rest as each kind has.
        language: One of `LANGUAGES`; each document's own where it is None.
        seed: What chooses wordings, paragraphs and words.
    """

    def __init__(self, kinds: Sequence[str], filled: Sequence[Question], language: str | None, seed: int) -> None:
        self._kinds, self._filled, self._language = kinds, list(filled), language
        self._chance, self._asked = random.Random(seed), set[str]()
        self.rejected = Counter[str]()

    def make(self, documents: Sequence[Document], wanted: int) -> list[Question]:
        """Return up to `wanted` questions, none that was returned before."""
        share = len(self._kinds) + 1 if documents and self._kinds else 1
        count = min(math.ceil(wanted / share), len(self._filled))
        found, self._filled = self._filled[:count], self._filled[count:]
        # All documents once before any a second time, with another kind at each turn.
        for turn, (number, document) in product(range(TURNS * len(self._kinds)), enumerate(documents)):
            if len(found) >= wanted:
                break
            kind = self._kinds[(turn + number) % len(self._kinds)]
            question = ask(document, kind, self._language or language_of(document.text), self._chance)
            if question is not None and question.query not in self._asked:
                self._asked.add(question.query)
                found.append(question)
        return found[:wanted]
