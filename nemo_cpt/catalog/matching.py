"""Which recipes are made for a base: their models, as the source declares them, compared with its own files."""

import ast
from pathlib import Path
from typing import Any

from nemo_cpt import compatibility
from nemo_cpt.catalog.source import Function, recipes
from nemo_cpt.checkpoint.folders import refuse_adapter
from nemo_cpt.errors import CptError
from nemo_cpt.planning import from_scratch
from nemo_cpt.recipe_models import LIKE_BASE, like_base, model_config

SHOWN = 2  # differences: a model of another size differs in all


def recipes_for(folder: Path) -> dict[str, tuple[Function, str]]:
    """Compare every recipe's model with a base.

    Args:
        folder: of a Hugging Face model, an imported base, or a training's checkpoint.

    Returns:
        By name each recipe, and why it is not the base's: what differs; empty for one that is.

    Raises:
        CptError: there is no model in the folder, or it does not say its shape.
    """
    refuse_adapter(folder)
    base = compatibility.read_base(folder)
    if not base.constants:
        raise CptError(
            f"{folder} does not say what model it is (no config.json of a model that can be imported, no NeMo context)"
            if folder.is_dir()
            else f"there is no folder {folder}"
        )
    return {name: (each, _why_not(base, each)) for name, each in recipes().items()}


def takes_like_base(folder: Path) -> str:
    """What to say of the recipes that are not the base's; empty where its config.json is not translated."""
    if compatibility.read_base(folder).architecture is None:
        return ""
    return f"the others train it too, with model={LIKE_BASE} (gpt's in any case): its shape, and their settings"


def _why_not(base: compatibility.Base, recipe: Function) -> str:
    # Such recipes take any shape; what may not fit is the size that their schedule is for.
    if like_base(recipe.path):
        size = recipe.parameters["params"].default if "params" in recipe.parameters else None
        return from_scratch.of_another_size(ast.literal_eval(size), base.folder) if size else ""
    model = model_config(recipe.path)
    if not model:
        return "its source declares no model that could be compared"
    found = compatibility.unlike(base, model)
    first = ", ".join(f"{each.name} {_shown(each.one)} (the base's: {_shown(each.other)})" for each in found[:SHOWN])
    return first + (f", and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
