"""The `nemo-cpt` command: one module a group of commands; each parses, calls one function and prints."""

import errno
import locale
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nemo_cpt.errors import CptError
from nemo_cpt.output import hold_standard_streams, say, send_nowhere
from nemo_cpt.quiet import quiet_imports

# What a disk, a folder's owner or a name brings about, and no fault of ours: the system's words say enough.
OF_THE_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EFBIG,
}  # fmt: skip

app = typer.Typer(
    name="nemo-cpt",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # A traceback that reaches the user is a fault of ours: as Python prints it, it can be pasted into a report.
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"nemo-cpt {version('nemo_cpt')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Continual pretraining with NeMo 2.0: from text to an adapted model."""


def main() -> None:
    """Run the command line; a CptError becomes its message on stderr and exit code 2, and so does a full disk."""
    hold_standard_streams()
    _speak_utf8()
    # Before the modules, whose libraries warn while they are imported.
    quiet_imports()
    from nemo_cpt.cli import (  # noqa: F401  each registers its commands on `app`
        checkpoint,
        cleaning,
        conversations,
        corpus,
        doctor,
        evaluation,
        inference,
        launch,
        planning,
        publishing,
        results,
        vocabulary,
        watching,
        workflow,
    )

    try:
        app()
    except CptError as error:
        say(f"nemo-cpt: {error.message}", sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        say(f"nemo-cpt: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", sys.stderr)
        if not error.filename:  # stdout, which would be tried once more at the interpreter's end
            send_nowhere(1)
        sys.exit(CptError.exit_code)


def _speak_utf8() -> None:
    """Start over in UTF-8 where the locale is EUC-JP, Latin-1 or the like: texts and our sources are UTF-8."""
    if sys.platform != "linux" or sys.flags.utf8_mode or locale.getencoding().lower() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"  # of jobs and other children
    # As bytes: sys.argv was decoded by the locale, and not all of UTF-8 comes back from that.
    _, *arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
    os.execv(sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8", *arguments])


if __name__ == "__main__":
    main()
