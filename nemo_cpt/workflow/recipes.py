"""Steps that train a recipe: their parameters are those of `nemo-cpt run` and of its configuration files."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_cpt import catalog
from nemo_cpt.errors import CptError
from nemo_cpt.workflow.kinds import EXECUTOR, OPTION, paths_in, value_of

RECIPE = "recipe"  # beside the recipe's own parameters
MIXTURES, FILES = ("data", "replay"), (".yaml", ".yml", ".json")
READS = ("base", "data", "replay", "tokenizer")


def function(name: str, parameters: Mapping[str, Any]) -> catalog.Function:
    """The recipe that a step trains.

    Raises:
        CptError: it names none, or one that there is not.
    """
    if RECIPE not in parameters:
        raise CptError(f"{name} names no recipe: give it one, such as recipe: tiny.continual_pretrain")
    return catalog.recipe(str(parameters[RECIPE]))


def pairs(parameters: Mapping[str, Any]) -> list[str]:
    """The parameters as `key=value` of the command line, the recipe and the executor left out."""
    return [f"{key}={text(value)}" for key, value in parameters.items() if key not in (RECIPE, EXECUTOR)]


def text(value: Any) -> str:
    """A plain value in the command line's words."""
    # JSON is the YAML that the command line reads.
    return value if isinstance(value, str) else "None" if value is None else json.dumps(value, ensure_ascii=False)


def split(
    name: str, parameters: Mapping[str, Any], folder: Path
) -> tuple[catalog.Function, dict[str, Any], list[str], list[str]]:
    """The recipe, its arguments, fields of its config and its executor's options, as `catalog.split`.

    Args:
        name: the step's.
        parameters: the step's.
        folder: that of the workflow's file, where files that they name are looked for.

    Raises:
        CptError: a parameter is unknown, missing or of the wrong type.
    """
    try:
        with contextlib.chdir(folder) if folder.is_dir() else contextlib.nullcontext():
            return catalog.split(function(name, parameters).name, pairs(parameters))
    except CptError as error:
        raise CptError(f"{name}: {error.message}") from None


def check(name: str, parameters: Mapping[str, Any], folder: Path) -> None:
    """Check a step's parameters against its recipe's and its executor's own; see `split`.

    Raises:
        CptError: as `split`; there is no such executor, or it has no such option.
    """
    *_, options = split(name, parameters, folder)
    executor = str(parameters.get(EXECUTOR, "local"))
    # A file of the user's has no options that could be read.
    if ".py:" not in executor:
        catalog.parse(catalog.executor(executor), options, prefix=OPTION)


def reads(recipe: catalog.Function, arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """The base, the datasets and the tokenizer that a training reads; where it is not said, the recipe's own.

    Args:
        recipe: what is trained.
        arguments: its own, as `split` has them.
        parameters: the step's, in which a mixture may be the name of a file, which is read too.
    """
    found = [value for name in MIXTURES if isinstance(value := parameters.get(name), str) and value.endswith(FILES)]
    for name in READS:
        if name not in recipe.parameters:
            continue
        value = value_of(recipe, name, arguments)
        # The recipe's own default data: files as well, which another step may make.
        if name == "data" and value is None:
            value = catalog.default_data(recipe)
        found += paths_in(_fields(value))
    return list(dict.fromkeys(found))


def _fields(value: Any) -> Any:
    """A mixture as a mapping."""
    held = ("train", "validation", "test")
    return {name: getattr(value, name, {}) for name in held} if hasattr(value, "train") else value


def run_folder(recipe: catalog.Function, arguments: Mapping[str, Any]) -> str:
    """The folder that a training writes to."""
    directory, name = (value_of(recipe, each, arguments) for each in ("directory", "name"))
    return str(Path(str(directory or "results"), str(name or "")))


def command(parameters: Mapping[str, Any], extra: Iterable[str] = ()) -> list[str]:
    """The words behind `nemo-cpt` that train the recipe."""
    executor = ["--executor", str(parameters[EXECUTOR])] if EXECUTOR in parameters else []
    return ["run", str(parameters[RECIPE]), *pairs(parameters), *executor, "--plain", *extra]
