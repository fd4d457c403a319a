"""An evaluation's report: report.json, report.html (one file that opens offline) and report.png."""

import html
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.atomic_files import write_whole
from nemo_cpt.evaluation.bootstrap import Row
from nemo_cpt.evaluation.comparison import Report
from nemo_cpt.page import as_json, details, drawing, finite, head, image, legend_name, png, table, table_row

COLUMNS = ("set", "measure", "before", "after", "difference", "95 % interval", "")
PLOTTED = ("bits per byte", "replies in ", "exact match", "character F1", "BLEU", "chrF", "ROUGE-L", "benchmark")


def write(report: Report, folder: str | Path) -> list[Path]:
    """Write the report's three files, each whole or not at all; returns their paths.

    Raises:
        CptError: the folder cannot be written.
    """
    # Drawn first, which may fail: no half report is left.
    picture = draw(report)
    files = {
        "report.json": as_json(as_dict(report)),
        "report.png": picture,
        "report.html": page(report, picture).encode(),
    }
    paths = [Path(folder, name) for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        write_whole(path, content)
    return paths


def as_dict(report: Report) -> dict[str, Any]:
    """The report as JSON holds it: NaN and infinity become null."""
    rows = [asdict(row) | {"difference": row.difference, "verdict": row.verdict} for row in report.rows]
    return finite(asdict(report) | {"rows": rows})


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table under `COLUMNS`."""
    interval = "" if row.low is None or row.high is None else f"{_number(row.low)} to {_number(row.high)}"
    return (
        row.group, row.measure, _number(row.before), _number(row.after), _number(row.difference, sign=True), interval,
        row.verdict,
    )  # fmt: skip


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return ""
    # About four figures, which is more than the intervals allow; of small differences two, or a sure one would be 0.
    size = math.floor(math.log10(abs(value))) if value else 0
    digits = min(max(1 - size, 3), 9) if size < 1 else 2 if size < 2 else 1
    return f"{value:{'+' if sign else ''},.{digits}f}"


def draw(report: Report) -> bytes:
    """The plot as PNG: over steps for a series of checkpoints, else each measure before and after."""
    with drawing() as pyplot:
        return png(_draw_series(report, pyplot) if report.series else _draw_rows(report, pyplot))


def _draw_series(report: Report, pyplot: Any) -> Any:
    """Bits per byte of each set as a change in percent: below 0 is gained, above 0 forgotten; beside it the shares."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for line in report.series:
        start = line["values"][0]
        if line["measure"].startswith("bits per byte"):
            change = [100 * (value / start - 1) for value in line["values"]]
            axes[0].plot(line["steps"], change, marker="o", markersize=4, label=legend_name(line["group"]))
        elif line["measure"].startswith("replies in "):
            label = legend_name(f"{line['group']}: {line['measure']}")
            axes[1].plot(line["steps"], line["values"], marker="o", markersize=4, label=label)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set(title="gained (below 0) and forgotten (above 0)", xlabel="step", ylabel="bits per byte, change in %")
    axes[1].set(title="replies in the language asked in", xlabel="step", ylabel="%", ylim=(-3, 103))
    for axis in axes:
        axis.grid(alpha=0.3)
        # The left one has the line at 0, which needs no legend.
        if axis.lines and len(axis.lines) > (axis is axes[0]):
            axis.legend(fontsize="small")
    return figure


def _draw_rows(report: Report, pyplot: Any) -> Any:
    """A panel a measure, a group of bars a set; the interval is drawn at the later model's bar."""
    rows = [row for row in report.rows if row.measure.startswith(PLOTTED) and row.after is not None]
    kinds = list(dict.fromkeys(_kind(row) for row in rows)) or [""]
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(1 + 3.2 * len(kinds), 4), layout="constrained", squeeze=False
    )
    for axis, kind in zip(axes[0], kinds, strict=True):
        chosen = [row for row in rows if _kind(row) == kind]
        for number, row in enumerate(chosen):
            compared = row.before is not None
            if compared:
                axis.bar(number - 0.2, row.before, 0.38, color="#9aa5b1", label="before" if not number else None)
            error = _error_bar(row)
            axis.bar(
                number + 0.2 * compared,
                row.after,
                0.38,
                color="#2f6f9f",
                label="after" if not number else None,
                yerr=error,
                capsize=3,
            )
        axis.set(title=kind, xticks=range(len(chosen)))
        if kind.endswith("%"):
            axis.set_ylim(0, 103)
        axis.set_xticklabels([row.group for row in chosen], rotation=30, ha="right", fontsize="small")
        axis.grid(axis="y", alpha=0.3)
    if rows and rows[0].before is not None:
        axes[0][0].legend(fontsize="small")
    return figure


