"""Python files of the user's: a workflow, an executor, a function that is a step."""

import ast
import os
import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from nemo_cpt.errors import CptError

_IMPORTED = set[str]()  # names that files imported here have


def with_neighbours(path: Path) -> list[Path]:
    """A Python file, and what lies beside it that it imports, modules and packages, also by way of each other."""
    found = [path]
    for file in found:  # which grows
        beside = [each for name in _imported_by(file) for each in _module_files(path.with_name(name))]
        found += [each for each in beside if each not in found]
    return found


def _module_files(path: Path) -> list[Path]:
    """The files of a module, or of a package with all that is in it; none where there is neither."""
    if (path / "__init__.py").is_file():
        return sorted(path.rglob("*.py"))
    module = path.with_name(f"{path.name}.py")
    return [module] if module.is_file() else []


def _imported_by(file: Path) -> list[str]:
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):  # whoever imports it will hear of it
        return []
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def import_file(path: Path) -> ModuleType:
    """Import a Python file by its place. It may import its neighbours, of which none hides a library.

    Raises:
        CptError: it is no Python file, or what it does when it is imported fails, with the line.
    """
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CptError(f"{path} is no Python file")
    module = module_from_spec(spec)
    if (folder := str(path.absolute().parent)) not in sys.path:
        sys.path.append(folder)
    # By its name, dataclasses look for it, and what it pickles or starts with `spawn`; but random.py is not `random`.
    if path.stem not in sys.modules:
        _IMPORTED.add(path.stem)
    if path.stem in _IMPORTED:
        sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except CptError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f" (line {lines[-1]})" if lines else ""  # of a syntax error the message has it
        raise CptError(f"{path} cannot be imported: {type(error).__name__}: {error}{where}") from error
    return module


def environment_of_children() -> dict[str, str]:
    """This process's environment, with the place that nemo_cpt was imported from: a child's folder may be another."""
    import nemo_cpt

    home = str(Path(str(nemo_cpt.__file__)).absolute().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([home, *map(os.path.abspath, paths)]))}
