"""A Hugging Face model's config as the installed transformers has to be handed it."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from nemo_cpt.checkpoint.rope import in_older_spelling


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
    if spelled := in_older_spelling(fields, f"{model}/config.json", ignore_fields):
        # From the fields: `from_pretrained` would read the file again, without what was added.
        return AutoConfig.for_model(**spelled)
    return AutoConfig.from_pretrained(model)
