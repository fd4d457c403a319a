"""A conversation in the terminal, with one model or with two side by side."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nemo_cpt.errors import CptError
from nemo_cpt.inference.engine import ContextError, Engine, Message, Piece, Prompt, Sampling

HELP = """/system TEXT      what the model is told before the conversation; without TEXT none
/reset            forget the conversation
/temperature N    0 for the most probable words
/tokens N         the most tokens of a reply
/save FILE        write the conversation as JSON
/help             this list
/quit             end (Ctrl-D too)
Ctrl-C stops a reply. Esc Enter begins a new line, Enter sends."""
# A reply is a stranger's text: what would steer the terminal (C0 but tab and newline, DEL, C1) is left out.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_AROUND_REPLIES = 5  # lines of the table's frame and head, and of what a terminal keeps free


@dataclass
class Side:
    """One model of a conversation.

    Attributes:
        engine: the model.
        plain: continue the text instead of answering: what a base model without a chat template does.
        history: what has been said.
        reply: what it is saying.
    """

    engine: Engine
    plain: bool = False
    history: list[Message] = field(default_factory=list)
    reply: str = ""

    @property
    def title(self) -> str:
        """Its name, a folder's by the last part: whole paths leave no room, and often begin alike."""
        path = Path(self.engine.name)
        return path.name if path.parent.exists() else self.engine.name


def titles(sides: list[Side]) -> list[str]:
    """The models' names as short as they tell the models apart: two may be the last folders of two paths."""
    short = [side.title for side in sides]
    return short if len(set(short)) == len(short) else [side.engine.name for side in sides]


