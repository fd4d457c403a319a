"""Rotary embeddings as config.json spells them, today's way and the older one; both are read, and both are written.

transformers 4 knows `rope_theta` and `rope_scaling`, and passes over `rope_parameters`; transformers 5 keeps everything
in `rope_parameters`, and still reads the two others where they are given. A file that says two different things is a
different model in each of them, and is refused (modeling_rope_utils.py of 4.57 and 5.0).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_cpt.errors import CptError

_DEFAULT_THETA = 10000.0
_KEYS = {  # of a scaling, by its kind
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling: `llama3` (Llama 3.1 and 3.2) or `linear`, which has a factor only."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def fields(self) -> dict[str, Any]:
        """The scaling as config.json has it."""
        return {"rope_type": self.kind, **{name: getattr(self, name) for name in _KEYS[self.kind]}}


@dataclass(frozen=True)
class Rope:
    """The base of the angles, and how they are scaled."""

    theta: float
    scaling: RopeScaling | None


def read_rope(config: Mapping[str, Any], where: str, ignore_fields: Collection[str] = ()) -> Rope:
    """The rotary embedding of a config.json.

    Args:
        config: its fields.
        where: names it in messages.
        ignore_fields: names of keys to accept although they are unknown here, such as "rope_scaling.mscale".

    Raises:
        CptError: a kind of scaling that Megatron lacks, a key or a value that is not understood, or two statements
            that differ.
    """
    thetas, scalings = {}, {}
    if "rope_theta" in config:
        thetas["rope_theta"] = _number(config["rope_theta"], "rope_theta", where)
    elif config.get("rope_scaling") is not None:  # beside it, transformers 4 looks for the base nowhere else
        thetas["rope_theta, left out,"] = _DEFAULT_THETA
    for field in ("rope_scaling", "rope_parameters"):
        given = config.get(field)
        if given is not None:
            scalings[field] = _read_scaling(given, field, where, ignore_fields)
            if "rope_theta" in given:
                thetas[f"{field}.rope_theta"] = _number(given["rope_theta"], f"{field}.rope_theta", where)
        elif field == "rope_scaling" and field in config:
            scalings[field] = None
    # Each kind by itself: a file may give the base in one place and the scaling in another.
    _refuse_two_statements(thetas, where)
    _refuse_two_statements(scalings, where)
    return Rope(next(iter(thetas.values()), _DEFAULT_THETA), next(iter(scalings.values()), None))


def set_rope(config: dict[str, Any], rope: Rope) -> None:
    """Write a rotary embedding into a config.json's fields so that transformers 4 and 5 both read it.

    The older spelling is always written; today's is brought in line where it is there.
    """
    config["rope_theta"] = rope.theta
    config["rope_scaling"] = rope.scaling.fields() if rope.scaling else None
    if config.get("rope_parameters") is not None:
        scaling = rope.scaling.fields() if rope.scaling else {"rope_type": "default"}
        config["rope_parameters"] = {"rope_theta": rope.theta, **scaling}


def older_spelling_differs(config: Mapping[str, Any], rope: Rope, ignore_fields: Collection[str] = ()) -> bool:
    """Whether transformers 4, which passes over `rope_parameters`, reads another rotary embedding than `rope`."""
    return read_rope({**config, "rope_parameters": None}, "config.json", ignore_fields) != rope


def in_older_spelling(
    config: Mapping[str, Any], where: str, ignore_fields: Collection[str] = ()
) -> dict[str, Any] | None:
    """A config.json's fields as transformers 4 has to be handed them; None where it reads them rightly as they are.

    Raises:
        CptError: as `read_rope`.
    """
    if config.get("rope_parameters") is None:
        return None
    rope = read_rope(config, where, ignore_fields)
    if not older_spelling_differs(config, rope, ignore_fields):
        return None
    spelled = dict(config)
    set_rope(spelled, rope)
    return spelled


def _read_scaling(given: Any, field: str, where: str, ignore_fields: Collection[str]) -> RopeScaling | None:
    if not isinstance(given, Mapping):
        raise CptError(f"{where}: {field} cannot be {given!r}. Download the file again.")
    if nested := [key for key, value in given.items() if isinstance(value, Mapping)]:
        raise CptError(
            f"{where}: {field} differs by kind of layer ({', '.join(nested)}), which NeMo's model cannot follow: it "
            "rotates alike in every layer."
        )
    kind = _kind(given, field, where)
    _refuse_other_keys(given, kind, field, where, ignore_fields)
    if missing := [name for name in _KEYS[kind] if given.get(name) is None]:
        raise CptError(f"{where}: {field} of type {kind!r} lacks {', '.join(missing)}.")
    numbers: dict[str, Any] = {name: _number(given[name], f"{field}.{name}", where) for name in _KEYS[kind]}
    # Between the two the frequencies are blended, divided by the factors' difference.
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise CptError(
            f"{where}: {field}'s low_freq_factor {numbers['low_freq_factor']:g} is not below its high_freq_factor "
            f"{numbers['high_freq_factor']:g}. Download the file again."
        )
    # The kind `default` has no numbers: it rotates as without any scaling.
    return RopeScaling(kind, **numbers) if numbers else None


def _kind(given: Mapping[str, Any], field: str, where: str) -> str:
    kinds = {name: given[name] for name in ("rope_type", "type") if name in given}
    _refuse_two_statements({f"{field}.{name}": kind for name, kind in kinds.items()}, where)
    if not kinds and field == "rope_scaling":
        raise CptError(f"{where}: {field} {dict(given)} has no rope_type. Say which it is, as transformers asks.")
    kind = next(iter(kinds.values()), "default")  # which is what transformers 5 takes for rope_parameters
    if kind not in _KEYS:
        raise CptError(
            f"{where}: rope scaling of type {kind!r} is not supported; supported are 'llama3', 'linear' and none. "
            "Megatron would rotate by other angles than the model was trained with."
        )
    return str(kind)


def _refuse_other_keys(
    given: Mapping[str, Any], kind: str, field: str, where: str, ignore_fields: Collection[str]
) -> None:
    # What is unknown may change the angles of every position: refused, not passed over.
    known = {"rope_type", "type", "rope_theta", *_KEYS[kind]}
    for key, value in given.items():
        whole = key == "partial_rotary_factor" and value == 1
        if key in known or value is None or whole or f"{field}.{key}" in ignore_fields:
            continue
        raise CptError(
            f"{where}: {field}'s key {key!r} with value {value!r} is refused because scaling of type {kind!r} has no "
            f"such key here, and it may change the angles. If you know that it does not matter, allow it with "
            f"ignore_fields=['{field}.{key}'] (--ignore-field {field}.{key})."
        )


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise CptError(f"{where}: {name} cannot be {value!r}; it is a positive number. Download the file again.")
    return value


def _refuse_two_statements(statements: Mapping[str, Any], where: str) -> None:
    (first, one), *others = statements.items() or [("", None)]
    for name, other in others:
        if other != one:
            raise CptError(
                f"{where}: {first} says {_shown(one)} and {name} says {_shown(other)}. transformers 4 and 5 would "
                "each read another model. Correct the file: compare it with the model's page on the hub."
            )


def _shown(value: Any) -> str:
    return str(value.fields()) if isinstance(value, RopeScaling) else str(value)
