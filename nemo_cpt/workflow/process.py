"""A step's own process: what crashes, or imports NeMo, there leaves the workflow alone.

    python -m nemo_cpt.workflow.process REQUEST.json RESULT.json

It ends when the workflow's does, by SIGTERM, as it would by hand: what trains saves.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.atomic_files import write_whole
from nemo_cpt.errors import CptError
from nemo_cpt.python_files import import_file
from nemo_cpt.signals import end_with_parent

VOLATILE = ("seconds", "rates", "status")  # of a report: what is another each time


def main(request: str, result: str) -> None:
    """Do what a request says, and write what came of it.

    Args:
        request: file with `command`, words behind `nemo-cpt`; or `function`, `MODULE:NAME` or `FILE.py:NAME`, and its
            `parameters`.
        result: file for what the function returns, without times.
    """
    _end_with_the_workflow()
    asked = json.loads(Path(request).read_bytes())
    if "command" in asked:
        # In this process: the workflow's signals reach it as a terminal's would.
        os.execv(sys.executable, [sys.executable, "-P", "-m", "nemo_cpt.cli", *asked["command"]])
    returned = _function(asked["function"])(**asked["parameters"])
    write_whole(Path(result), json.dumps(_plain(returned), ensure_ascii=False, default=str).encode())


def _end_with_the_workflow() -> None:
    parent = os.getppid()
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(CptError.exit_code)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if module.endswith(".py"):
        # First, as for any script that is run: nothing but the user's function is in this process.
        sys.path.insert(0, str(Path(module).absolute().parent))
        try:
            loaded = import_file(Path(module))
        except CptError as error:
            traceback.print_exception(error.__cause__)  # for the log: whose function it is may want all of it
            raise
    else:
        loaded = importlib.import_module(module)
    return getattr(loaded, function)


def _plain(value: Any) -> dict[str, Any]:
    """What a function returned, as a mapping."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif isinstance(value, list | tuple):
        value = {"returned": [_plain(each) if is_dataclass(each) else each for each in value]}
    elif not isinstance(value, Mapping):
        value = {} if value is None else {"returned": value}
    return {str(name): each for name, each in value.items() if name not in VOLATILE}


if __name__ == "__main__":
    main(*sys.argv[1:])
