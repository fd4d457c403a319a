"""Questions with answers about a passage, from a model behind an OpenAI-compatible endpoint."""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

from nemo_cpt.corpus.splitting.duplicates import HeldOut, fingerprint, sketch
from nemo_cpt.errors import CptError
from nemo_cpt.synthesis.questions import Document, Question, language_of

GROUNDED = "grounded"
KEYS = ("NEMO_CPT_API_KEY", "OPENAI_API_KEY")
NAMES = {"ja": "Japanese", "en": "English", "zh": "Chinese"}
PROMPT = """\
You write training data for an assistant. From the passage that you are given, write {pairs} pairs of a question and \
an answer, in {language}. Each question can be understood without the passage and does not mention it. Each answer is \
right according to the passage, complete, in your own words, and at most {longest} characters long. Reply with a JSON \
array of objects with the keys "question" and "answer", and with nothing else."""
LONGEST_PASSAGE = 1500
LONGEST_QUESTION, LONGEST_ANSWER = 300, 600
COPIED, COPIED_SHARE, GRAM = 60, 0.8, 8  # from so many characters on, answers of which so much stands in the passage
SIMILAR = 0.7
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
LICENCES = {
    "llama": 'Llama\'s licence asks that a model trained on its outputs has "Llama" at the beginning of its name.',
    "gemma": "Gemma's terms of use also hold for models that are trained on its outputs.",
    "gpt-": "OpenAI's terms forbid to train models on outputs that compete with its own.",
    "claude": "Anthropic's terms forbid to train models on outputs that compete with its own.",
    "gemini": "Google's terms forbid to train models on outputs that compete with its own.",
}


@dataclass(frozen=True)
class Endpoint:
    """A server that speaks OpenAI's protocol for chats.

    Attributes:
        url: Its base address, such as `http://localhost:8000/v1`.
        model: The model's name there.
        attempts: How often a request is made that the server is too busy for, or that it fails at.
        timeout: Seconds for one.
    """

    url: str
    model: str
    attempts: int = 5
    timeout: float = 300.0

    def ask(self, messages: Sequence[dict[str, str]], seed: int) -> str:
        """Return the model's reply.

        Raises:
            CptError: The server cannot be reached, or refuses.
        """
        import requests

        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "temperature": 0.7, "seed": seed}
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        problem = ""
        for attempt in range(self.attempts):
            time.sleep(min(2.0**attempt, 30.0) / 2 if attempt else 0)
            try:
                answer = requests.post(
                    f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers, timeout=self.timeout
                )
            except requests.RequestException as error:
                problem = f"it cannot be reached ({type(error).__name__})"
                continue
            if answer.status_code == 200:
                return _content(answer, self.url)
            problem = f"it answers {answer.status_code}: {answer.text[:200]}"
            if answer.status_code not in (408, 409, 429) and answer.status_code < 500:
                break  # asking again would not help
        raise CptError(f"The endpoint {self.url} gives no reply: {problem}. A key is taken from {' or '.join(KEYS)}.")


