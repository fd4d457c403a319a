"""Questions with answers about a passage, from a model behind an OpenAI-compatible endpoint."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence

import orjson

from nemo_cpt.corpus.splitting.duplicates import BANDS, PERMUTATIONS, SEED, SHINGLE, fingerprint
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.journal import Journal, key_of
from nemo_cpt.inference.endpoint import EndpointEngine, EndpointError
from nemo_cpt.inference.engine import Message, Sampling
from nemo_cpt.synthesis.questions import Document, Question, language_of

GROUNDED = "grounded"
KEYS = ("NEMO_CPT_API_KEY", "OPENAI_API_KEY")
NAMES = {"ja": "Japanese", "en": "English", "zh": "Chinese"}
# Its digest is part of a job's options: another wording makes another set.
PROMPT = """\
You write training data for an assistant. From the passage that you are given, write {pairs} pairs of a question and \
an answer, in {language}. Each question can be understood without the passage and does not mention it. Each answer is \
right according to the passage, complete, in your own words, and at most {longest} characters long. Reply with a JSON \
array of objects with the keys "question" and "answer", and with nothing else."""
LONGEST_PASSAGE = 1500
LONGEST_QUESTION, LONGEST_ANSWER = 300, 600
COPIED, COPIED_SHARE, GRAM = 60, 0.8, 8  # from so many characters on, answers of which so much stands in the passage
SIMILAR = 0.7
TEMPERATURE = 0.7
REFUSAL = re.compile(
    r"\b(?:as an ai|as a language model|i(?: a|')m sorry|i cannot|i can't|i am unable)\b|"
    r"申し訳|お答えできません|回答できません|AIとして|言語モデルとして|"
    r"作为(?:一个)?(?:AI|人工智能)|很抱歉|无法回答",
    re.IGNORECASE,
)
MENTION = re.compile(
    r"\b(?:the|this) (?:passage|text|article|author)\b|"
    r"(?:この|上記の|次の)(?:文章|文|本文|記事)|本文|筆者|(?:这|上)(?:段|篇)",
    re.IGNORECASE,
)


def open_endpoint(url: str, model: str, concurrency: int) -> EndpointEngine:
    """Return an endpoint, with the key of the environment where there is one."""
    key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
    return EndpointEngine(url, model, api_key=key, concurrency=concurrency, limited=False)


def request(passage: str, language: str, pairs: int) -> list[Message]:
    """Return the messages that ask for pairs about a passage."""
    asked = PROMPT.format(pairs=pairs, language=NAMES[language], longest=LONGEST_ANSWER)
    return [{"role": "system", "content": asked}, {"role": "user", "content": passage}]


def passage_of(document: Document) -> str:
    """Return the beginning of a document, whole paragraphs of it where they fit."""
    text = document.text[:LONGEST_PASSAGE]
    if len(document.text) > LONGEST_PASSAGE and "\n" in text.strip():
        # Back to the last whole paragraph.
        text = text[: text.rstrip().rfind("\n")]
    return f"{document.title}\n\n{text}".strip()


def pairs_of(reply: str, document: int) -> list[Question]:
    """Return the pairs in a model's reply, none where there is no JSON array of them."""
    try:
        # Between the outermost brackets: chatty models put sentences and code fences around them.
        found = orjson.loads(reply[reply.index("[") : reply.rindex("]") + 1])
    except ValueError:
        return []
    pairs = [(item.get("question"), item.get("answer")) for item in found if isinstance(item, dict)]
    return [
        Question(query.strip(), answer.strip(), GROUNDED, document)
        for query, answer in pairs
        if isinstance(query, str) and isinstance(answer, str)
    ]


class Filter:
    """What a pair must pass; it remembers the questions that it let through."""

    def __init__(self) -> None:
        self._asked = _Asked()

    def fault(self, pair: Question, passage: str, language: str) -> str:
        """Return why a pair is not taken, an empty string for one that is."""
        if not (1 < len(pair.query) <= LONGEST_QUESTION and 0 < len(pair.answer) <= LONGEST_ANSWER):
            return "length"
        if REFUSAL.search(pair.answer):
            return "refusal"
        if MENTION.search(pair.query):
            return "mentions_the_passage"
        # Short answers are names and numbers, whose script says nothing.
        if language_of(pair.query) != language or (len(pair.answer) >= 10 and language_of(pair.answer) != language):
            return "language"
        if _copied(pair.answer, passage):
            return "copied"
        # Last, and so only of those taken: what was refused keeps nobody out.
        return "" if self._asked.is_new(pair.query) else "duplicate"


