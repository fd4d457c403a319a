"""Command of `nemo-cpt`: will a recipe fit, and how long will it take."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.launch import PANEL, Json, Pairs, Recipe
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    from nemo_cpt.planning import Fit, Workload

EXIT_DOES_NOT_FIT = 3


@app.command(rich_help_panel=PANEL)
def plan(
    recipe: Recipe,
    overrides: Pairs = None,
    gpu_memory: Annotated[float | None, typer.Option(help="The card's memory as sold: 24, 48, 80, 141.")] = None,
    gpu: Annotated[str | None, typer.Option(help='Kind of GPU: H200, H100, A100-80GB, "RTX 6000 Ada", ...')] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all; by default the recipe's own.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on; by default the recipe's own.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the breakdown as a PNG file.")] = None,
    json: Json = False,
) -> None:
    """Plan a recipe without a GPU: memory by part, tokens a second, hours; and what would fit if it does not.

    Ends with 0 if it fits, with 3 if not, with 2 where the command itself is wrong.
    """
    from nemo_cpt.planning import picture, plan_workload

    work = read(recipe, overrides, gpus)
    planned = plan_workload(work, gpu_memory, gpu)
    nearest = None if planned.fits else nearest_that_fits(work, gpu_memory, gpu)
    if plot:
        write_plot(planned, plot)
    if json:
        print(jsonlib.dumps(planned.as_dict(tokens) | {"nearest": _as_dict(nearest)}))
    else:
        if nearest is not None:
            print(f"what would fit: {_sentence(nearest)}")
        elif not planned.fits:
            print("nothing near it fits: take a larger GPU, more of them, LoRA, or a smaller model")
        picture.print_plan(planned, tokens)
    if not planned.fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def read(recipe: str, overrides: list[str] | None, gpus: int | None) -> "Workload":
    """Build a recipe, which imports NeMo, and read its workload, for another number of GPUs if given."""
    from nemo_cpt.cli.launch import _split
    from nemo_cpt.cli.task import build_recipe
    from nemo_cpt.planning import read as read_recipe

    function, arguments, fields, _ = _split(recipe, overrides or [])
    partial = build_recipe(function.name, arguments, fields)
    if gpus is not None:
        partial.trainer.devices, partial.trainer.num_nodes = spread(gpus, partial.trainer.devices)
    return read_recipe(partial)


def spread(gpus: int, per_node: int) -> tuple[int, int]:
    """GPUs a node and nodes for a number of GPUs.

    Raises:
        CptError: they do not fill nodes of the recipe's size.
    """
    if gpus <= per_node:
        return gpus, 1
    per_node = max(per_node, 8) if per_node == 1 else per_node
    if gpus > per_node and gpus % per_node:
        raise CptError(f"--gpus {gpus} does not fill nodes of {per_node} GPUs: give a multiple")
    return min(gpus, per_node), -(-gpus // per_node)


def nearest_that_fits(work: "Workload", gpu_memory: float | None, gpu: str | None) -> "Fit | None":
    """The fastest setting that fits with what does not change the training; else with more given up; else None."""
    from nemo_cpt.planning import ALLOWED, fit_workload
    from nemo_cpt.planning.search import FALLBACKS

    for allowed in (ALLOWED, (*ALLOWED, *FALLBACKS)):
        try:
            return fit_workload(work, gpu_memory, gpu, allow=allowed)
        except CptError:
            continue
    return None


def write_plot(planned: Any, path: Path) -> None:
    """Write a plan's picture.

    Raises:
        CptError: the folder does not exist, or the name is not that of a PNG file.
    """
    from nemo_cpt.planning import picture

    if path.suffix != ".png" or not path.parent.is_dir():
        raise CptError(f"--plot {path}: give a .png file in a folder that exists")
    picture.plot(planned, path)


def _sentence(found: "Fit") -> str:
    return "; ".join(map(str, found.changes)) + f" -> {found.plan.verdict}"


def _as_dict(found: "Fit | None") -> dict[str, Any] | None:
    if found is None:
        return None
    changes = [{"knob": each.knob, "before": each.before, "after": each.after} for each in found.changes]
    return {"changes": changes, "plan": found.plan.as_dict()}
