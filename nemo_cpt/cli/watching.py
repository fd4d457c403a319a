"""Commands of `nemo-cpt`: looking at runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.launch import PANEL, Json
from nemo_cpt.cli.results import RESULTS, Directory
from nemo_cpt.cli.tables import print_json


@app.command(rich_help_panel=PANEL)
def watch(
    run: Annotated[str | None, typer.Argument(help="The run's name, or its folder; by default the newest.")] = None,
    directory: Directory = RESULTS,
    plain: Annotated[bool, typer.Option("--plain", help="Lines, also on a terminal.")] = False,
) -> None:
    """Watch a run until it ends: progress, speed, losses, what is gained and forgotten. Ctrl-C leaves the run alone.

    It reads the run's files alone, so that it works for jobs elsewhere that share the file system. Ends with 0 where
    the run is finished, with 75 where it was stopped and has saved, with 2 where it failed.
    """
    from nemo_cpt.launching import results
    from nemo_cpt.watching import following

    folder = results.run(run, directory).folder if run else following.newest_run(directory)
    try:
        ended = following.follow(following.Follower(folder), live=sys.stdout.isatty() and not plain)
    except KeyboardInterrupt:
        raise typer.Exit from None
    following.check_ended_well(ended)


@app.command(rich_help_panel=PANEL)
def report(
    run: Annotated[str, typer.Argument(help="The run's name, or its folder.")],
    against: Annotated[str | None, typer.Argument(help="A second run, to compare with.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the report; by default in the run's own.")
    ] = None,
    directory: Directory = RESULTS,
    json: Json = False,
) -> None:
    """Write what became of a run: a page that opens offline, pictures, and all of it as JSON."""
    from nemo_cpt.launching import results
    from nemo_cpt.watching.record import record
    from nemo_cpt.watching.report import as_dict, default_folder, write_report

    records = [record(results.run(name, directory).folder) for name in (run, against) if name is not None]
    paths = write_report(records, output or default_folder(records))
    if json:
        return print_json({"files": [str(path) for path in paths], **as_dict(records)})
    print(f"wrote {paths[0]}" + f", and beside it {', '.join(path.name for path in paths[1:])}")