def _kind(row: Row) -> str:
    return "replies in the language asked in, %" if row.measure.startswith("replies in ") else row.measure


def _error_bar(row: Row) -> list[list[float]] | None:
    """How far the interval reaches below and above the later value."""
    if row.low is None or row.high is None or row.after is None:
        return None
    # The interval is one of the difference; drawn at the bar it keeps its width.
    middle = row.after if row.difference is None else row.difference
    return [[max(middle - row.low, 0)], [max(row.high - middle, 0)]]


def page(report: Report, picture: bytes) -> str:
    """The report as one HTML file: styles, script and picture are inside, and nothing is fetched."""
    return "\n".join(_page(report, picture))


def _page(report: Report, picture: bytes) -> Iterator[str]:
    yield head(f"Evaluation of {report.title}")
    for warning in report.warnings:
        yield f'<p class="warning">{html.escape(warning)}</p>'
    yield from table(COLUMNS, [cells(row) for row in report.rows], [row.note for row in report.rows])
    yield image("plot of the measures", picture)
    if report.series:
        yield "<h2>Over the steps</h2>"
        steps = [str(step) for step in report.series[0]["steps"]]
        lines = [(line["group"], line["measure"], *map(_number, line["values"])) for line in report.series]
        yield from table(("set", "measure", *steps), lines)
    if report.judged:
        yield details("The judge", report.judged)
    yield from _replies(report)
    yield "<h2>How it was measured</h2>"
    for name, part in (
        ("models", report.models), ("sets", report.sets), ("settings", report.settings), ("versions", report.versions)
    ):  # fmt: skip
        yield details(name, part)
    yield f"<script>{SCRIPT}</script></body></html>"


def _replies(report: Report) -> Iterator[str]:
    """Every prompt with the models' replies side by side, under a box that filters them by their text."""
    if not report.replies:
        return
    labels = [each["label"] for each in report.models]
    yield f"<h2>Replies ({len(report.replies)} prompts)</h2>"
    yield '<p><input id="search" type="search" placeholder="search" size="40"> <span id="count"></span></p>'
    yield f'<table id="replies"><thead>{table_row("th", "set", "prompt", *map(html.escape, labels))}</thead><tbody>'
    for each in report.replies:
        where = "<br>".join(html.escape(each[name]) for name in ("set", "wrapper", "id"))
        yield table_row("td", where, _prompt(each), *(_reply(each["replies"][label]) for label in labels))
    yield "</tbody></table>"


def _prompt(shown: dict[str, Any]) -> str:
    turns = shown["prompt"]
    text = turns if isinstance(turns, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    answers = "".join(f'<div class="answer">{html.escape(answer)}</div>' for answer in shown["answers"])
    return f"<div>{html.escape(text)}</div>{answers}"


def _reply(reply: dict[str, Any]) -> str:
    facts = [reply.get("language", ""), f"{reply['completion_tokens']} tokens", f"{reply['seconds']:.2f} s"]
    facts += ["cut off"] if reply["finish_reason"] == "length" else []
    return f"<div>{html.escape(reply['text'])}</div><small>{html.escape(', '.join(filter(None, facts)))}</small>"


SCRIPT = """
const box = document.getElementById('search');
if (box) {
  const rows = [...document.querySelectorAll('#replies tbody tr')];
  const show = () => {
    const wanted = box.value.toLowerCase();
    let count = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      count += !row.hidden;
    }
    document.getElementById('count').textContent = wanted ? count + ' of ' + rows.length : '';
  };
  box.addEventListener('input', show);
}
"""
