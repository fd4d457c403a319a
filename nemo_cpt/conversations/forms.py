"""The forms in which people keep conversations, each turned into messages of a role and a content."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nemo_cpt.corpus.reading.lines import PAIRS, UnusableError, refuse_surrogates
from nemo_cpt.errors import CptError

AUTO = "auto"
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TOOL_ROLES = ("tool", "function", "ipython", "function_call", "observation")
TOOL_KEYS = frozenset(("tools", "functions", "tool_calls", "function_call"))
SYSTEM_KEYS = ("system", "system_prompt")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # as servers give them, beside an answer's content


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages from the first to the last answer.

    Attributes:
        messages: Each with `role` and `content`, as chat templates take them. A question in alpaca's form also has
            `instruction` and `input`, which its content joins.
        trained: Of each message, whether its tokens are trained on; True for answers alone.
        form: The form that it had.
        unread: Which of `THOUGHTS` its messages had, which are not read.
    """

    messages: list[dict[str, str]]
    trained: list[bool]
    form: str
    unread: tuple[str, ...] = ()


def check_form(form: str) -> None:
    """Check the name of a form.

    Raises:
        CptError: There is no such form, and it is no pair of fields either.
    """
    question, slash, answer = form.partition("/")
    if form not in (AUTO, *READERS) and not (slash and question and answer):
        raise CptError(
            f"There is no form {form!r}; there are {AUTO}, {', '.join(READERS)}, and a pair of fields such as "
            "frage/antwort."
        )


def read_conversation(value: Any, form: str = AUTO, system: str | None = None) -> Conversation:
    """Turn one line's or row's object into a conversation.

    Args:
        value: The object.
        form: `messages` (OpenAI), `sharegpt`, `alpaca`, a pair of fields such as `query/answer`, or `auto`: the one
            that the object's keys tell.
        system: A system message for conversations that have none.

    Raises:
        UnusableError: The object has no form that is known, or two; something in it is missing, empty or of the wrong
            type; roles do not alternate; or tools are used.
    """
    if not isinstance(value, dict):
        raise UnusableError("not_an_object", f"a JSON {type(value).__name__}, not an object")
    name = _recognise(frozenset(value)) if form == AUTO else form
    # An empty list of tools is no use of tools, and common in exports.
    if not TOOL_KEYS.isdisjoint(value):
        _refuse_tools(value)
    reader = READERS.get(name)
    messages, trained = reader(value) if reader else _read_pair(value, *name.split("/", 1))
    # The conversation's own message goes before one that stands beside it, and that before the user's.
    if messages[0]["role"] != "system" and (prompt := _system_of(value) or system):
        messages.insert(0, {"role": "system", "content": prompt})
        trained.insert(0, False)
    _check_order(messages)
    return Conversation(messages, trained, name, _unread(value))


def _unread(value: Mapping[str, Any]) -> tuple[str, ...]:
    lists = (turns for turns in value.values() if isinstance(turns, list))
    found = {key for turns in lists for turn in turns if isinstance(turn, dict) for key in turn if turn[key]}
    return tuple(key for key in THOUGHTS if key in found)


def is_conversation(value: Any) -> bool:
    """Say whether an object has the keys of a conversation, of one form or of several."""
    try:
        return isinstance(value, dict) and bool(_recognise(frozenset(value)))
    except UnusableError as error:
        return error.reason == "ambiguous_form"


# A million lines have a handful of sets of keys.
@lru_cache(maxsize=1024)
def _recognise(keys: frozenset[str]) -> str:
    """Return the form that an object with these keys has."""
    found = []
    if "messages" in keys:
        found.append("messages")
    if "conversations" in keys:
        found.append("sharegpt")
    if "instruction" in keys and ("output" in keys or "response" in keys):
        found.append("alpaca")
    else:
        found += [f"{question}/{answer}" for question, answer in PAIRS if question in keys and answer in keys]
    if len(found) == 1:
        return found[0]
    have = ", ".join(sorted(map(repr, keys))[:12]) or "no keys"
    if not found:
        raise UnusableError("unknown_form", f"no form of conversation that is known: it has {have}")
    raise UnusableError("ambiguous_form", f"it fits the forms {' and '.join(found)}; name the one that you mean")


def _read_messages(value: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[bool]]:
    return _read_turns(value, "messages", "role", "content", ROLES)


def _read_sharegpt(value: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[bool]]:
    turns = value.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    # ShareGPT's keys, or OpenAI's under ShareGPT's list: both are published.
    role, content = ("role", "content") if "role" in first else ("from", "value")
    return _read_turns(value, "conversations", role, content, SHAREGPT_ROLES)


def _read_turns(
    value: Mapping[str, Any], key: str, role_key: str, content_key: str, roles: Mapping[str, str]
) -> tuple[list[dict[str, str]], list[bool]]:
    turns = value.get(key)
    if not isinstance(turns, list) or not turns:
        raise UnusableError("no_messages", f"{key!r} is not a list of messages")
    messages, trained = [], []
    for number, turn in enumerate(turns):
        name = f"{key}[{number}]"
        if not isinstance(turn, dict):
            raise UnusableError("not_an_object", f"{name} is a {type(turn).__name__}, not an object")
        named = turn.get(role_key)
        role = roles.get(named) if isinstance(named, str) else None  # a list is no key
        if role is None:
            raise _wrong_role(named, role_key, name)
        if not TOOL_KEYS.isdisjoint(turn):
            _refuse_tools(turn, f"{name} ")
        content = _text(turn.get(content_key), f"{name}[{content_key!r}]", role)
        # Many data sets write an empty system message for none.
        if role == "system" and not content:
            continue
        messages.append({"role": role, "content": content})
        trained.append(_is_trained(turn, role, name))
    if not messages:
        raise UnusableError("no_messages", f"{key!r} holds no question and no answer")
    return messages, trained


