"""A recipe called by its name, and fields of what it returns changed as a command line says."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from typing import Any

from nemo_cpt.arguments import parameters_of
from nemo_cpt.catalog import source
from nemo_cpt.errors import CptError, nearest
from nemo_cpt.importing import uncollected
from nemo_cpt.training import settings
from nemo_cpt.training.fields import check_fields, fields_of, parts_of


def build_recipe(recipe: str, arguments: Mapping[str, Any], overrides: Sequence[str] = ()) -> Any:
    """Call a recipe function and change fields of what it returns.

    Args:
        recipe: `module.function` in nemo_cpt.recipes.
        arguments: the function's; a mapping for a Blend or for Conversations stands for their fields.
        overrides: `path.to.field=value` on the run.Partial, type-checked by the field's annotation.

    Returns:
        The run.Partial.

    Raises:
        CptError: a field does not exist (with the nearest names), a value has the wrong type, or the recipe objects;
            numbers with which no job could run.
    """
    module, _, function = recipe.rpartition(".")
    parameters = source.recipe(recipe).parameters
    given = {name: _made(value, parameters[name].annotation) if name in parameters else value
             for name, value in arguments.items()}  # fmt: skip
    with uncollected():
        recipes = import_module(f"nemo_cpt.recipes.{module}")
    partial = getattr(recipes, function)(**given)
    for override in overrides:
        _override(partial, override, parameters)
    check_fields(partial)
    # Once more: the fields that were changed may have made numbers with which no job could run.
    settings.check(settings.settings_in(partial))
    return partial


def _made(value: Any, annotation: str) -> Any:
    """A mixture from its fields; any other value as it is."""
    kind = source.mixture_of(annotation) if isinstance(value, Mapping) else None
    return kind(**value) if kind else value


def _override(partial: Any, override: str, parameters: Collection[str]) -> None:
    from nemo_run.cli.cli_parser import parse_value

    from nemo_cpt.executors import nemo_run_patches

    nemo_run_patches.parse_what_fields_hold()
    path, _, text = override.partition("=")
    *parents, name = path.split(".")
    config = partial
    try:
        for parent in parents:
            _check_field(config, parent)
            config = getattr(config, parent)
        _check_field(config, name)
    except CptError as error:
        raise CptError(f"{path}: {error.message}{_elsewhere(partial, name, parameters)}") from None
    field = parameters_of(config.__fn_or_cls__)[name]
    annotation = None if field.annotation is inspect.Parameter.empty else field.annotation
    # NeMo annotates many as `fp8: str = None`: there the word is no text.
    if field.default is None and text.lower() in ("none", "null"):
        return setattr(config, name, None)
    try:
        value = parse_value(text, annotation)
    except Exception as error:
        raise CptError(f"{override}: expected {annotation} ({error})") from error
    setattr(config, name, value)


def _check_field(config: Any, name: str) -> None:
    function = getattr(config, "__fn_or_cls__", None)
    if function is None:
        raise CptError(f"{name} is a field of a plain value, {config!r}, which has none")
    fields = parameters_of(function)
    if name not in fields:
        raise CptError(f"{function.__name__} has no field {name}; {nearest(name, fields)}")


def _elsewhere(partial: Any, name: str, parameters: Collection[str]) -> str:
    """Where the recipe has what a path that leads nowhere ends with, as the paths of NeMo 1's settings do."""
    if name in parameters:
        return f". The recipe has a parameter {name}="
    paths = [f"{path}.{name}".strip(".") for path, config in parts_of(partial) if name in fields_of(path, config)]
    return f". There is {', '.join(paths)}" if paths else ""
