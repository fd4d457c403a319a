"""A run's report, or that of two: report.html, one file that opens offline, its pictures as PNGs, and report.json."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_cpt import catalog
from nemo_cpt.corpus.atomic_files import make_folder, write_whole
from nemo_cpt.errors import CptError
from nemo_cpt.launching.results import Run, every_checkpoint, size
from nemo_cpt.monitoring.forgetting import Change, set_name
from nemo_cpt.output import size_of
from nemo_cpt.page import as_json, details, head, image, table, table_row
from nemo_cpt.watching.plots import pictures
from nemo_cpt.watching.record import GPU_MEMORY, TRAIN_LOSS, Record

TITLES = {
    "loss": "Training loss",
    "validation": "Validation by set",
    "forgetting": "Gained and forgotten",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "throughput": "Throughput",
    "memory": "GPU memory",
}
COLUMNS = ("set", "unit", "step 0", "now", "change", "2 standard errors", "at the end", "")
REPLIES_SHOWN = 8  # prompts
GRID = (
    "<style>.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(34em, 100%), 1fr)) } "
    "h3 { margin-bottom: 0 }</style>"
)


def write_report(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write the report of a run, or of two, into a folder; returns the files' paths, the page first.

    Raises:
        CptError: the folder cannot be written, or the two are one run.
    """
    if len(records) > 1 and records[0].folder.resolve() == records[1].folder.resolve():
        raise CptError(f"{records[0].folder} would be compared with itself: name another run, or leave it away")
    make_folder(folder)
    # Drawn first, which may fail: no half report is left.
    drawn = pictures(records)
    files = {
        "report.html": "\n".join(_page(records, drawn)).encode(),
        "report.json": as_json(as_dict(records)),
        **{f"{name}.png": content for name, content in drawn.items()},
    }
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def as_dict(records: Sequence[Record]) -> dict[str, Any]:
    """What the report shows of each run, as plain data."""
    return {
        "runs": [
            {
                "folder": str(record.folder),
                "summary": dict(_summary(record)),
                "changes": [_as_dict(record, change) for change in record.changes.values()],
                "settings": [dict(zip(("setting", "value", "default"), row, strict=True)) for row in settings(record)],
                "checkpoints": list(_checkpoints(record)),
                "metrics": record.metrics,
                "warnings": record.warnings,
                "description": record.description,
            }
            for record in records
        ],
        "different": different(records),
    }


def _page(records: Sequence[Record], drawn: Mapping[str, bytes]) -> Iterator[str]:
    yield head(" against ".join(record.name for record in records)) + GRID
    for record in records:
        for warning in record.warnings:
            whose = f"{record.name}: " if len(records) > 1 else ""
            yield f'<p class="warning">{html.escape(whose + warning["text"])}</p>'
    # A row that one of them lacks stays, with an empty cell.
    names = list(dict.fromkeys(name for record in records for name, _ in _summary(record)))
    summaries = [dict(_summary(record)) for record in records]
    yield from table(("", *(record.name for record in records)),
                     [(name, *(each.get(name, "") for each in summaries)) for name in names])  # fmt: skip
    yield from _changes(records)
    yield '<div class="grid">'
    for name, content in drawn.items():
        yield f"<div><h3>{TITLES[name]}</h3>{image(TITLES[name], content)}</div>"
    yield "</div>"
    if rows := different(records):
        yield f"<h2>What differs between them ({len(rows)})</h2>"
        yield from table(("setting", *(record.name for record in records)), [tuple(map(str, row)) for row in rows])
    for record in records:
        yield from _run(record, heading=f" of {html.escape(record.name)}" if len(records) > 1 else "")
    yield "</body></html>"


def _summary(record: Record) -> Iterator[tuple[str, str]]:
    """The run in a few lines."""
    run, about = Run(record.folder), record.description
    end = f"{record.end['state']} {record.end['message']}".strip() if record.end else run.state
    # Started again, it has the end of its last start until it describes itself.
    yield "state", run.state if run.running else end
    yield "steps", f"{record.step} of {record.max_steps or 'unknown'}"
    if record.tokens_per_step:
        yield "tokens", f"{record.step * record.tokens_per_step:,} ({record.tokens_per_step:,} a step)"
    if (loss := record.last(TRAIN_LOSS)) is not None:
        yield "training loss", f"{loss:.4f}"
    yield from came_and_planned(record)
    machine = about.get("machine", {})
    if machine:
        yield "machine", f"{machine['processes']} x {machine['gpu'] or 'CPU'} ({machine['host']})"
    if about:
        yield "last start", about["started"]


def came_and_planned(record: Record) -> Iterator[tuple[str, str]]:
    """Speed and memory, beside the plan where there is one."""
    plan = record.plan
    if speed := record.tokens_per_second:
        yield "tokens/s", f"{speed:,.0f}" + _beside(speed, plan.get("tokens_per_second"), ",.0f")
    if memory := record.last(GPU_MEMORY):
        yield "GPU memory, GiB", f"{memory:.1f}" + _beside(memory, plan.get("reserved_gib"), ".1f")
    if reason := record.description.get("plan", {}).get("unknown"):
        yield "plan", f"none: {reason}"


def _beside(value: float, planned: float | None, form: str) -> str:
    return f" (planned {planned:{form}}, {100 * (value / planned - 1):+.0f} %)" if planned else ""


