"""A plan as text for a terminal, and as a PNG."""

from collections.abc import Iterator
from pathlib import Path

from nemo_cpt.output import span
from nemo_cpt.page import drawing, png
from nemo_cpt.planning.hardware import GIB
from nemo_cpt.planning.plans import Plan
from nemo_cpt.planning.workload import Workload

COLOURS = {
    "weights": "blue",
    "fp8 copies of weights": "cyan",
    "gradients": "magenta",
    "optimizer": "yellow",
    "adapters": "green",
    "activations": "red",
    "logits and loss": "bright_red",
    "fragmentation": "bright_black",
    "CUDA context": "white",
}
OTHER = "bright_blue"
BAR_WIDTH = 64


def print_plan(plan: Plan, tokens: float | None = None) -> None:
    """Print the breakdown, a bar, the host's memory and the speed, as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", *(f"stage {each.stage}" for each in plan.stages))
    for name in _names(plan):
        cells = [f"{each.parts.get(name, 0) / GIB:.2f}" if name in each.parts else "" for each in plan.stages]
        table.add_row(f"[{COLOURS.get(name, OTHER)}]■[/] {name}", *cells)
    table.add_section()
    table.add_row("total, GiB", *(f"{each.total / GIB:.2f}" for each in plan.stages))
    table.add_row("at its peak in", *(each.moment for each in plan.stages))
    console.print(_title(plan), highlight=False)
    console.print(table)
    console.print(_bar(plan))
    for line in lines(plan, tokens):
        console.print(line, highlight=False)


def lines(plan: Plan, tokens: float | None = None) -> Iterator[str]:
    """Yield what a script or a log wants, one fact a line; the verdict last."""
    speed, tokens = plan.speed, plan.tokens if tokens is None else tokens
    yield (
        f"speed: {speed.tokens_per_second:,.0f} tokens/s ({speed.tokens_per_second / speed.gpus:,.0f} a GPU, "
        f"{speed.model_tflops:.0f} model TFLOP/s), {speed.step_seconds:.2f} s a step; {speed.error}"
    )
    if tokens:
        yield f"time: {span(speed.hours(tokens) * 3600)} for {tokens:,.0f} tokens"
    host = ", ".join(f"{name} {size / GIB:.0f}" for name, size in plan.host.parts.items() if size)
    yield f"host: {plan.host.total / GIB:.0f} GiB a node ({host})"
    if plan.lower_bound:
        yield f"a lower bound, for the planner leaves out: {', '.join(plan.workload.unmodelled)}"
    yield plan.verdict


def plot(plan: Plan, path: Path) -> None:
    """Write the stages' peaks as stacked bars, with the card's memory as a line, to a PNG file."""
    with drawing() as pyplot:
        figure, axis = pyplot.subplots(figsize=(4 + 1.2 * len(plan.stages), 5), layout="constrained")
        bottom = [0.0] * len(plan.stages)
        for name in _names(plan):
            sizes = [each.parts.get(name, 0) / GIB for each in plan.stages]
            axis.bar([f"stage {each.stage}" for each in plan.stages], sizes, bottom=bottom, label=name, width=0.6)
            bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
        axis.axhline(plan.memory_gib, color="black", linestyle="--", label=f"{plan.memory_gib:.1f} GiB on the card")
        axis.set(ylabel="GiB at the peak", title=_title(plan))
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
        path.write_bytes(png(figure))


def _title(plan: Plan) -> str:
    work = plan.workload
    kind = f"LoRA rank {work.lora_rank}" if work.lora_rank else "every parameter"
    gpus = f"{work.gpus} GPU{'s' * (work.gpus > 1)} {plan.gpu.name}"
    size = f"{work.parameters / 1e9:.2f} B" if work.parameters >= 1e9 else f"{work.parameters / 1e6:.1f} M"
    return f"{size} parameters, {kind}, {work.seq_length} x {work.micro_batch_size},{_recomputed(work)} {gpus}"


def _recomputed(work: Workload) -> str:
    """What is computed again in the backward pass, in words, with a comma behind them; empty where nothing is."""
    again = {"none": [], "selective": [" and ".join(work.recompute_modules)], "uniform": ["all layers"]}
    again["block"] = [f"{work.recomputed(work.stage_layers)} of {work.stage_layers} layers"]
    what = again[work.recompute] + ["norms and activations"] * work.recompute_outputs
    return f" {', '.join(what)} recomputed," if what else ""


def _names(plan: Plan) -> list[str]:
    return list(dict.fromkeys(name for stage in plan.stages for name in stage.parts))


def _bar(plan: Plan) -> str:
    """The fullest GPU's memory as one line of blocks, a colour a part; what is free is dotted."""
    scale = max(plan.memory_gib, plan.peak_gib) * GIB / BAR_WIDTH
    bar, filled, done = "", 0, 0.0
    for name, size in plan.worst.parts.items():
        done += size
        # Rounded from the sum so far, so that the parts' cells add up to the bar's.
        cells = round(done / scale) - filled
        bar += f"[{COLOURS.get(name, OTHER)}]{'█' * cells}[/]"
        filled += cells
    card = round(plan.memory_gib * GIB / scale)
    if filled <= card:
        return f"{bar}{'·' * (card - filled)}| {plan.memory_gib:.1f} GiB"
    return f"{bar} {plan.peak_gib - plan.memory_gib:.1f} GiB more than the card's {plan.memory_gib:.1f} GiB"
