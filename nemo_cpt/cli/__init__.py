"""The `nemo-cpt` command: one module a group of commands; each parses, calls one function and prints."""

import sys
from typing import Annotated

import typer

from nemo_cpt.errors import CptError
from nemo_cpt.output import say
from nemo_cpt.quiet import quiet_imports

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
    """Run the command line; a CptError becomes its message on stderr and exit code 2."""
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


if __name__ == "__main__":
    main()
