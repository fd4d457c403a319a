"""What the demo shows at its end: a table, a plot and `report.json`."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_cpt.corpus.atomic_files import write_whole
from nemo_cpt.page import drawing, png

LANGUAGES = {"ja": "Japanese", "en": "English"}


def table(report: dict[str, Any], console: Console) -> None:
    """Print the losses before and after, with replay and without."""
    view = Table(title="Loss on held-out text, in nats per token (plain transformers)", title_justify="left")
    for column in ("language", "before", "after, 25 % English replay", "after, no replay"):
        view.add_column(column, justify="left" if column == "language" else "right")
    for language, name in LANGUAGES.items():
        losses, without = report["loss"][language], report["without_replay"]["loss"][language]
        view.add_row(name, f"{losses['before']:.3f}", f"{losses['after']:.3f}", f"{without['after']:.3f}")
    console.print(view)


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw each run's validation losses over its steps.

    Args:
        curves: the metrics lines of each run, by its label.
        path: PNG to write.
    """
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(1, len(LANGUAGES), figsize=(9, 3.6), layout="constrained")
        for axis, (language, title) in zip(axes, LANGUAGES.items(), strict=True):
            for label, metrics in curves.items():
                points = {m["step"]: m[f"val_loss_{language}"] for m in metrics if f"val_loss_{language}" in m}
                axis.plot(list(points), list(points.values()), marker="o", markersize=3, label=label)
            axis.set(title=f"{title}, held out", xlabel="step", ylabel="loss, nats per token")
            axis.grid(alpha=0.3)
        axes[0].legend()
        path.write_bytes(png(figure))


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON, whole or not at all."""
    write_whole(path, (json.dumps(report, indent=2) + "\n").encode())
