"""Chat templates: those that ship, the tokenizer's own, a Jinja file; each examined before a conversation is rendered.

The text of a template is fixed when it is loaded: it goes into the dataset's manifest and from there into an exported
model, which is then asked in the very words that it was trained with.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import orjson
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_cpt.arguments import checked
from nemo_cpt.conversations.encode import definition_of
from nemo_cpt.conversations.forms import Conversation
from nemo_cpt.corpus.reading.lines import UnusableError
from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer
from nemo_cpt.corpus.tokenization.tokenizer_files import CONFIG, SPECIAL_MAP, read_object
from nemo_cpt.errors import CptError

SHIPPED = ("alpaca-en", "alpaca-ja", "alpaca-zh", "chatml", "llama3", "mistral")
OWN = "tokenizer"
TRAIN_ON = ("assistant", "last", "all")
BOS = "{{- bos_token }}\n"
CONTROL = re.compile(r"<\|[^|<>\s]{1,60}\|>")  # how nearly all templates spell their special tokens
MARKS = "\ue000", "\ue001"  # private use: around what `{% generation %}` marks
PROBE = [
    {"role": "user", "content": "What is the capital of Japan?"},
    {"role": "assistant", "content": "Tokyo."},
    {"role": "user", "content": "日本で一番高い山は？"},
    {"role": "assistant", "content": "富士山です。"},
]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the tokens that it may use, examined by `load_template`.

    Attributes:
        name: One of `SHIPPED`, `tokenizer`, or the file's path.
        text: The Jinja source, with BOS settled.
        variables: What a template sees beside the messages: `bos_token` and so on, as transformers passes them.
        special: Names of the tokenizer's special tokens, of which no message may hold one.
        stop: Text and id of the token that ends an answer.
        tokens: Ids of the special tokens that a conversation without a system message has, by text.
    """

    name: str
    text: str
    variables: dict[str, Any]
    special: tuple[str, ...]
    stop: tuple[str, int] = ("", -1)
    tokens: dict[str, int] = field(default_factory=dict)
    _compiled: Any = field(init=False, repr=False, compare=False)
    _in_a_message: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            compiled = _environment().from_string(self.text, globals=self.variables)
            compiled.globals = dict(compiled.globals)  # a ChainMap, which costs a third of a render
            object.__setattr__(self, "_compiled", compiled)
        except jinja2.TemplateError as error:
            raise CptError(f"The template {self.name} is not valid Jinja: {error}.") from error
        # `(?!)` matches nothing: a tokenizer without special tokens has none that a message could hold.
        names = "|".join(map(re.escape, self.special)) or r"(?!)"
        object.__setattr__(self, "_in_a_message", re.compile(names).search)

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: Sequence[dict[str, str]], question: bool = False, marked: bool = False) -> str:
        """Return the text of messages, as transformers' `apply_chat_template` does.

        Args:
            messages: The messages.
            question: Begin an answer after them (`add_generation_prompt`).
            marked: Put `MARKS` around what the template marks as generated.

        Raises:
            UnusableError: The template refuses the messages.
        """
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=question, mark_generation=marked)
        except Exception as error:  # a template is a program: it fails in its own ways
            raise UnusableError("template", f"the template {self.name} fails: {error}") from error

    def pieces(self, conversation: Conversation, train_on: str = "assistant") -> list[tuple[str, bool]]:
        """Cut a conversation's text where answers begin and end.

        An answer begins where the text with the question to answer ends, and ends with the stop token, so that its
        tokens are those that a model has to give. Nothing else of the template's is among them.

        Args:
            conversation: The conversation.
            train_on: `assistant` (every answer that is to be trained on), `last` (the last answer alone) or `all`
                (every token but those of answers that are not to be trained on).

        Returns:
            Pieces in order, each with whether it is trained on; a piece's tokens do not depend on the other pieces.

        Raises:
            UnusableError: A message holds a special token; the template fails, leaves out what a message says, or
                renders a turn otherwise once others follow; or nothing is to be trained on.
        """
        messages = conversation.messages
        for number, message in enumerate(messages):
            if found := self._in_a_message(message["content"]):
                detail = f"message {number} holds the special token {found[0]}, which would act as one"
                raise UnusableError("special_token", detail)
        # Once whole, and once up to each question and answer: a template may write a turn otherwise at the end.
        full = self.render(messages)
        pieces, done, answer = list[tuple[str, bool]](), 0, len(messages) - 1
        for number in range(1, len(messages)):
            if messages[number]["role"] != "assistant":
                continue
            begin, end = self._answer(messages, number, full)
            trained = conversation.trained[number] and (train_on != "last" or number == answer)
            pieces += [(full[done:begin], train_on == "all"), (full[begin:end], trained)]
            done = end
        pieces.append((full[done:], train_on == "all"))
        for number, message in enumerate(messages):
            # Blanks aside: most templates trim a message's ends, Falcon's its empty lines, too. The two halves of an
            # alpaca question may stand apart.
            parts = [message["content"]] if "input" not in message else [message["instruction"], message["input"]]
            if not all(part.strip() in full or _without_blanks(part) in _without_blanks(full) for part in parts):
                detail = (
                    f"the template {self.name} leaves out or changes what message {number} ({message['role']}'s) says"
                )
                raise UnusableError("left_out", detail)
        if not any(trained for _, trained in pieces):
            raise UnusableError("nothing_to_train", "no answer in it is to be trained on")
        return pieces

    def _answer(self, messages: Sequence[dict[str, str]], number: int, full: str) -> tuple[int, int]:
        """Return where an answer begins and ends in the text."""
        # As a server asks: what it renders ends where the model's answer begins.
        asked = self.render(messages[:number], question=True)
        answered = full if number == len(messages) - 1 else self.render(messages[: number + 1])
        if not answered.startswith(asked) or not full.startswith(answered):
            detail = f"the template {self.name} renders message {number - 1} or {number} otherwise once others follow"
            raise UnusableError("rewritten", detail)
        stop = answered.find(self.stop[0], len(asked))
        if stop < 0:
            raise UnusableError(
                "no_stop", f"the template {self.name} does not end message {number} with {self.stop[0]}"
            )
        return len(asked), stop + len(self.stop[0])


