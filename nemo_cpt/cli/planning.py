"""Command of `nemo-cpt`: will a recipe fit, and how long will it take."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_cpt.cli import app
from nemo_cpt.cli.launch import PANEL, Json
from nemo_cpt.cli.recipe_arguments import Pairs, Recipe, RecipeCommand, from_file
from nemo_cpt.errors import CptError

if TYPE_CHECKING:
    from nemo_cpt.planning import Fit, Plan, Workload

EXIT_DOES_NOT_FIT = 3


@app.command(rich_help_panel=PANEL, cls=RecipeCommand)
def plan(
    recipe: Recipe,
    overrides: Pairs = None,
    gpu_memory: Annotated[float | None, typer.Option(help="The card's memory as sold: 24, 48, 80, 141.")] = None,
    gpu: Annotated[str | None, typer.Option(help='Kind of GPU: H200, H100, A100-80GB, "RTX 6000 Ada", ...')] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all; by default the recipe's own.")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="To train on; by default the recipe's own.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the breakdown as a PNG file.")] = None,
    json: Json = False,
) -> None:
    """Plan a recipe without a GPU: memory by part, tokens a second, hours; and what would fit if it does not.

    Ends with 0 if it fits, with 3 if not, with 2 where the command itself is wrong.
    """
    from nemo_cpt.planning import hardware, picture, plan_workload
    from nemo_cpt.planning.search import nearest_that_fits

    hardware.gpu(gpu)  # before a process imports NeMo to read the recipe
    work = read(recipe, overrides, gpus)
    # A size alone says how much fits; how fast it is takes a card, the one that is sold with it.
    assumed = None if gpu or gpu_memory is None else hardware.of_size(gpu_memory)
    gpu = assumed.name if assumed else gpu
    planned = plan_workload(work, gpu_memory, gpu)
    # Searched only where it is wanted: many settings are planned for it.
    nearest = None if planned.fits else nearest_that_fits(work, gpu_memory, gpu)
    # Before anything is printed: a path that cannot be written is an error of the command's.
    if plot:
        write_plot(planned, plot)
    if json:
        print(jsonlib.dumps(planned.as_dict(tokens) | {"nearest": _as_dict(nearest)}))
    else:
        if gpu_memory is not None:
            print(f"the speed is that of {_a_card(planned, gpu_memory, bool(assumed))}")
        if _is_for_the_cpu(recipe, overrides):
            print("the recipe runs on the CPU: this is what it would take on a GPU; its own time is not planned")
        picture.print_plan(planned, tokens)
        print_nearest(planned, nearest)
    if not planned.fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _a_card(planned: "Plan", gpu_memory: float, assumed: bool) -> str:
    if planned.gpu.memory_gib == planned.memory_gib:
        return f"{planned.gpu.name}{', taken for a card of this size: --gpu names another' if assumed else ''}"
    return f"{planned.gpu.name}, not of a card of {gpu_memory:g} GiB: --gpu names another"


def _is_for_the_cpu(recipe: str, overrides: list[str] | None) -> bool:
    from nemo_cpt import catalog

    return catalog.recipe(from_file(recipe, overrides)[0]).gpus({}) == 0


def read(recipe: str, overrides: list[str] | None, gpus: int | None) -> "Workload":
    """Read a recipe's workload, for another number of GPUs if given."""
    from nemo_cpt import catalog
    from nemo_cpt.catalog.workloads import workload

    # A file's executor has no part in a plan.
    recipe, pairs, _ = from_file(recipe, overrides)
    function, arguments, fields, _ = catalog.split(recipe, pairs)
    work = workload(function.name, arguments, fields)
    if gpus is None:
        return work
    per_node, nodes = spread(gpus, work.gpus_per_node)
    return work.replace(gpus=per_node * nodes, gpus_per_node=per_node)


def spread(gpus: int, per_node: int) -> tuple[int, int]:
    """GPUs a node and nodes for a number of GPUs.

    Raises:
        CptError: they do not fill nodes of the recipe's size.
    """
    # Fewer than a node of the recipe's: part of one node.
    if gpus <= per_node:
        return gpus, 1
    # A recipe for one GPU says nothing of nodes, of which most have 8.
    per_node = max(per_node, 8) if per_node == 1 else per_node
    if gpus > per_node and gpus % per_node:
        raise CptError(f"--gpus {gpus} does not fill nodes of {per_node} GPUs: give a multiple")
    return min(gpus, per_node), -(-gpus // per_node)


def write_plot(planned: Any, path: Path) -> None:
    """Write a plan's picture.

    Raises:
        CptError: the folder does not exist, or the name is not that of a PNG file.
    """
    from nemo_cpt.planning import picture

    if path.suffix != ".png" or not path.parent.is_dir():
        raise CptError(f"--plot {path}: give a .png file in a folder that exists")
    picture.plot(planned, path)


def print_nearest(planned: "Plan", nearest: "Fit | None") -> None:
    """Print what would fit, a line a change; nothing for a plan that fits."""
    if planned.fits:
        return
    if nearest is None:
        print("nothing near it fits: take a larger GPU, more of them, LoRA, or a smaller model")
        return
    print("what would fit:")
    for change in nearest.changes:
        print(f"  {change}")
    print(f"  -> {nearest.plan.speed.tokens_per_second:,.0f} tokens/s; {nearest.plan.verdict}")


def _as_dict(found: "Fit | None") -> dict[str, Any] | None:
    if found is None:
        return None
    changes = [{"knob": each.knob, "before": each.before, "after": each.after} for each in found.changes]
    return {"changes": changes, "plan": found.plan.as_dict()}
