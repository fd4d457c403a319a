"""The models of the recipes as their source declares them: importing NeMo takes 20 s and more."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError

LIKE_BASE = "base"  # a recipe's `model=` that stands for the shape of its base
MODELS = "collections/llm/gpt/model"  # in nemo
CONFIGS = (  # where the classes of model configs are, as package and file; the nearest first
    ("nemo", f"{MODELS}/llama.py"),
    ("nemo", f"{MODELS}/mistral.py"),
    ("nemo", f"{MODELS}/qwen2.py"),
    ("nemo", f"{MODELS}/qwen3.py"),
    ("nemo", f"{MODELS}/base.py"),
    ("megatron", "core/transformer/transformer_config.py"),
)


def model_config(recipes: Path) -> dict[str, Any]:
    """Return the model config that the function `model` of a module of recipes makes.

    Args:
        recipes: the module's file.

    Returns:
        The fields by name, the class's defaults included and the class itself under `_target_`: the form of
        `checkpoint.model_config.read_model_config`. A value that is no literal is left out. Empty where the module has
        no such function, or one that does not call `run.Config` on one of NeMo's classes for Llama, Mistral or Qwen.
    """
    functions = [node for node in ast.parse(recipes.read_text()).body if isinstance(node, ast.FunctionDef)]
    for node in (each for function in functions if function.name == "model" for each in ast.walk(function)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.Config" and node.args:
            name = ast.unparse(node.args[0]).rpartition(".")[2]
            # The inner call: around it stands the one that makes the model.
            if "Config" in name and (known := _class(name)):
                given = {str(word.arg): value for word in node.keywords for value in _literal(word.value)}
                return {**known, **given}
    return {}


def like_base(recipes: Path) -> bool:
    """Whether a module's recipes have the shape of whatever base they get: a call in it says `model=LIKE_BASE`."""
    calls = (node for node in ast.walk(ast.parse(recipes.read_text())) if isinstance(node, ast.Call))
    keywords = (word for call in calls for word in call.keywords)
    return any(word.arg == "model" and ast.unparse(word.value) == "LIKE_BASE" for word in keywords)


def module_named(name: str) -> Path:
    """Return the module of recipes of a name, for its model.

    Raises:
        CptError: there is none that declares a model.
    """
    modules = {path.stem: path for path in recipe_modules()}
    if name not in modules:
        raise CptError(f"model={name}: give {LIKE_BASE}, for the base's own shape, or one of {', '.join(modules)}")
    return modules[name]


def recipe_modules() -> list[Path]:
    """Return the modules of `nemo_cpt.recipes` that declare a model."""
    spec = find_spec("nemo_cpt.recipes")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return [path for folder in folders for path in sorted(Path(folder).glob("[!_]*.py")) if model_config(path)]


@cache
def _class(name: str) -> dict[str, Any] | None:
    """A config class's fields with their defaults, and its full name as `_target_`; None for one that is not known."""
    for package, file in CONFIGS:
        if (node := _classes(package, file).get(name)) is None:
            continue
        found: dict[str, Any] = {}
        # The nearest base last, so that its fields win, as Python looks them up.
        for base in reversed(node.bases):
            found |= _class(ast.unparse(base).rpartition(".")[2]) or {}
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and field.value is not None:
                found |= {ast.unparse(field.target): value for value in _literal(field.value)}
        return {**found, "_target_": ".".join((package, *Path(file).with_suffix("").parts, name))}
    return None


@cache
def _classes(package: str, file: str) -> dict[str, ast.ClassDef]:
    spec = find_spec(package)  # of a top-level name: nothing is imported
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    path = next((path for folder in folders if (path := Path(folder, file)).is_file()), None)
    body = ast.parse(path.read_text()).body if path else []
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def _literal(node: ast.expr) -> Iterator[Any]:
    """The value of a literal, of `field(default_factory=lambda: LITERAL)`, the name of a function; else nothing."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field":
        factories = [word.value for word in node.keywords if word.arg == "default_factory"]
        node = next((each.body for each in factories if isinstance(each, ast.Lambda)), node)
    try:
        yield ast.literal_eval(node)
    except ValueError:
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
