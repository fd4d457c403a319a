"""`nemo-cpt chat` on a terminal: keys, Ctrl-C, wide characters; driven through a pseudo-terminal."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.chat_server import Body, ChatServer
from tests.support.terminals import Terminal

COMMAND = [sys.executable, "-m", "nemo_cpt.cli", "chat"]


@pytest.fixture
def on_terminal() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal([*COMMAND, *arguments]))
        return started[-1]

    yield start
    for each in started:
        each.close()


def echo(body: Body, number: int) -> str:
    """A reply that says what was asked."""
    return f"reply {number}: <{body['messages'][-1]['content']}>"


def test_lines_commands_and_the_end(on_terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    with ChatServer(echo) as server:
        terminal = on_terminal(server.url)
        terminal.until("/help lists the commands")
        terminal.type("first line\x1b\rsecond line\r")  # Esc Enter between them
        terminal.until(r"reply 1: <first line\nsecond line>")
        terminal.type("half a thought")
        terminal.until("half a thought")
        terminal.press("\x03")  # Ctrl-C at the prompt
        terminal.type("日本の首都は?\r")
        terminal.until("reply 2: <日本の首都は\\?>")
        terminal.type(f"/save {tmp_path / 'chat.json'}\r")
        terminal.until("written to")
        terminal.type("/temperature 0\r")
        terminal.until("temperature 0.0")
        terminal.type("/reset\r")
        terminal.until("a new conversation")
        terminal.type("again\r")
        terminal.until("reply 3: <again>")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.ends() == 0
    assert [len(body["messages"]) for body in server.asked] == [1, 3, 1]
    assert server.asked[2]["temperature"] == 0
    assert "half a thought" not in (tmp_path / "chat.json").read_text()


def test_ctrl_c_stops_a_reply_of_a_model_in_this_process(
    on_terminal: Callable[..., Terminal], make_model: Callable[[str], Path]
) -> None:
    terminal = on_terminal(str(make_model("long_context")), "--max-tokens", "60000", "--temperature", "0")
    terminal.type("Hello\r")
    terminal.until(r"Hello\s+\S[\s\S]{200}")  # well on its way in a reply that would take minutes
    terminal.press("\x03")
    terminal.until(r"\(stopped\)")
    terminal.type("/tokens 3\r")
    terminal.until("max_tokens 3")
    terminal.type("/quit\r")
    assert terminal.ends() == 0


def test_two_models_side_by_side_with_their_languages(on_terminal: Callable[..., Terminal]) -> None:
    pytest.importorskip("lingua", reason="the language of replies is told by lingua")
    with (
        ChatServer(lambda body, number: "首都は東京です。" * 9) as new,
        ChatServer(lambda body, number: "It is Tokyo.") as old,
    ):
        terminal = on_terminal(new.url, "--against", old.url)
        terminal.type("日本の首都は?\r")
        shown = terminal.until(r"│ ja +│ en +│")
        lines = [line for line in shown.rpartition("┏")[2].splitlines() if line.startswith("│")]
        replies = [
            "".join(cells).replace(" ", "") for cells in zip(*(line.split("│")[1:3] for line in lines), strict=True)
        ]
        assert replies == ["首都は東京です。" * 9 + "ja", "ItisTokyo.en"]  # nothing is cut off
        # A wide character takes two columns: every line ends at the same one, which leaves the last two to Ctrl-C's ^C.
        assert {sum(2 if "\u2e80" < char < "\uffdc" else 1 for char in line) for line in lines} == {78}
        terminal.type("/quit\r")
        assert terminal.ends() == 0
