"""What an evaluation reads: documents to measure, and prompts to ask with the answers that are right."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_cpt.conversations.forms import is_conversation
from nemo_cpt.corpus.reading.chunks import Feed, take_from
from nemo_cpt.corpus.reading.lines import Take, TextUnder, UnusableError, refuse_surrogates
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation.language import KNOWN
from nemo_cpt.evaluation.questions import SHIPPED, shipped_questions
from nemo_cpt.inference.engine import Message, check_messages

BLOCK_BYTES = 1 << 20
QUESTION_KEYS = ("prompt", "query", "question", "messages")
ANSWER_KEYS = ("answer", "answers")


@dataclass(frozen=True)
class Asked:
    """One prompt.

    Attributes:
        id: its name in the report.
        prompt: its text, to be wrapped; or a conversation, given as it is.
        answers: the replies that are right; empty where there is no telling.
        language: that a reply should be in, as `evaluation.language.KNOWN` names it; None where any will do.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answers: tuple[str, ...] = ()
    language: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts under a name."""

    name: str
    prompts: tuple[Asked, ...]


def read_documents(path: str | Path, json_key: str = "text") -> Iterator[str]:
    """Yield the documents of JSONL (plain, gzip, zstd) or Parquet, a block of them in memory.

    Raises:
        CptError: a line has no text, or the file has none.
    """
    yield from _read(path, TextUnder(json_key))


def holds_conversations(path: str | Path, rather_than_texts: bool, json_key: str = "text") -> bool:
    """Say by its first line whether a file is one of conversations.

    Args:
        path: of JSONL or Parquet.
        rather_than_texts: what a line is that has both.
        json_key: of a text.

    Raises:
        CptError: the file is empty, or its first line is not JSON.
    """
    first = next(_read(path, lambda value: value))
    return is_conversation(first) and (rather_than_texts or json_key not in first)


def prompt_set(spec: str, language: str | None = None) -> PromptSet:
    """Return the prompts that `[NAME=]FILE` or the name of a shipped set stands for.

    A line of the file is `{"prompt" | "query" | "question": TEXT}` or `{"messages": [...]}`, with `"answer"` (a string,
    or a list of them) and `"language"` where there are any. A set whose name is a language is asked in it.

    Args:
        spec: as on the command line.
        language: that replies should be in, where neither the line nor the set's name says.

    Raises:
        CptError: there is no such file, it is empty, or a line is no prompt.
    """
    check_language(language)
    # A file's own name may hold an equals sign.
    named, _, path = ("", "", spec) if "=" not in spec or Path(spec).is_file() else spec.partition("=")
    # A file or folder of that name in the current folder is meant, where there is one.
    if not named and spec in SHIPPED and not Path(spec).exists():
        return PromptSet(spec, tuple(Asked(each.id, each.prompt, (), spec) for each in shipped_questions(spec)))
    name = named or Path(path).name.partition(".")[0]
    language = language or (name if name in KNOWN else None)
    prompts = [replace(each, language=each.language or language) for each in _read(path, _prompt)]
    return PromptSet(name, tuple(replace(each, id=each.id or str(at)) for at, each in enumerate(prompts, 1)))


def check_language(language: str | None) -> None:
    """Raise CptError where replies cannot be told to be in a language."""
    if language is not None and language not in KNOWN:
        raise CptError(f"language is {language!r}; known are {', '.join(KNOWN)}")


def _prompt(value: Any) -> Asked:
    if not isinstance(value, Mapping):
        raise UnusableError("not_an_object", f"a JSON {type(value).__name__}, not an object")
    keys = [key for key in QUESTION_KEYS if key in value]
    if len(keys) != 1:
        found = " and ".join(map(repr, keys)) or f"none, but {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
        raise UnusableError("no_prompt", f"one of {', '.join(QUESTION_KEYS)} is wanted; it has {found}")
    language = value.get("language")
    if language is not None and (not isinstance(language, str) or language not in KNOWN):
        raise UnusableError("unknown_language", f"language is {language!r}; known are {', '.join(KNOWN)}")
    asked = value[keys[0]]
    prompt = _conversation(asked) if keys[0] == "messages" else _text(asked, keys[0])
    return Asked(str(value.get("id", "")), prompt, _answers(value), language)


def _conversation(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise UnusableError("bad_messages", "'messages' is no list of objects with role and content")
    try:
        check_messages(messages)
    except CptError as error:
        raise UnusableError("bad_messages", str(error)) from None
    return tuple(Message(role=each["role"], content=_text(each["content"], "content")) for each in messages)


def _answers(value: Mapping[str, Any]) -> tuple[str, ...]:
    found: Any = next((value[key] for key in ANSWER_KEYS if value.get(key) is not None), [])
    return tuple(_text(each, "answer") for each in (found if isinstance(found, list) else [found]))


def _text(text: Any, key: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UnusableError("no_text", f"{key!r} is {text!r}, not a text")
    refuse_surrogates(text, repr(key))
    return text


def _read(path: str | Path, take: Take) -> Iterator[Any]:
    """Yield what `take` makes of each line, stopping at the first that is unusable."""
    (source,), lines, count = _one_source(path), 0, 0
    for task in Feed([source], None, BLOCK_BYTES):
        found = take_from(task, take)
        # The first ends it: an evaluation on a part of its set would give another number.
        for problem in found.reading.problems:
            raise CptError(f"{path}, line {lines + problem.line + 1}: {problem.detail}. Mend or remove that line")
        yield from found.texts
        if task.damage:
            raise CptError(f"{path} breaks off after line {lines + found.reading.lines}: {task.damage}")
        lines, count = lines + found.reading.lines, count + len(found.texts)
    if not count:
        raise CptError(f"{path} is empty: there is nothing in it to evaluate with")


def _one_source(path: str | Path) -> list[Any]:
    if Path(path).is_dir():
        raise CptError(f"{path} is a folder: name one file")
    return list_sources([str(path)])
