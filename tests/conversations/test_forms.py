"""Every form becomes messages; whatever is wrong in one is said by name."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_cpt.conversations.forms import Conversation, check_form, read_conversation
from nemo_cpt.corpus.reading.lines import UnusableError
from nemo_cpt.errors import CptError


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def plain(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": m["content"]} for m in conversation.messages]


FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "messages": ({"messages": turns("q", "a", "q2", "a2"), "id": 7}, turns("q", "a", "q2", "a2")),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, turns("q", "a")),
    "alpaca": ({"instruction": "q", "input": None, "output": "a"}, turns("q", "a")),
    "query/answer": ({"query": "q", "answer": "a"}, turns("q", "a")),
    "prompt/completion": ({"prompt": "q", "completion": "a"}, turns("q", "a")),
    "question/response": ({"question": "q", "response": "a", "system_prompt": ""}, turns("q", "a")),
    "input/output": ({"input": "q", "output": "a"}, turns("q", "a")),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_recognised_by_its_keys(form: str) -> None:
    value, expected = FORMS[form]
    conversation = read_conversation(value)
    assert (conversation.form, plain(conversation)) == (form, expected)
    assert conversation.trained == [m["role"] == "assistant" for m in expected]
    assert read_conversation(value, form=form) == conversation


def test_a_pair_of_fields_can_be_named() -> None:
    check_form("frage/antwort")
    assert plain(read_conversation({"frage": "q", "antwort": "a"}, "frage/antwort")) == turns("q", "a")
    with pytest.raises(CptError, match="no form 'chatgpt'"):
        check_form("chatgpt")


def test_alpaca_keeps_the_input_beside_the_instruction() -> None:
    (question, _) = read_conversation({"instruction": "要約して", "input": "長い文", "output": "短い文"}).messages
    assert question == {"role": "user", "content": "要約して\n\n長い文", "instruction": "要約して", "input": "長い文"}


@pytest.mark.parametrize(("question", "answer"), [("instruction", "output"), ("prompt", "response")])
def test_earlier_turns_stand_in_a_history(question: str, answer: str) -> None:
    value = {question: "q2", answer: "a2", "history": [["q", "a"]]}
    assert plain(read_conversation(value)) == turns("q", "a", "q2", "a2")
    assert read_conversation(value).trained == [False, True, False, True]
    assert plain(read_conversation(value | {"history": []})) == turns("q2", "a2")
    with pytest.raises(UnusableError, match=r"history\[0\] is not a list of a question and an answer"):
        read_conversation(value | {"history": ["q", "a"]})


def test_what_is_no_list_is_no_history_of_a_pair_and_dolly_has_a_context() -> None:
    assert plain(read_conversation({"question": "q", "answer": "a", "history": "of Rome"})) == turns("q", "a")
    assert read_conversation({"instruction": "q", "context": "c", "response": "a"}).messages[0]["input"] == "c"


def test_trl_pairs_of_messages_train_the_completion_alone() -> None:
    value = {"prompt": turns("q", "a", "q2"), "completion": [{"role": "assistant", "content": "a2"}]}
    conversation = read_conversation(value)
    assert plain(conversation) == turns("q", "a", "q2", "a2")
    assert conversation.trained == [False, False, False, True]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"query": "q", "answer": "a"}, "for all"),
        ({"query": "q", "answer": "a", "system": "its own"}, "its own"),
        ({"messages": [{"role": "system", "content": ""}, *turns("q", "a")]}, "for all"),
        ({"messages": [{"role": "developer", "content": "its own"}, *turns("q", "a")]}, "its own"),
    ],
)
def test_a_system_message_for_all_is_for_those_that_have_none(value: dict[str, Any], expected: str) -> None:
    conversation = read_conversation(value, system="for all")
    assert plain(conversation) == [{"role": "system", "content": expected}, *turns("q", "a")]
    assert conversation.trained == [False, False, True]


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": True, "weight": 0}])
def test_single_answers_can_be_left_untrained(flag: dict[str, Any]) -> None:
    messages = turns("q", "a", "q2", "a2")
    conversation = read_conversation({"messages": [messages[0], messages[1] | flag, *messages[2:]]})
    assert conversation.trained == [False, False, False, True]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    value = {"messages": [*turns("q"), {"role": "assistant", "content": parts}]}
    assert plain(read_conversation(value)) == turns("q", "ab")


WRONG = {
    "a list": ([], "not_an_object", "a JSON list"),
    "unknown form": ({"text": "t"}, "unknown_form", "it has 'text'"),
    "two forms": ({"query": "q", "answer": "a", "messages": turns("q", "a")}, "ambiguous_form", "messages and query/"),
    "tools beside": ({"messages": turns("q", "a"), "tools": [{"name": "f"}]}, "tools", "'tools'"),
    "a tool's turn": ({"messages": [*turns("q"), {"role": "tool", "content": "x"}]}, "tools", r"messages\[1\]"),
    "a tool call": (
        {"messages": [*turns("q"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "tools",
        r"messages\[1\]",
    ),
    "unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown_role", "'narrator'"),
    "role that is no text": ({"messages": [{"role": [], "content": "x"}]}, "unknown_role", r"the role \[\]"),
    "no role": ({"messages": [{"content": "x"}]}, "unknown_role", "None"),
    "a number": ({"query": 3, "answer": "a"}, "not_a_string", "'query' is a int"),
    "null": ({"query": "q", "answer": None}, "not_a_string", "'answer' is missing or null"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "not_a_string",
        r"messages\[0\]\['content'\] is a list",
    ),
    "empty answer": ({"query": "q", "answer": " \n"}, "empty_answer", "'answer' is empty"),
    "empty question": ({"query": "", "answer": "a"}, "empty_question", "'query' is empty"),
    "answer first": ({"messages": turns("q", "a")[1:]}, "roles", "message 0 is assistant's where user's turn is"),
    "two questions": ({"messages": [*turns("q"), *turns("q", "a")]}, "roles", "message 1 is user's"),
    "late system": ({"messages": [*turns("q", "a"), {"role": "system", "content": "s"}]}, "roles", "message 2 is sys"),
    "no answer": ({"messages": turns("q", "a", "q")}, "roles", "does not end with an answer"),
    "no message": ({"messages": []}, "no_messages", "not a list of messages"),
    "only an empty system": ({"messages": [{"role": "system", "content": ""}]}, "no_messages", "no question"),
    "half a weight": ({"messages": [*turns("q"), {**turns("q", "a")[1], "weight": 0.5}]}, "train_flag", "0.5"),
    "a trained question": (
        {"messages": [{**turns("q")[0], "train": True}]},
        "train_flag",
        "only answers are trained on",
    ),
    "a surrogate": ({"query": "q", "answer": "\ud800"}, "lone_surrogate", r"U\+D800"),
    "half a history": ({"instruction": "q", "output": "a", "history": [["q"]]}, "not_a_pair", r"history\[0\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str) -> None:
    value, reason, detail = WRONG[case]
    with pytest.raises(UnusableError, match=detail) as error:
        read_conversation(value)
    assert error.value.reason == reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "train", "weight", "type", "text", "tool_calls"]),
            inner,
        )
    ),
    max_leaves=8,
)
KEYS = ["messages", "conversations", "instruction", "input", "output", "query", "answer", "history", "system", "tools"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON) | JSON)
def test_any_object_is_read_or_refused_with_a_reason(value: Any) -> None:
    with suppress(UnusableError):
        conversation = read_conversation(value)
        roles = [m["role"] for m in conversation.messages]
        assert roles[-1] == "assistant"
        assert all(m["content"].strip() for m in conversation.messages if m["role"] != "system")
        assert len(conversation.trained) == len(roles)
