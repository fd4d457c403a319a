"""A conversation in the terminal, with one model or with two side by side."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nemo_cpt.errors import CptError
from nemo_cpt.inference.engine import Engine, Message, Prompt, Sampling

HELP = """/system TEXT      what the model is told before the conversation; without TEXT none
/reset            forget the conversation
/temperature N    0 for the most probable words
/tokens N         the most tokens of a reply
/save FILE        write the conversation as JSON
/quit             end (Ctrl-D too)
Ctrl-C stops a reply. Esc Enter begins a new line, Enter sends."""


class Chat:
    """The state of a conversation and its commands.

    Args:
        engines: the model, and the one that it is compared with, if any. Each keeps a history of its own.
        sampling: how replies are drawn.
        system: told before the conversation; none when empty.
        plain: continue the text instead of answering: what a base model without a chat template does.
        console: where to print.
    """

    def __init__(
        self, engines: list[Engine], sampling: Sampling, *, system: str = "", plain: bool = False, console: Console
    ) -> None:
        self.engines, self.sampling, self.system, self.plain, self.console = engines, sampling, system, plain, console
        self.histories: list[list[Message]] = [[] for _ in engines]
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/reset": self._reset,
            "/temperature": lambda value: self._set("temperature", float, value),
            "/tokens": lambda value: self._set("max_tokens", int, value),
            "/save": self._save,
            "/help": lambda _: self.console.print(HELP, markup=False, highlight=False),
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, until they end or one says /quit."""
        for line in lines:
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if not text:
                continue
            try:
                # The line as typed: leading blanks are part of a text to continue.
                self._command(text) if text.startswith("/") else self._answer(line.rstrip("\n"))
            except CptError as error:
                self.console.print(f"[red]{escape(str(error))}[/red]", highlight=False)

    def _command(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name not in self._commands:
            raise CptError(f"there is no command {name}; /help lists them")
        self._commands[name](value.strip())

    def _answer(self, text: str) -> None:
        """Ask every engine; a Ctrl-C ends the reply that is being given, and its beginning stays in the history."""
        replies = ["" for _ in self.engines]
        prompts = [self._prompt(history, text) for history in self.histories]
        try:
            for _ in self._streamed(prompts, replies):
                pass
        except KeyboardInterrupt:
            self.console.print("[dim](stopped)[/dim]")
        for history, reply in zip(self.histories, replies, strict=True):
            if reply:
                history += [Message(role="user", content=text), Message(role="assistant", content=reply)]

    def _prompt(self, history: list[Message], text: str) -> Prompt:
        if self.plain:
            return self.system + text
        opening = [Message(role="system", content=self.system)] if self.system else []
        return [*opening, *history, Message(role="user", content=text)]

    def _streamed(self, prompts: list[Prompt], replies: list[str]) -> Iterator[None]:
        if len(self.engines) == 1:
            for piece in self.engines[0].stream(prompts[0], self.sampling):
                replies[0] += piece.text
                self.console.out(piece.text, end="", highlight=False)
                yield
            self.console.out("")
            return
        with Live(console=self.console, vertical_overflow="visible", refresh_per_second=8) as live:
            for number, (engine, prompt) in enumerate(zip(self.engines, prompts, strict=True)):
                for piece in engine.stream(prompt, self.sampling):
                    replies[number] += piece.text
                    live.update(self._side_by_side(replies))
                    yield

    def _side_by_side(self, replies: list[str]) -> Group:
        # A folder by its last name: whole paths leave no room, and often begin alike.
        names = [Path(engine.name).name if Path(engine.name).exists() else engine.name for engine in self.engines]
        table = Table(*map(escape, names), expand=True)
        table.add_row(*map(Text, replies))
        return Group(table)

    def _set_system(self, value: str) -> None:
        self.system = value
        self._reset("")

    def _reset(self, _: str) -> None:
        for history in self.histories:
            history.clear()
        self.console.print("[dim]a new conversation[/dim]")

    def _set(self, field: str, kind: Callable[[str], Any], value: str) -> None:
        try:
            self.sampling = replace(self.sampling, **{field: kind(value)})
        except ValueError:
            raise CptError(f"{value!r} is no number") from None
        self.console.print(f"[dim]{field} {getattr(self.sampling, field)}[/dim]")

    def _save(self, value: str) -> None:
        if not value:
            raise CptError("name a file: /save chat.json")
        if (path := Path(value)).exists():
            raise CptError(f"{value} exists: name another file")
        told = [
            {"model": engine.name, "system": self.system, "messages": history}
            for engine, history in zip(self.engines, self.histories, strict=True)
        ]
        try:
            path.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CptError(f"{value} cannot be written: {error.strerror}") from None
        self.console.print(f"[dim]written to {escape(value)}[/dim]")


def typed_lines() -> Iterator[str]:
    """What the user types, with editing and history on a terminal; the lines of stdin elsewhere."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    commands = WordCompleter([line.split()[0] for line in HELP.splitlines() if line.startswith("/")], sentence=True)
    session: PromptSession[str] = PromptSession(multiline=True, key_bindings=keys, completer=commands)
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:  # at the prompt it clears what was typed
            continue
        except EOFError:
            return
