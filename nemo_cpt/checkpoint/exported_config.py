"""The config.json of an export: the base's, with what the checkpoint's context says was trained otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_cpt.checkpoint.architecture import Architecture, own_name, parse_config, read_json
from nemo_cpt.checkpoint.base import carried_places
from nemo_cpt.checkpoint.chat_template import with_end
from nemo_cpt.checkpoint.folders import VOCABULARIES
from nemo_cpt.checkpoint.model_config import (
    Difference,
    constants_of_nemo,
    context_differences,
    described,
    read_model_config,
)
from nemo_cpt.checkpoint.rope import Rope, older_spelling_differs, set_rope
from nemo_cpt.errors import CptError

_WRITABLE = ("rope_theta", "rope_scaling", "rms_norm_eps")


@dataclass(frozen=True)
class ExportedConfig:
    """A config.json to write, and what it describes.

    Attributes:
        arch: the model as it was trained.
        fields: of the config.json.
        trained_otherwise: where the model differs from the base's config.json, in words.
        changes: where `fields` differ from the base's, in words; nothing need be written where there are none.
        warnings: what could not be looked at.
    """

    arch: Architecture
    fields: dict[str, Any]
    trained_otherwise: tuple[str, ...]
    changes: tuple[str, ...]
    warnings: tuple[str, ...]

    def with_dtype(self, dtype: str) -> ExportedConfig:
        """The same for weights of a dtype."""
        if dtype == (self.arch.dtype or dtype):
            return self
        names = [name for name in ("dtype", "torch_dtype") if name in self.fields]
        change = f"{', '.join(names)}: {dtype} instead of {self.arch.dtype}"
        return replace(self, fields=self.fields | dict.fromkeys(names, dtype), changes=(*self.changes, change))

    def with_end_at(self, stop: int) -> ExportedConfig:
        """The same for a model whose replies end at one more token."""
        before, after = self.fields.get("eos_token_id"), with_end(self.fields.get("eos_token_id"), stop)
        if after == before:
            return self
        change = f"eos_token_id: {after} instead of {before}"
        return replace(self, fields=self.fields | {"eos_token_id": after}, changes=(*self.changes, change))


def exported_config(nemo: Path, base: Path, ignore_fields: Collection[str] = ()) -> ExportedConfig:
    """The config.json for an export.

    Args:
        nemo: the checkpoint.
        base: the folder with the base's config.json.
        ignore_fields: config fields to accept although they are unknown here.

    Raises:
        CptError: config.json is refused, or the checkpoint was trained as another model than it can describe.
    """
    path = base / "config.json"
    fields, recorded = read_json(path), read_model_config(nemo)
    # The base's, as published; what was trained otherwise is laid over it below.
    arch = parse_config(fields, str(path), ignore_fields)
    differing = context_differences(recorded, arch)
    # Here, before a byte is written, though the weights may well be right: config.json could not say what they are.
    if unwritable := [each for each in differing if not can_be_written(each, arch)]:
        raise CptError(
            f"{nemo} was trained as another model than {path} describes: "
            f"{described(unwritable, 'its context', 'config.json')}. Give as base the model from which the training "
            "started; where it is that one, the recipe changed what config.json cannot say."
        )
    trained = constants_of_nemo(recorded)
    changed = {each.name: trained[each.name] for each in differing}
    otherwise = [each.described("the checkpoint's context", "the base's config.json") for each in differing]
    changes = list(otherwise)
    if (length := recorded.get("seq_length") or 0) > arch.max_position_embeddings:
        changes.append(f"max_position_embeddings was {arch.max_position_embeddings}, sequences had {length} tokens")
        changed["max_position_embeddings"] = length
        if arch.model_type == "mistral":  # a window as long as the positions were had no effect, and would have one now
            changed.setdefault("sliding_window", arch.sliding_window)
    arch = replace(arch, **changed)
    fields |= {
        own_name(name, arch.model_type): value for name, value in changed.items() if not name.startswith("rope_")
    }
    # Rotary constants are written by `set_rope`, in both spellings at once.
    rope = Rope(arch.rope_theta, arch.rope_scaling)
    if changed.keys() & {"rope_theta", "rope_scaling"}:
        set_rope(fields, rope)
    elif older_spelling_differs(fields, rope, ignore_fields):
        set_rope(fields, rope)
        changes.append("rope_theta and rope_scaling were added: transformers 4 passes over rope_parameters")
    return ExportedConfig(arch, fields, tuple(otherwise), tuple(changes), tuple(_warnings(nemo, base, recorded)))


def _warnings(nemo: Path, base: Path, recorded: Mapping[str, Any]) -> Iterator[str]:
    if not recorded:
        yield f"{nemo} has no context: whether it was trained as config.json says is not known"
    for place in carried_places(nemo):
        if other := differing_vocabulary(place, base):
            yield f"{base}/{other} is exported, and is not the one that the run trained with, {place}/{other}"
            return


def differing_vocabulary(one: Path, other: Path) -> str | None:
    """The name of a tokenizer's vocabulary that two folders have, and not the same one; None where there is none."""
    return next((name for name in VOCABULARIES if _differ(one / name, other / name)), None)


def _differ(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes()


def can_be_written(difference: Difference, arch: Architecture) -> bool:
    """Whether the config.json of a base can say what a training of it changed, `difference.one` being its value."""
    if arch.like_gpt2:  # without a rotary embedding
        return difference.name == "rms_norm_eps"
    if difference.name == "rope_scaling" and difference.one is not None:
        return difference.one.kind == "linear" or (difference.one.kind == "llama3" and arch.model_type == "llama")
    return difference.name in (*_WRITABLE, *(["sliding_window"] if arch.model_type == "mistral" else []))