class _Asked:
    """Questions, told from each other one by one."""

    def __init__(self) -> None:
        from rensa import RMinHashDeduplicator

        self._prints = set[int]()
        self._sketches = RMinHashDeduplicator(SIMILAR, PERMUTATIONS, True, BANDS, SEED)

    def is_new(self, question: str) -> bool:
        """Add a question; return False where it, or nearly it, is there already."""
        from rensa import RMinHash

        text_print = fingerprint(question)
        if text_print in self._prints:
            return False
        plain = "".join(question.split()).lower()
        sketch = RMinHash(PERMUTATIONS, SEED)
        sketch.update([plain[i : i + SHINGLE] for i in range(max(len(plain) - SHINGLE + 1, 1))])
        if self._sketches.get_duplicates(sketch):
            return False
        self._prints.add(text_print)
        self._sketches.add(str(len(self._prints)), sketch)  # under a key that nobody asks for
        return True


def _copied(answer: str, passage: str) -> bool:
    if len(answer) < COPIED:
        return False
    # By grams of characters, so that a changed word here and there does not hide a copy.
    grams = [answer[i : i + GRAM] for i in range(len(answer) - GRAM + 1)]
    return sum(gram in passage for gram in grams) > COPIED_SHARE * len(grams)


class Model:
    """Makes questions with a model; its replies are kept, so that none is asked for twice.

    Args:
        engine: The endpoint where the model is.
        replies: What keeps them, those of earlier runs too.
        language: One of `LANGUAGES`; each passage's own where it is None.
        pairs: Questions to ask for about a passage.
        seed: Of the model's sampling.
        progress: Told the number of questions found so far.
    """

    def __init__(
        self,
        engine: EndpointEngine,
        replies: Journal,
        language: str | None,
        pairs: int,
        seed: int,
        progress: Callable[[int], None],
    ) -> None:
        self._engine, self._replies, self._language, self._pairs = engine, replies, language, pairs
        self._sampling, self._progress = Sampling(temperature=TEMPERATURE, seed=seed), progress
        self._filter = Filter()
        self._found = 0
        self.rejected = Counter[str]()

    def make(self, documents: Sequence[Document], wanted: int) -> list[Question]:
        """Return up to `wanted` questions about the documents, in their order.

        Raises:
            CptError: The endpoint fails; what it gave until then is kept.
        """
        found = list[Question]()
        # In waves, so that no reply is paid for that nobody needs; taken in the documents' order and not in that of
        # the replies, since the filter remembers: the same replies must always make the same sets.
        for begin in range(0, len(documents), self._engine.concurrency):
            if len(found) >= wanted:
                break
            wave = documents[begin : begin + self._engine.concurrency]
            for document, reply in zip(wave, self._replies_to(wave), strict=True):
                found += self._accepted(document, reply)
            self._progress(self._found + min(len(found), wanted))
        self._found += min(len(found), wanted)
        return found[:wanted]

    def _replies_to(self, wave: Sequence[Document]) -> list[str]:
        prompts = [self._prompt(document) for document in wave]
        keys = [key_of(self._engine.model, prompt, self._sampling) for prompt in prompts]
        texts = {place: known["text"] for place, key in enumerate(keys) if (known := self._replies.get(key))}
        missing = [place for place in range(len(wave)) if place not in texts]
        try:
            # In the order in which they end: each is kept at once, so that a killed run has it.
            for index, reply in self._engine.generate([prompts[place] for place in missing], self._sampling):
                place = missing[index]
                record = {"model": self._engine.model, "document": wave[place].number, "text": reply.text}
                self._replies.keep(keys[place], record)
                texts[place] = reply.text
        except EndpointError as error:
            raise CptError(f"{error} (a key is taken from {' or '.join(KEYS)})") from error
        return [texts[place] for place in range(len(wave))]

    def _prompt(self, document: Document) -> list[Message]:
        passage = passage_of(document)
        return request(passage, self._language or language_of(passage), self._pairs)

    def _accepted(self, document: Document, reply: str) -> list[Question]:
        passage = passage_of(document)
        language = self._language or language_of(passage)
        pairs = pairs_of(reply, document.number)
        faults = [self._filter.fault(pair, passage, language) for pair in pairs]
        self.rejected.update(filter(None, faults or ["no_pairs"]))
        return [pair for pair, fault in zip(pairs, faults, strict=True) if not fault]
