"""The chat template that a run was tuned on: recorded in its checkpoints, and carried by what is exported of them.

A base that was pretrained on leaves with its own files, byte for byte. A tuned model is asked in the very words that it
was trained with, and stops where its answers ended: its folder says so to transformers, vLLM and whatever else reads
tokenizer_config.json, chat_template.jinja, generation_config.json and config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.architecture import read_json
from nemo_cpt.checkpoint.context import RUN_JSON
from nemo_cpt.checkpoint.folders import remove_additional_templates
from nemo_cpt.checkpoint.tokenizer_ids import END_OF_TEXT
from nemo_cpt.errors import CptError

NONE = "none"  # as a choice: the base's files as they are
RECORD = "template"  # in run.json
_JINJA, _TOKENIZER, _GENERATION = "chat_template.jinja", "tokenizer_config.json", "generation_config.json"
_STALE = "chat_template.json"  # an older place, which some readers still look into


@dataclass(frozen=True)
class InstructionTemplate:
    """A chat template as the manifest of prepared conversations describes it.

    Attributes:
        name: one of those that ship, `tokenizer`, or a file's path.
        text: the Jinja source.
        stop: text and id of the token that ends an answer.
        tokens: ids of the special tokens that it uses, by text.
    """

    name: str
    text: str
    stop: tuple[str, int]
    tokens: Mapping[str, int]


def instruction_template(checkpoint: str | Path) -> InstructionTemplate | None:
    """The template of the conversations that a checkpoint's run was trained on; None where it read texts alone.

    Args:
        checkpoint: the folder that holds `weights` and `context`, and `run.json` where this library's run wrote it.

    Raises:
        CptError: the record is damaged.
    """
    recorded = recorded_template(checkpoint)
    if recorded is None:
        return None
    try:
        text, number = recorded["stop"]
        return InstructionTemplate(recorded["name"], recorded["text"], (text, number), dict(recorded["tokens"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CptError(
            f"{Path(checkpoint, RUN_JSON)} has no usable record of its chat template ({error!r}). Copy the checkpoint "
            "again."
        ) from error


def recorded_template(checkpoint: str | Path) -> Mapping[str, Any] | None:
    """The same as it is written down, in the words of the conversations' manifest."""
    return _read(Path(checkpoint, RUN_JSON)).get(RECORD)


def choose_template(checkpoint: Path, files: Path, choice: str | None) -> InstructionTemplate | None:
    """The template that an export carries; None for the base's files as they are.

    Args:
        checkpoint: to be exported.
        files: the folder of the base's tokenizer.
        choice: None for what the run recorded, `NONE`, or what `prepare --template` takes.

    Raises:
        CptError: there is no such template, or it cannot be used with the tokenizer.
    """
    if choice is None:
        return instruction_template(checkpoint)
    if choice == NONE:
        return None
    from nemo_cpt.conversations.templates import load_template
    from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer

    found = load_template(choice, load_tokenizer(files))
    return InstructionTemplate(found.name, found.text, found.stop, found.tokens)


def write_template(folder: Path, template: InstructionTemplate) -> list[str]:
    """Let a Hugging Face folder carry a template and end replies with its stop token; then read it again.

    config.json is the caller's (`with_end`): more than this changes it.

    Returns:
        The names of the files that it has now.

    Raises:
        CptError: the tokenizer that lies there is not the one that the template was used with.
    """
    # In both places: newer readers take the file, older ones the field.
    (folder / _JINJA).write_text(template.text, encoding="utf-8")
    (folder / _STALE).unlink(missing_ok=True)
    # Neither those that were not trained on: transformers takes one of them where a request has tools.
    remove_additional_templates(folder)
    _update(folder / _TOKENIZER, {"chat_template": template.text})
    # What a template writes with `eos_token` would become another text.
    if "eos_token" not in template.text:
        for name in (_TOKENIZER, "special_tokens_map.json"):
            _set_eos_token(folder / name, template.stop[0])
    settings = _read(folder / _GENERATION) or {
        name: value
        for name, value in read_json(folder / "config.json").items()
        if name in ("bos_token_id", END_OF_TEXT)
    }
    _update(folder / _GENERATION, {END_OF_TEXT: with_end(settings.get(END_OF_TEXT), template.stop[1])})
    # Read back through the tokenizer: that the files say so does not mean that transformers does it.
    if found := list(template_differences(folder, template)):
        raise CptError(
            f"the export would not answer as it was trained on the template {template.name}: {'; '.join(found)}. Give "
            "as base the model that the training started from, or choose with --chat-template"
        )
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def with_end(ends: int | list[int] | None, stop: int) -> int | list[int]:
    """The ids at which replies end, as `eos_token_id` says them, with one more."""
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    # The base's ends stay: a model may still end a text with them.
    more = ids if stop in ids else [*ids, stop]
    return more if len(more) > 1 else more[0]


def template_differences(folder: Path, template: InstructionTemplate) -> Iterator[str]:
    """Where a folder asks a model otherwise than it was tuned, or does not end its replies where it does, in words."""
    from nemo_cpt.conversations.templates import OWN, load_template, own_template
    from nemo_cpt.corpus.tokenization.tokenizer import load_tokenizer

    if own_template(folder) != template.text:
        yield f"{folder} has {'another' if own_template(folder) else 'no'} chat template"
        return
    try:
        found = load_template(OWN, load_tokenizer(folder))
    except CptError as error:
        yield str(error)
        return
    if (found.stop, dict(found.tokens)) != (template.stop, dict(template.tokens)):
        yield (
            f"with its tokenizer, answers end with {found.stop[0]} ({found.stop[1]}) and conversations hold "
            f"{_listed(found.tokens)}; trained were {template.stop[0]} ({template.stop[1]}) and "
            f"{_listed(template.tokens)}"
        )
    # transformers and vLLM take generation_config.json's, and config.json's where there is none.
    for name in ("config.json", _GENERATION):
        ends = _read(folder / name).get(END_OF_TEXT)
        if (folder / name).is_file() and with_end(ends, template.stop[1]) != ends:
            yield f"{name} does not end replies at {template.stop[0]} ({template.stop[1]}): {END_OF_TEXT} is {ends}"


def _listed(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{text} ({number})" for text, number in tokens.items())


def _set_eos_token(path: Path, text: str) -> None:
    fields = _read(path)
    if fields or path.name == _TOKENIZER:
        named = fields.get("eos_token")
        _update(path, {"eos_token": named | {"content": text} if isinstance(named, dict) else text})


def _update(path: Path, values: dict[str, Any]) -> None:
    """Write fields into a JSON file; it keeps its bytes where it says them already."""
    fields = _read(path)
    if any(fields.get(name) != value for name, value in values.items()):
        text = json.dumps(fields | values, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
