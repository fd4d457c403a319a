"""Which recipes are made for a base: their models, as the source declares them, compared with its own files."""

from pathlib import Path
from typing import Any

from nemo_cpt import compatibility
from nemo_cpt.catalog.source import Function, recipes
from nemo_cpt.errors import CptError
from nemo_cpt.recipe_models import LIKE_BASE, model_config

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
    known = compatibility.read_base(folder).architecture is not None
    return f"the others train it too, with model={LIKE_BASE}: its shape, and their settings" if known else ""


def _why_not(base: compatibility.Base, recipe: Function) -> str:
    model = model_config(recipe.path)
    if not model:
        return "its source declares no model that could be compared"
    found = compatibility.unlike(base, model)
    first = ", ".join(f"{each.name} {_shown(each.one)} (the base's: {_shown(each.other)})" for each in found[:SHOWN])
    return first + (f", and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