def _refuse_tools(value: Mapping[str, Any], name: str = "it ") -> None:
    for key in sorted(TOOL_KEYS):
        if value.get(key) not in (None, "", "[]", []):
            raise UnusableError("tools", f"{name}has {key!r}; conversations with tools are not supported")


def _wrong_role(role: Any, key: str, name: str) -> UnusableError:
    if role in TOOL_ROLES:
        return UnusableError("tools", f"{name} has the {key} {role!r}; conversations with tools are not supported")
    return UnusableError("unknown_role", f"{name} has the {key} {role!r}")


def _is_trained(turn: Mapping[str, Any], role: str, name: str) -> bool:
    """Return whether a turn is trained on: `train` (true or false) or OpenAI's `weight` (0 or 1) say otherwise."""
    answer = role == "assistant"
    for key in ("train", "weight"):
        flag = turn.get(key)
        if flag is None:
            continue
        if flag not in (0, 1):  # True and False are equal to them
            raise UnusableError("train_flag", f"{name} has {key} {flag!r}; it can be true or false, 0 or 1")
        if flag and not answer:
            raise UnusableError("train_flag", f"{name} is {role}'s and has {key} {flag!r}; only answers are trained on")
        answer = answer and bool(flag)
    return answer


def _read_alpaca(value: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[bool]]:
    instruction = _text(value.get("instruction"), "'instruction'", "user")
    # `context` and `response` are Dolly's names for the same two fields.
    extra = "input" if "input" in value else "context"
    given = value.get(extra)
    context = "" if given is None or given == "" else _text(given, repr(extra), "user")
    answer = "output" if "output" in value else "response"
    question = {"role": "user", "content": instruction, "instruction": instruction}
    if context.strip():
        question |= {"content": f"{instruction}\n\n{context}", "input": context}
    messages = [*_history(value.get("history")), question, _answer(value, answer)]
    return messages, [message["role"] == "assistant" for message in messages]


def _history(history: Any) -> list[dict[str, str]]:
    """Return the earlier turns of LLaMA-Factory's alpaca form and of ChatGLM's pairs, a list of [question, answer]."""
    if not history:
        return []
    messages = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnusableError("not_a_pair", f"history[{number}] is not a list of a question and an answer")
        for i, role in enumerate(("user", "assistant")):
            messages.append({"role": role, "content": _text(pair[i], f"history[{number}][{i}]", role)})
    return messages


def _read_pair(value: Mapping[str, Any], question: str, answer: str) -> tuple[list[dict[str, str]], list[bool]]:
    """Read a question and an answer, which TRL also has as lists of messages."""
    if isinstance(value.get(question), list) and isinstance(value.get(answer), list):
        messages, trained = _read_messages({"messages": [*value[question], *value[answer]]})
        first = len(messages) - len(value[answer])
        # TRL's form: the answers in the prompt's history are context, and not trained on.
        return messages, [flag and number >= first for number, flag in enumerate(trained)]
    # ChatGLM's form; what is no list, such as an article's subject, is no history of a conversation.
    history = value.get("history")
    earlier = _history(history) if isinstance(history, list) else []
    content = _text(value.get(question), repr(question), "user")
    messages = [*earlier, {"role": "user", "content": content}, _answer(value, answer)]
    return messages, [message["role"] == "assistant" for message in messages]


def _answer(value: Mapping[str, Any], key: str) -> dict[str, str]:
    return {"role": "assistant", "content": _text(value.get(key), repr(key), "assistant")}


READERS: dict[str, Callable[[Mapping[str, Any]], tuple[list[dict[str, str]], list[bool]]]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
}


def _text(value: Any, name: str, role: str) -> str:
    """Return a message's text: a string, or OpenAI's list of text parts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(_text(part.get("text"), f"{name}'s text", role) for part in value)
    if not isinstance(value, str):
        kind = "missing or null" if value is None else f"a {type(value).__name__}"
        raise UnusableError("not_a_string", f"{name} is {kind}, not a string")
    if not value.isprintable():  # as no surrogate is
        refuse_surrogates(value, name)
    if role != "system" and (not value or value.isspace()):
        reason = "empty_answer" if role == "assistant" else "empty_question"
        raise UnusableError(reason, f"{name} is empty")
    return value


def _system_of(value: Mapping[str, Any]) -> str:
    """Return the system message that stands beside the turns, an empty string without one."""
    for key in SYSTEM_KEYS:
        if (text := value.get(key)) is not None:
            return _text(text, repr(key), "system").strip() and text
    return ""


def _check_order(messages: list[dict[str, str]]) -> None:
    """Check that after a system message questions and answers alternate, from a question to an answer."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            where = number + len(roles) - len(turns)
            raise UnusableError("roles", f"message {where} is {role}'s where {expected}'s turn is")
    if not turns or turns[-1] != "assistant":
        raise UnusableError("roles", "it does not end with an answer")
