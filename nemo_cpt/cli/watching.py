"""Commands of `nemo-cpt`: looking at runs."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.launch import PANEL, Json
from nemo_cpt.cli.results import RESULTS, Directory
from nemo_cpt.cli.tables import print_json
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    from nemo_cpt.watching.following import Follower


@app.command(rich_help_panel=PANEL)
def watch(
    run: Annotated[str | None, typer.Argument(help="The run's name, or its folder; by default the newest.")] = None,
    directory: Directory = RESULTS,
    plain: Annotated[bool, typer.Option("--plain", help="Lines, also on a terminal.")] = False,
) -> None:
    """Watch a run until it ends: progress, speed, losses, what is gained and forgotten. Ctrl-C leaves the run alone.

    On a terminal the key l goes to the raw log and back, and q ends watching as Ctrl-C does. It reads the run's files
    alone, so that it works for jobs elsewhere that share the file system; those of a job that was submitted over SSH
    are fetched. Ends with 0 where the run is finished, with 75 where it was stopped and has saved, with 2 where it
    failed.
    """
    from nemo_cpt.watching import following
    from nemo_cpt.watching.terminal import shows_views

    try:
        with _follower(run, directory) as follower:
            ended = following.follow(follower, live=shows_views(sys.stdout) and not plain)
    # Watching ends; the run goes on, and this is no failure.
    except KeyboardInterrupt:
        raise typer.Exit from None
    following.check_ended_well(ended)


@contextlib.contextmanager
def _follower(run: str | None, directory: Path) -> Iterator["Follower"]:
    """Of a run here, else of one that was submitted from here over SSH."""
    from nemo_cpt.launching import results
    from nemo_cpt.watching import following

    try:
        # On this machine first: a run of that name here is the one that is meant.
        folder = results.run(run, directory).folder if run else following.newest_run(directory)
    except CptError:
        from nemo_cpt.watching import remote

        if (reached := remote.find(run)) is None:
            if waits := remote.not_begun(run, directory):
                raise CptError(
                    f"the job that trains {run or 'the newest run'} has made no folder for it yet: it waits, starts or "
                    f"has failed. nemo-cpt status {waits.id} says which"
                ) from None
            raise
        with remote.connected(reached) as follower:
            yield follower
    else:
        yield following.Follower(folder)


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