class Chat:
    """The state of a conversation and its commands.

    Args:
        sides: the model, and the one that it is compared with, if any. Each keeps a history of its own.
        sampling: how replies are drawn.
        system: told before the conversation; none when empty.
        console: where to print.
        language_of: names the language of a reply to a question; shown where two models answer side by side.
        interactive: whether somebody reads along, who mends an error; else the first error, or a Ctrl-C, is the end.
    """

    def __init__(
        self, sides: list[Side], sampling: Sampling, *, system: str = "", console: Console,
        language_of: Callable[[str, str], str] | None = None, interactive: bool = True,
    ) -> None:  # fmt: skip
        self.sides, self.sampling, self.system, self.console = sides, sampling, system, console
        self.language_of, self.interactive = language_of, interactive
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/reset": self._reset,
            "/temperature": lambda value: self._set("temperature", float, value),
            "/tokens": lambda value: self._set("max_tokens", int, value),
            "/save": self._save,
            "/help": lambda _: self.console.print(HELP, markup=False, highlight=False),
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, until they end or one says /quit; a Ctrl-C stops a reply.

        Raises:
            CptError: something failed, and nobody reads along.
        """
        for line in lines:
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if not text:
                continue
            try:
                # The line as typed: leading blanks are part of a text to continue.
                self._command(text) if text.startswith("/") else self._answer(line.rstrip("\r\n"))
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.console.print("[dim](stopped)[/dim]")
            except CptError as error:
                if not self.interactive:  # on stdout it would pass for a reply
                    raise
                self.console.print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)

    def _command(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name not in self._commands:
            raise CptError(f"there is no command {name}; /help lists them")
        self._commands[name](value.strip())

    def _answer(self, text: str) -> None:
        """Ask every model; the beginning of a reply that is stopped stays in the history."""
        streams = [side.engine.stream(*self._asked(side, text)) for side in self.sides]
        for side in self.sides:
            side.reply = ""
        try:
            self._show_one(streams[0]) if len(streams) == 1 else self._show_side_by_side(text, streams)
        finally:
            # The same question once more, after /reset say, is to have another answer; the same session, the same ones.
            self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
            for side in self.sides:
                told = [Message(role="user", content=text), Message(role="assistant", content=side.reply)]
                # A question without any answer would leave two of the user's turns in a row, which templates refuse.
                side.history += told if side.reply else []

    def _asked(self, side: Side, text: str) -> tuple[Prompt, Sampling]:
        """What a model is asked, with no more tokens of a reply than its context has room for."""
        prompt: Prompt = self.system + text
        if not side.plain:
            opening = [Message(role="system", content=self.system)] if self.system else []
            prompt = [*opening, *side.history, Message(role="user", content=text)]
        room = side.engine.room(prompt)
        if room is not None and room < 1:
            raise ContextError(f"the conversation fills the context of {side.engine.name}: /reset begins a new one")
        most = self.sampling.max_tokens
        return prompt, replace(self.sampling, max_tokens=most if room is None else min(most, room))

    def _show_one(self, stream: Iterator[Piece]) -> None:
        for piece in stream:
            self.sides[0].reply += piece.text
            self.console.out(piece.text.translate(_CONTROLS), end="", highlight=False)
        self.console.out("")

    def _show_side_by_side(self, question: str, streams: list[Iterator[Piece]]) -> None:
        try:
            with Live(console=self.console, refresh_per_second=8, transient=True) as live:
                # In turn, a piece of each: both seem to speak at once, and the shorter one has ended.
                for pieces in zip_longest(*streams):
                    for side, piece in zip(self.sides, pieces, strict=True):
                        side.reply += piece.text if piece else ""
                    live.update(self._side_by_side(newest=True))
        finally:
            self.console.print(self._side_by_side(question))

    def _side_by_side(self, question: str | None = None, newest: bool = False) -> Table:
        """The replies in columns; only the newest lines of each, as many as the terminal has, while they grow."""
        # Room for the terminal's ^C behind the last line: in a line of its own, it would not be drawn over.
        table = Table(width=self.console.width - len("^C"))
        for title in titles(self.sides):
            table.add_column(escape(title), ratio=1, overflow="fold")
        replies = [Text(side.reply.translate(_CONTROLS)) for side in self.sides]
        if newest:
            rows, width = self.console.height - _AROUND_REPLIES, self.console.width // len(replies) - 5
            replies = [Text("\n").join(reply.wrap(self.console, max(width, 1))[-rows:]) for reply in replies]
        table.add_row(*replies)
        if question is not None and self.language_of is not None:
            table.add_section()
            table.add_row(*(Text(self.language_of(question, side.reply), style="dim") for side in self.sides))
        return table

    def _set_system(self, value: str) -> None:
        self.system = value
        self._reset("")

    def _reset(self, _: str) -> None:
        for side in self.sides:
            side.history.clear()
        self.console.print("[dim]a new conversation[/dim]")

    def _set(self, field: str, kind: Callable[[str], Any], value: str) -> None:
        try:
            self.sampling = replace(self.sampling, **{field: kind(value)})
        except ValueError:
            raise CptError(f"{value!r} is no {'whole ' if kind is int else ''}number") from None
        self.console.print(f"[dim]{field} {getattr(self.sampling, field)}[/dim]")

    def _save(self, value: str) -> None:
        if not value:
            raise CptError("name a file: /save chat.json")
        if (path := Path(value).expanduser()).exists():
            raise CptError(f"{value} exists: name another file")
        told = [{"model": side.engine.name, "system": self.system, "messages": side.history} for side in self.sides]
        try:
            path.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CptError(f"{value} cannot be written: {error.strerror}") from None
        self.console.print(f"[dim]written to {escape(value)}[/dim]", soft_wrap=True)


def typed_lines(prompt: str) -> Iterator[str]:
    """What the user types, with editing and history on a terminal; the lines of stdin elsewhere.

    Raises:
        CptError: a line is not in UTF-8.
    """
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CptError(f"line {number} of standard input is not in UTF-8 ({error.reason})") from None
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    # Alt and Enter, of which a terminal makes these two: a line break within what is typed.
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    commands = WordCompleter([line.split()[0] for line in HELP.splitlines() if line.startswith("/")], sentence=True)
    session: PromptSession[str] = PromptSession(multiline=True, key_bindings=keys, completer=commands)
    while True:
        try:
            yield session.prompt(prompt)
        except KeyboardInterrupt:  # at the prompt it clears what was typed
            continue
        except EOFError:
            return
