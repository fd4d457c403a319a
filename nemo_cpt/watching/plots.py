"""The report's pictures, of one run or of two: matplotlib figures as PNG."""

from collections.abc import Callable, Sequence
from typing import Any

from nemo_cpt.page import drawing, legend_name, png
from nemo_cpt.training.metrics import LOSS
from nemo_cpt.watching.record import GPU_MEMORY, TRAIN_LOSS, Record

SIZE = (7.2, 3.6)
DASHES = ("-", "--")  # of the first and of the second run
COLOURS = ("#2f6f9f", "#c1622d", "#4b8b3b", "#7a4fa3", "#8a6d1d", "#a33b56")


def pictures(records: Sequence[Record]) -> dict[str, bytes]:
    """Each picture that there is something to draw of, by its file's name without `.png`, in the page's order."""
    draw = {
        "loss": _loss,
        "validation": _validation,
        "forgetting": _forgetting,
        "learning_rate": lambda axis, runs: _line(axis, runs, "lr", "learning rate"),
        "gradient_norm": lambda axis, runs: _line(axis, runs, "grad_norm", "gradient norm"),
        "throughput": _throughput,
        "memory": lambda axis, runs: _line(axis, runs, GPU_MEMORY, "GiB taken by rank 0's allocator"),
    }
    with drawing() as pyplot:
        drawn = {name: _picture(pyplot, how, records) for name, how in draw.items()}
    return {name: content for name, content in drawn.items() if content}


def _picture(pyplot: Any, draw: Callable[[Any, Sequence[Record]], None], records: Sequence[Record]) -> bytes | None:
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    draw(axis, records)
    # Older runs measured less: there is no empty picture of what they lack.
    if not axis.has_data():
        pyplot.close(figure)
        return None
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small")
    return png(figure)


def _label(record: Record, records: Sequence[Record], what: str = "") -> str | None:
    """What a line is, and whose, where there are two runs; nothing for the only line of a picture."""
    return legend_name(", ".join(filter(None, (what, record.name if len(records) > 1 else "")))) or None


def _line(axis: Any, records: Sequence[Record], name: str, unit: str) -> None:
    for number, record in enumerate(records):
        steps, values = record.series(name)
        if steps:
            axis.plot(
                steps, values, DASHES[number], color=COLOURS[number], linewidth=1.2, label=_label(record, records)
            )
    axis.set_ylabel(unit)


def _loss(axis: Any, records: Sequence[Record]) -> None:
    """The training loss, thin, and under it its running mean, which the eye would draw."""
    for number, record in enumerate(records):
        steps, values = record.series(TRAIN_LOSS)
        if not steps:
            continue
        smoothed = running_mean(values)
        axis.plot(steps, values, color=COLOURS[number], linewidth=0.6, alpha=0.35)
        label = _label(record, records, f"mean of {_window(values)} steps")
        axis.plot(steps, smoothed, DASHES[number], color=COLOURS[number], linewidth=1.6, label=label)
    axis.set_ylabel("training loss, nats per token")


def _validation(axis: Any, records: Sequence[Record]) -> None:
    units = {record.unit(name)[1] for record in records for name in record.validation_sets}
    for number, record in enumerate(records):
        for index, name in enumerate(record.validation_sets):
            steps, losses = record.series(f"{LOSS}{name}")
            # One axis has one unit: of sets with bytes and without, all are shown in nats.
            scale = record.unit(name)[0] if len(units) == 1 else 1.0
            axis.plot(steps, [scale * loss for loss in losses], DASHES[number], color=COLOURS[index % len(COLOURS)],
                      marker="o", markersize=3.5, label=_label(record, records, name))  # fmt: skip
    axis.set_ylabel(f"validation, {units.pop() if len(units) == 1 else 'nats per token'}")


def _forgetting(axis: Any, records: Sequence[Record]) -> None:
    """Each set's change in percent, with two standard errors at the last validation."""
    for number, record in enumerate(records):
        for index, name in enumerate(record.validation_sets):
            steps, losses = record.series(f"{LOSS}{name}")
            if len(steps) < 2:
                continue
            colour, percent = COLOURS[index % len(COLOURS)], [100 * (loss / losses[0] - 1) for loss in losses]
            axis.plot(steps, percent, DASHES[number], color=colour, marker="o", markersize=3.5,
                      label=_label(record, records, name))  # fmt: skip
            change = record.changes[name]
            if change.standard_error is not None:
                # Two of them, in percent.
                error = 200 * change.standard_error / change.first
                axis.errorbar(change.step, change.percent, yerr=error, color=colour, capsize=4, elinewidth=1.4)
    if axis.has_data():
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(ylabel="loss since the first validation, %", title="gained (below 0) and forgotten (above 0)")


def _throughput(axis: Any, records: Sequence[Record]) -> None:
    for number, record in enumerate(records):
        steps, speeds = record.speeds()
        if not steps or not record.tokens_per_step:
            continue
        label = _label(record, records, "measured")
        axis.plot(steps, speeds, DASHES[number], color=COLOURS[number], linewidth=0.9, label=label)
        if planned := record.plan.get("tokens_per_second"):
            axis.axhline(planned, color=COLOURS[number], linestyle=":", label=_label(record, records, "planned"))
    axis.set_ylabel("tokens/s")
    # From 0, so that a dip of 2 % looks like 2 %.
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of the last values at each place: of as many as make a twentieth of all."""
    # One sum that goes along, not one for each place: runs have a hundred thousand steps.
    window, found, total = _window(values), [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        found.append(total / min(index + 1, window))
    return found


def _window(values: Sequence[float]) -> int:
    # Of a run's own length: a fixed window would flatten a short run and leave a long one its noise.
    return max(len(values) // 20, 1)
