"""Commands of `nemo-cpt`: what runs have left, and what of it may go."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.launch import PANEL, Json
from nemo_cpt.cli.tables import print_json, print_note, print_table
from nemo_cpt.errors import CptError
from nemo_cpt.output import size_of

if TYPE_CHECKING:
    from nemo_cpt.launching.results import Run

Directory = Annotated[Path, typer.Option("--directory", "-d", help="The folder with runs: the recipe's directory=.")]
RESULTS = Path("results")


@app.command(rich_help_panel=PANEL)
def ls(
    run: Annotated[str | None, typer.Argument(help="List this run's checkpoints: its name, or its folder.")] = None,
    directory: Directory = RESULTS,
    json: Json = False,
) -> None:
    """List the runs, or one run's checkpoints: state, steps, validation losses, size."""
    from nemo_cpt.launching import results
    from nemo_cpt.training.masks import MASKS

    if run is not None:
        return _print_checkpoints(results.run(run, directory), json)
    found = [_of_run(each) for each in results.runs(directory)]
    if json:
        return print_json({"runs": found})
    rows = [
        (each["name"], each["state"], _steps(each), _change(each), size_of(each["size"]), each["newest"] or "-")
        for each in found
    ]
    print_table(("run", "state", "step", "validation loss, nats", "size", "newest checkpoint"), rows)
    for each in found:
        if each["masks"]:  # one run's losses stand beside another's, and are not of the same tokens
            print_note(f"{each['name']}: its losses are masked, {'; '.join(MASKS[mask] for mask in each['masks'])}")


@app.command(rich_help_panel=PANEL)
def rm(
    run: Annotated[str, typer.Argument(help="The run's name, or its folder.")],
    keep: Annotated[
        int | None,
        typer.Option("--keep", help="Checkpoints to keep: the newest whole one, then those with the best loss."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove; without it only list what would go.")] = False,
    directory: Directory = RESULTS,
    json: Json = False,
) -> None:
    """Thin out a run's checkpoints. The newest whole one stays, and a run that is in use is left alone."""
    from nemo_cpt.launching import results

    chosen = results.run(run, directory)
    # No default: how much of somebody's work is removed is not for a program to guess.
    if keep is None:
        raise CptError(f"rm thins out a run's checkpoints: say how many stay, as in `nemo-cpt rm {run} --keep 1`")
    # The same list either way; without --yes nothing is touched, not even the lock.
    removals = results.remove(chosen, keep) if yes else results.to_remove(chosen, keep)
    if json:
        gone = [{"path": str(each.path), "why": each.why, "size": each.size} for each in removals]
        return print_json({"removed": yes, "checkpoints": gone})
    for each in removals:
        print(f"{each.path} ({size_of(each.size)}, {each.why})")
    total = size_of(sum(each.size for each in removals))
    if not removals:
        print(f"{chosen.folder}: nothing to remove")
    else:
        print(f"{total} removed" if yes else f"{total} would go; --yes removes it")


def _of_run(run: "Run") -> dict[str, Any]:
    from nemo_cpt.launching import results
    from nemo_cpt.training.masks import masks_of

    return {
        "name": run.folder.name,
        "state": run.state,
        "step": run.step,
        "max_steps": run.max_steps,
        # The first line is the validation ahead of the first step.
        "first_losses": run.losses(int(run.metrics[0]["step"])) if run.metrics else {},
        "losses": run.losses(),
        "masks": masks_of(run.newest.record) if run.newest else (),
        "size": results.size(run.folder),
        "newest": run.newest.path.name if run.newest else None,
    }


def _print_checkpoints(run: "Run", json: bool) -> None:
    from nemo_cpt.launching import results

    # `-last` and its like are other names of a checkpoint, and take no place of their own.
    links = [path for path in (run.folder / "checkpoints").glob("*") if path.is_symlink() and path.exists()]
    found: list[dict[str, Any]] = [
        {
            "name": str(each.path.relative_to(run.folder / "checkpoints")),
            "state": state,
            "step": each.step,
            "losses": run.losses(each.step),
            "size": results.size(each.path),
            "newest": run.newest is not None and each.path == run.newest.path,
            "links": [link.name for link in links if link.resolve() == each.path.resolve()],
        }
        for each, state in results.every_checkpoint(run)
    ]
    if json:
        return print_json({"run": str(run.folder), "state": run.state, "checkpoints": found})
    print(f"{run.folder}: {run.state}, step {run.step} of {run.max_steps or 'unknown'}")
    rows = [
        (each["name"], str(each["step"]), _losses(each["losses"]), size_of(each["size"]), each["state"], _note(each))
        for each in found
    ]
    print_table(("checkpoint", "step", "validation loss, nats", "size", "state", "note"), rows)


def _note(checkpoint: dict[str, Any]) -> str:
    newest = ["newest"] if checkpoint["newest"] else []
    return ", ".join(newest + [f"also {link}" for link in checkpoint["links"]]) or "-"


def _steps(run: dict[str, Any]) -> str:
    return f"{run['step']} of {run['max_steps']}" if run["max_steps"] else str(run["step"])


def _losses(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()) or "-"


def _change(run: dict[str, Any]) -> str:
    """Each set's loss, from the run's first validation to its last."""
    first = run["first_losses"]
    return ", ".join(f"{name} {first[name]:.4f} -> {loss:.4f}" if name in first else f"{name} {loss:.4f}"
                     for name, loss in run["losses"].items()) or "-"  # fmt: skip