def _without_blanks(text: str) -> str:
    return "".join(text.split())


class _GenerationMarks(Extension):
    """Reads `{% generation %}`, with which some templates mark the answers."""

    tags = {"generation"}  # noqa: RUF012  Jinja has it so

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        arguments: list[jinja2.nodes.Expr] = [jinja2.nodes.Name("mark_generation", "load")]
        return jinja2.nodes.CallBlock(self.call_method("_mark", arguments), [], [], body).set_lineno(line)

    def _mark(self, wanted: bool, caller: Any) -> str:
        return f"{MARKS[0]}{caller()}{MARKS[1]}" if wanted else str(caller())


def _environment() -> ImmutableSandboxedEnvironment:
    """Return an environment like that of transformers 4.57, `utils/chat_template_utils.py`; but without the clock.

    `strftime_now` would make tomorrow's tokens others than today's. Templates that ask whether it is defined (Llama
    3.2's) then take the date that they hold.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@checked
def load_template(template: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Load a chat template for a tokenizer and examine it on a short conversation.

    Args:
        template: One of `SHIPPED`, `tokenizer` for the one that comes with the tokenizer, or the path of a Jinja file.
        tokenizer: As `load_tokenizer` gives it.

    Raises:
        CptError: There is no such template; it is not valid, uses tokens that the tokenizer does not have, rewrites
            what came before, does not end answers with a special token, marks something else as generated, or does not
            begin with BOS exactly once where the tokenizer begins texts with it.
    """
    name, text = _find(template, tokenizer)
    variables = _special_tokens(tokenizer) | {"tools": None, "documents": None}
    bos = tokenizer.bos[0] if tokenizer.bos else None
    expected = bos is not None and _begins_with(tokenizer, bos)
    # Without a stop token as yet, which only rendering shows.
    draft = ChatTemplate(name, text, variables, tuple(tokenizer.special))
    try:
        if template in SHIPPED:
            draft = _with_bos_where_due(draft, bos, expected)
        return _examine(draft, tokenizer, bos, expected)
    except UnusableError as error:
        raise CptError(f"The template {name} cannot be used with {tokenizer.name}: {error.detail}.") from error


def _with_bos_where_due(draft: ChatTemplate, bos: str | None, expected: bool) -> ChatTemplate:
    """Take the BOS of a template that ships away where the tokenizer puts none, or where a turn begins with it."""
    without = replace(draft, text=draft.text.replace(BOS, ""))
    due = expected and bos is not None and not without.render(PROBE).startswith(bos)
    return draft if due else without


def check_there(template: str) -> None:
    """Check that a template is one by its name, or a file; what it holds only a tokenizer tells.

    Raises:
        CptError: There is no such template.
    """
    if template not in (*SHIPPED, OWN) and not Path(template).is_file():
        raise CptError(f"There is no template {template!r}; there are {', '.join(SHIPPED)}, {OWN}, and Jinja files.")


def _find(template: str, tokenizer: Tokenizer) -> tuple[str, str]:
    if template in SHIPPED:
        return template, (files(__package__) / "jinja" / f"{template}.jinja").read_text("utf-8")
    if template == OWN:
        return OWN, _own_template(tokenizer)
    check_there(template)
    return str(Path(template)), _read(Path(template))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CptError(f"Cannot read the template {path}: {error}.") from error


def _own_template(tokenizer: Tokenizer) -> str:
    """Return the template that a tokenizer comes with."""
    found = own_template(tokenizer.folder)
    if found is None:
        raise CptError(
            f"The tokenizer {tokenizer.name} has no chat template, as those of base models mostly have none: name one "
            f"of {', '.join(SHIPPED)}, or a Jinja file."
        )
    return found


