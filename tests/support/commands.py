"""`nemo-cpt` and `nemo` commands that import NeMo, forked from the server that has imported it.

A test of what a command imports, how fast it starts or how signals reach it starts an interpreter of its own.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.training.jobs import process


def nemo_cpt(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a process of its own, which reads nothing.

    Args:
        arguments: what follows `nemo-cpt`.
        environ: added to this process's environment; nothing that is read when NeMo, NeMo-Run or the hub's library
            are imported, which has happened.
    """
    return _forked(_nemo_cpt, ("nemo-cpt", *arguments), environ or {})


def nemo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of NeMo-Run's as `nemo_cpt` does ours."""
    return _forked(_nemo, ("nemo", *arguments), {})


def python(source: str) -> subprocess.CompletedProcess[str]:
    """Execute the text of a script that imports NeMo, but for the launch of a job that would execute it again."""
    return _forked(partial(exec, source, {"__name__": "__main__"}), ("script.py",), {})


def _nemo_cpt() -> None:
    from nemo_cpt.cli import main

    main()


def _nemo() -> None:
    from nemo_run.__main__ import app

    app()


def _forked(
    main: Callable[[], None], command: tuple[str, ...], environ: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("stdout", "stderr")]
        given = (main, command, Path.cwd(), os.environ | environ, printed)
        forked = process(_run, given)
        forked.start()
        forked.join()
        stdout, stderr = (path.read_text("utf-8") for path in printed)
    return subprocess.CompletedProcess(command, forked.exitcode or 0, stdout, stderr)


def _run(
    main: Callable[[], None], command: tuple[str, ...], cwd: Path, environ: dict[str, str], printed: list[Path]
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    for descriptor, path in enumerate([Path(os.devnull), *printed]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = list(command)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own; here it would be the server's
    main()
