"""Recipes from the YAML that `--to-yaml` writes.

NeMo-Run 0.11.1 turns such a file into `key=value` arguments and parses those, which fails on every list of configs: it
cannot read back even NeMo's own `llama31_8b` recipe. Here each `_target_` becomes a config directly.
"""

import pydoc
from pathlib import Path
from typing import Any

import yaml

from nemo_cpt.errors import CptError


def load(path: str | Path) -> Any:
    """The recipe that a YAML file describes.

    Raises:
        CptError: there is no such file, it is no YAML of a recipe, or it names something that cannot be imported.
    """
    try:
        # safe: YAML's own tags could make any object; `_target_` is imported, which running a recipe does anyway.
        node = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CptError(f"{path} cannot be read as a recipe's YAML: {error}") from None
    if not isinstance(node, dict) or "_target_" not in node:
        raise CptError(f"{path} describes no recipe: it has no _target_ at its top. Write one with --to-yaml")
    return _build(node, str(path))


def _build(node: Any, path: str) -> Any:
    if isinstance(node, list):
        return [_build(item, path) for item in node]
    if not isinstance(node, dict):
        return node
    arguments = {
        key: _build(value, path) for key, value in node.items() if key not in ("_target_", "_partial_", "_call_")
    }
    if "_target_" not in node:
        return arguments
    # Imports modules on the way to a class or a method, which `import_module` would not.
    target = pydoc.locate(node["_target_"])
    if target is None:
        raise CptError(f"{path} names {node['_target_']}, which cannot be imported")
    # A class or function itself, such as a dtype.
    if node.get("_call_") is False:
        return target
    return _config(target, arguments, bool(node.get("_partial_")), path)


def _config(target: Any, arguments: dict[str, Any], partial: bool, path: str) -> Any:
    import nemo_run as run

    try:
        return (run.Partial if partial else run.Config)(target, **arguments)
    except TypeError as error:
        raise CptError(f"{path}: {error}") from None