def own_template(folder: str | Path) -> str | None:
    """Return the template in a tokenizer's folder, from where transformers looks for it; None where it has none.

    Raises:
        CptError: Its configuration is none, or has something else in the template's place.
    """
    if (path := Path(folder) / "chat_template.jinja").is_file():
        return _read(path)
    found = read_object(Path(folder) / CONFIG).get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):  # several under names
        found = {str(entry.get("name")): entry.get("template") for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str | None):
        raise CptError(f"{Path(folder) / CONFIG}: chat_template cannot be {found!r}: download the file again.")
    return found


def _special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return `bos_token` and so on by name, those that there are."""
    merged = read_object(Path(tokenizer.folder) / SPECIAL_MAP) | read_object(Path(tokenizer.folder) / CONFIG)
    named = {key: value for key, value in merged.items() if key.endswith("_token") and value}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    texts = {key: text for key, text in texts.items() if isinstance(text, str)}
    ends = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    return texts | {key: token[0] for key, token in ends.items() if token is not None}


def _begins_with(tokenizer: Tokenizer, token: str) -> bool:
    """Say whether the tokenizer puts this token before every text."""
    definition = definition_of(tokenizer)
    content = orjson.loads(definition.read_bytes() if isinstance(definition, Path) else definition)
    outer = content.get("post_processor") or {}
    # Alone, or one of a sequence: Llama 3's is the second of two.
    for processor in (outer, *outer.get("processors", ())):
        first = (processor.get("single") or [{}])[0]
        if first.get("SpecialToken", {}).get("id") == token:
            return True
    return False


def _examine(draft: ChatTemplate, tokenizer: Tokenizer, bos: str | None, expected: bool) -> ChatTemplate:
    """Return the template with its stop token, if everything about it is right."""
    text = draft.render(PROBE)
    _check_tokens(draft, tokenizer, text)
    if bos is not None:
        _check_bos(draft, text, bos, expected)
    stop = _find_stop(draft)
    used = {token: number for token, number in tokenizer.special.items() if token in text}
    template = replace(draft, stop=(stop, tokenizer.special[stop]), tokens=used)
    pieces = template.pieces(Conversation(PROBE, [message["role"] == "assistant" for message in PROBE], ""))
    _check_marks(template, [text for text, trained in pieces if trained])
    return template


def _check_tokens(template: ChatTemplate, tokenizer: Tokenizer, text: str) -> None:
    missing = sorted(set(CONTROL.findall(text)) - tokenizer.special.keys())
    if missing:
        plain = ", ".join(name for name in SHIPPED if name.startswith("alpaca"))
        raise CptError(
            f"The template {template.name} uses {', '.join(missing)}, which {tokenizer.name} does not have as special "
            f"tokens. Take a template of plain text ({plain}), or the template that was made for this tokenizer."
        )


def _check_bos(template: ChatTemplate, text: str, bos: str, expected: bool) -> None:
    if text.startswith(bos * 2) or (expected and not text.startswith(bos)):
        how = "twice" if text.startswith(bos) else "not at all"
        raise CptError(
            f"The template {template.name} begins a conversation with {bos} {how}, where the model's texts begin with "
            "it once. Save the template as a file that begins with {{- bos_token }} once, and name that file."
        )


def _find_stop(template: ChatTemplate) -> str:
    """Return the special token that ends an answer.

    Raises:
        UnusableError: There is none, or the turn's header would be trained on with the answer.
    """
    asked, answered = template.render(PROBE[:1], question=True), template.render(PROBE[:2])
    if not answered.startswith(asked):
        raise UnusableError("rewritten", f"an answered question does not begin like one to answer, {asked!r}")
    header, found, end = answered[len(asked) :].partition(PROBE[1]["content"])
    if not found:
        raise UnusableError("template", f"the answer is not in what it renders, {answered!r}")
    first = re.compile("|".join(map(re.escape, template.special)) or r"(?!)").search
    # A special token between the question and the answer: the turn's header, which should have been in `asked`.
    if first(header):
        raise UnusableError(
            "template", f"it does nothing with add_generation_prompt, so that {header!r} would be trained on"
        )
    if (stop := first(end)) is None:
        raise UnusableError(
            "no_stop", "no special token ends an answer, so that a model would not stop; add {{ eos_token }} there"
        )
    return stop[0]


def _check_marks(template: ChatTemplate, answers: list[str]) -> None:
    """Check that `{% generation %}`, where a template has it, marks the answers up to their stop tokens."""
    marked = re.findall(f"{MARKS[0]}(.*?){MARKS[1]}", template.render(PROBE, marked=True), re.DOTALL)
    if marked and [text.strip() for text in marked] != [text.strip() for text in answers]:
        raise UnusableError(
            "template",
            f"its generation marks hold {marked[0]!r}, where an answer up to its stop token is {answers[0]!r}",
        )