def _changes(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if not record.changes:
            continue
        whose = f": {html.escape(record.name)}" if len(records) > 1 else ""
        yield f"<h2>Gained against forgotten{whose}</h2>"
        noises = [f"The standard error is of {change.noise}." for change in record.changes.values()]
        yield from table(COLUMNS, [cells(record, change) for change in record.changes.values()], noises)


def cells(record: Record, change: Change) -> tuple[str, ...]:
    """A set's row under `COLUMNS`."""
    scale, unit = record.unit(change.name)
    error = "not known" if change.standard_error is None else f"{200 * change.standard_error / change.first:.2f} %"
    end = "" if change.at_end is None else f"{100 * (change.at_end / change.first - 1):+.2f} %"
    verdict = "worse" if change.worse else "better" if change.better else ""
    first, now = (f"{scale * loss:.4f}" for loss in (change.first, change.value))
    return change.name, unit, first + change.first_step, now, f"{change.percent:+.2f} %", error, end, verdict


def _as_dict(record: Record, change: Change) -> dict[str, Any]:
    scale, unit = record.unit(change.name)
    return {
        "set": change.name,
        "unit": unit,
        "since": change.since,
        "step": change.step,
        "first": scale * change.first,
        "value": scale * change.value,
        "percent": change.percent,
        "standard_error_percent": change.standard_error and 100 * change.standard_error / change.first,
        "noise": change.noise,
        "worse": change.worse,
        "better": change.better,
    }


def _run(record: Record, heading: str) -> Iterator[str]:
    if record.training_sets:
        yield f"<h2>Data{heading}</h2>"
        yield from table(("training set", "share", "tokens", "times seen by now", "by the end"), list(_data(record)))
    yield f"<h2>Settings{heading}</h2>"
    yield from table(("setting", "value", "recipe's default"), list(settings(record)))
    checkpoints = list(_checkpoints(record))
    yield f"<h2>Checkpoints{heading} ({len(checkpoints)})</h2>"
    rows = [(each["name"], str(each["step"]), size_of(each["bytes"]), each["state"]) for each in checkpoints]
    yield from table(("checkpoint", "step", "size", "state"), rows)
    yield from _replies(record, heading)
    yield f"<h2>How it was run{heading}</h2>"
    for name in ("versions", "machine", "plan", "validation", "configuration"):
        if record.description.get(name):
            yield details(name, record.description[name])


def _data(record: Record) -> Iterator[tuple[str, ...]]:
    done = record.step / record.max_steps if record.max_steps else 0
    for each in record.training_sets:
        name = set_name(each["prefix"])
        if "share" in each:
            seen = (f"{each['tokens']:,}", f"{each['epochs'] * done:.2f}", f"{each['epochs']:.2f}")
            yield (name, f"{100 * each['share']:.1f} %", *seen)
        else:
            yield name, f"weight {each['weight']:g}", "", "", ""


def settings(record: Record) -> Iterator[tuple[str, str, str]]:
    """What the command line gave the recipe: setting, value, the recipe's default."""
    launched = record.description.get("launched", {})
    yield "recipe", launched.get("recipe", "from a script: its configuration is below"), ""
    for name, value in launched.get("arguments", {}).items():
        yield name, _text(value), _default(launched["recipe"], name)
    for field in launched.get("fields", []):
        name, _, value = field.partition("=")
        yield name, value, ""


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _default(recipe: str, name: str) -> str:
    """A parameter's default, as the recipe's source has it now; empty for one that is not there any more."""
    try:
        parameter = catalog.recipe(recipe).parameters.get(name)
    except CptError:
        return ""
    return (parameter.default or "") if parameter else ""


def _checkpoints(record: Record) -> Iterator[dict[str, Any]]:
    for each, state in every_checkpoint(Run(record.folder)):
        yield {"name": each.path.name, "step": each.step, "state": state, "bytes": size(each.path)}


def _replies(record: Record, heading: str) -> Iterator[str]:
    """The first prompts' replies, at the first and at the last validation."""
    steps = sorted({reply["step"] for reply in record.replies})
    if not steps:
        return
    # One column where there was one validation.
    shown = list(dict.fromkeys((steps[0], steps[-1])))
    by_prompt: dict[str, dict[int, str]] = {}
    for reply in record.replies:
        by_prompt.setdefault(_text(reply["prompt"]), {})[reply["step"]] = reply["reply"]
    yield f"<h2>Replies{heading}</h2>"
    yield f'<table id="replies"><thead>{table_row("th", "prompt", *(f"step {step}" for step in shown))}</thead><tbody>'
    for prompt, replies in list(by_prompt.items())[:REPLIES_SHOWN]:
        texts = (prompt, *(replies.get(step, "") for step in shown))
        yield table_row("td", *(f"<div>{html.escape(text)}</div>" for text in texts))
    yield "</tbody></table>"


def different(records: Sequence[Record]) -> list[list[Any]]:
    """Settings of two runs that are not the same: path, and the value of each; empty for one run."""
    if len(records) < 2:
        return []
    kept = [_flat(record.description.get("configuration", {})) for record in records]
    paths = dict.fromkeys(path for each in kept for path in each)
    return [
        [path, *(_text(each.get(path)) for each in kept)]
        for path in paths
        # As text: 1, 1.0 and True are equal in Python, and different settings.
        if len({json.dumps(each.get(path)) for each in kept}) > 1
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    # Lists of parts (callbacks) are compared part by part, lists of numbers as one value.
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    named = {f"{path}.{key}" if path else str(key): part for key, part in value.items()}
    return {name: each for key, part in named.items() for name, each in _flat(part, key).items()}


def default_folder(records: Sequence[Record]) -> Path:
    """Where a report goes unless somewhere else is named: into the first run's folder."""
    against = f"_against_{records[1].name}" if len(records) > 1 else ""
    return records[0].folder / f"report{against}"
