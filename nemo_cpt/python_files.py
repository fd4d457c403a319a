"""Python files of the user's: a workflow, an executor, a function that is a step."""

import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from nemo_cpt.errors import CptError

_IMPORTED = set[str]()  # names that files imported here have


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