def _content(answer: Any, url: str) -> str:
    try:
        return str(answer.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CptError(f"The endpoint {url} does not speak OpenAI's protocol for chats: {answer.text[:200]}") from error


def request(passage: str, language: str, pairs: int) -> list[dict[str, str]]:
    """Return the messages that ask for pairs about a passage."""
    asked = PROMPT.format(pairs=pairs, language=NAMES[language], longest=LONGEST_ANSWER)
    return [{"role": "system", "content": asked}, {"role": "user", "content": passage}]


def passage_of(document: Document) -> str:
    """Return the beginning of a document, whole paragraphs of it where they fit."""
    text = document.text[:LONGEST_PASSAGE]
    if len(document.text) > LONGEST_PASSAGE and "\n" in text.strip():
        text = text[: text.rstrip().rfind("\n")]
    return f"{document.title}\n\n{text}".strip()


def pairs_of(reply: str, document: int) -> list[Question]:
    """Return the pairs in a model's reply, none where there is no JSON array of them."""
    try:
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
        self._seen = HeldOut(SIMILAR)

    def fault(self, pair: Question, passage: str, language: str) -> str:
        """Return why a pair is not taken, an empty string for one that is."""
        if not (1 < len(pair.query) <= LONGEST_QUESTION and 0 < len(pair.answer) <= LONGEST_ANSWER):
            return "length"
        if REFUSAL.search(pair.answer):
            return "refusal"
        if MENTION.search(pair.query):
            return "mentions_the_passage"
        if language_of(pair.query) != language or (len(pair.answer) >= 10 and language_of(pair.answer) != language):
            return "language"
        if _copied(pair.answer, passage):
            return "copied"
        if self._seen.duplicate(pair.query):
            return "duplicate"
        self._seen.add(fingerprint(pair.query), sketch(pair.query))
        return ""


def _copied(answer: str, passage: str) -> bool:
    if len(answer) < COPIED:
        return False
    grams = [answer[i : i + GRAM] for i in range(len(answer) - GRAM + 1)]
    return sum(gram in passage for gram in grams) > COPIED_SHARE * len(grams)


def licence_warning(model: str) -> str:
    """Return what the terms of a known family of models ask of whoever trains on its outputs."""
    return next((text for name, text in LICENCES.items() if name in model.lower()), "")


class Model:
    """Makes questions with a model; its replies are kept, so that none is asked for twice.

    Args:
        endpoint: Where the model is.
        replies: The file that keeps them, which may be there already.
        language: One of `LANGUAGES`; each passage's own where it is None.
        pairs: Questions to ask for about a passage.
        concurrency: Requests at once.
        seed: Of the model's sampling.
        progress: Told the number of questions found so far.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        replies: Path,
        language: str | None,
        pairs: int,
        concurrency: int,
        seed: int,
        progress: Callable[[int], None],
    ) -> None:
        self._endpoint, self._language, self._pairs = endpoint, language, pairs
        self._concurrency, self._seed, self._progress = concurrency, seed, progress
        self._replies = Replies(replies)
        self._filter = Filter()
        self._found = 0
        self.rejected = Counter[str]()

    def make(self, documents: Sequence[Document], wanted: int) -> list[Question]:
        """Return up to `wanted` questions about the documents, in their order.

        Raises:
            CptError: The endpoint fails; what it gave until then is kept.
        """
        found = list[Question]()
        with ThreadPoolExecutor(self._concurrency) as pool:
            for begin in range(0, len(documents), self._concurrency):
                if len(found) >= wanted:
                    break
                wave = documents[begin : begin + self._concurrency]
                for document, reply in zip(wave, pool.map(self._reply, wave), strict=True):
                    found += self._accepted(document, reply)
                self._progress(self._found + min(len(found), wanted))
        self._found += min(len(found), wanted)
        return found[:wanted]

    def _reply(self, document: Document) -> str:
        passage = passage_of(document)
        messages = request(passage, self._language or language_of(passage), self._pairs)
        asked = hashlib.sha256(orjson.dumps([self._endpoint.model, self._seed, messages])).hexdigest()
        if (known := self._replies.get(asked)) is not None:
            return known
        reply = self._endpoint.ask(messages, self._seed)
        self._replies.keep(asked, self._endpoint.model, document.number, reply)
        return reply

    def _accepted(self, document: Document, reply: str) -> list[Question]:
        passage = passage_of(document)
        language = self._language or language_of(passage)
        pairs = pairs_of(reply, document.number)
        faults = [self._filter.fault(pair, passage, language) for pair in pairs]
        self.rejected.update(filter(None, faults or ["no_pairs"]))
        return [pair for pair, fault in zip(pairs, faults, strict=True) if not fault]


class Replies:
    """The replies of a model in a file, one a line, each on the disk before the next is used."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._known = dict[str, str]()
        if not path.exists():
            return
        sound = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                entry = orjson.loads(line)
                self._known[entry["asked"]] = entry["reply"]
            except (ValueError, KeyError, TypeError):
                break
            sound += len(line) * line.endswith(b"\n")
        os.truncate(path, sound)  # a line that a crash tore goes

    def get(self, asked: str) -> str | None:
        """Return the reply to what has this digest, None if there is none yet."""
        return self._known.get(asked)

    def keep(self, asked: str, model: str, document: int, reply: str) -> None:
        """Add a reply."""
        line = orjson.dumps({"asked": asked, "model": model, "document": document, "reply": reply}) + b"\n"
        with self._lock, self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self._known[asked] = reply
