"""A Hugging Face model's config as the installed transformers has to be handed it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from nemo_cpt.checkpoint.rope import older_spelling_differs, read_rope, set_rope


def transformers_config(model: str | os.PathLike[str], ignore_fields: Collection[str] = ()) -> Any:
    """The config for `from_pretrained(model, config=...)`, with its rotary embedding in the spelling of transformers 4.

    transformers 4 passes over `rope_parameters`, in which transformers 5 writes the whole of it, and would build
    another model without a word.

    Args:
        model: folder or hub name.
        ignore_fields: keys of `rope_parameters` to accept although they are unknown here.

    Raises:
        CptError: `rope_parameters` holds what cannot be said in the older spelling.
    """
    fields, _ = PretrainedConfig.get_config_dict(model)
    if added := _added_rope(fields, f"{model}/config.json", ignore_fields):
        # From the fields: `from_pretrained` would read the file again, without what was added.
        return AutoConfig.for_model(**fields | added)
    return AutoConfig.from_pretrained(model)


def rope_arguments(model: str | os.PathLike[str]) -> dict[str, Any]:
    """What else `from_pretrained(model)` has to be called with where whoever calls it hands over no config.

    Raises:
        CptError: as `transformers_config`.
    """
    fields, _ = PretrainedConfig.get_config_dict(model)
    added = _added_rope(fields, f"{model}/config.json")
    return {name: added[name] for name in ("rope_theta", "rope_scaling") if name in added}


def _added_rope(fields: Mapping[str, Any], where: str, ignore_fields: Collection[str] = ()) -> dict[str, Any]:
    """The fields with the rotary embedding in the older spelling; empty where they say it so already."""
    if fields.get("rope_parameters") is None:
        return {}
    rope, added = read_rope(fields, where, ignore_fields), dict(fields)
    set_rope(added, rope)
    return added if older_spelling_differs(fields, rope, ignore_fields) else {}
