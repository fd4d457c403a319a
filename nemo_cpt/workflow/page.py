"""The page at a workflow's end: one HTML file that opens offline, with its steps and links to all that they report."""

import html
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nemo_cpt.corpus.atomic_files import write_whole
from nemo_cpt.output import size_of
from nemo_cpt.page import details, head, table_row
from nemo_cpt.workflow import outputs
from nemo_cpt.workflow.state import PAGE, RECORD, State

COLUMNS = ("step", "does", "state", "seconds", "made", "content", "reports")
OF_THE_RECORD = ".record"  # the lock's name: no step is called so
OF_A_STEP = ("parameters", "seed", "result", "inputs", "outputs", "started", "ended", "starts")
REPORTS = ("report.html", "report/report.html", "split.json", "cleaning.json", "synthesis.json")


def write_up(state: State) -> Path:
    """Write a workflow's record and its page; returns the page's path."""
    path = state.folder / PAGE
    # One at a time: jobs of steps that need not wait for each other may end together.
    with state.held(OF_THE_RECORD):
        state.write_whole()
        write_whole(path, "\n".join(_page(state)).encode())
    return path


def _page(state: State) -> Iterator[str]:
    whole = state.whole()
    yield head(f"Workflow {state.workflow.name}")
    records = {name: record for name, record in whole["steps"].items() if record is not None}
    seconds = sum(record["seconds"] for record in records.values())
    done = sum(record["state"] == "done" for record in records.values())
    yield f"<p>{done} of {len(whole['steps'])} steps are done; {seconds:,.0f} s of work. "
    yield f'Everything is in <a href="{RECORD}">{RECORD}</a>.</p>'
    yield f"<table><thead>{table_row('th', *COLUMNS)}</thead><tbody>"
    for name in whole["steps"]:
        yield table_row("td", *_row(state, name, records.get(name)))
    yield "</tbody></table>"
    for name, record in records.items():
        if record["message"]:
            yield f'<p class="warning">{html.escape(name)}: {html.escape(record["message"])}</p>'
    yield "<h2>Each step</h2>"
    for name, record in records.items():
        yield details(name, {key: record[key] for key in OF_A_STEP})
    yield details("versions", whole["versions"])
    yield "</body></html>"


def _row(state: State, name: str, record: Mapping[str, Any] | None) -> Iterator[str]:
    step = state.workflow.steps[name]
    log = f'<a href="{_address(f"steps/{name}.log")}">{html.escape(name)}</a>'
    yield log if state.path(name, "log").is_file() else html.escape(name)
    yield html.escape(str(step.parameters.get("recipe", step.do)))
    yield record["state"] if record else "not started"
    yield f"{record['seconds']:,.1f}" if record else ""
    yield "<br>".join(_made(state, path) for path in step.writes)
    yield "<br>".join(_content(files) for files in record["outputs"].values()) if record else ""
    yield "<br>".join(_links(state, step.writes))


def _made(state: State, path: str) -> str:
    """What a step made, as a link where it is a file or a folder, and no dataset's prefix."""
    full = state.workflow.folder / path
    if not any(full in (file, *file.parents) for file in outputs.files_of(full)):
        return html.escape(path)
    return f'<a href="{_address(os.path.relpath(full, state.folder))}">{html.escape(path)}</a>'


def _content(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Size and hash of what a step made."""
    hashes = list(outputs.content(files).values())
    more = f" and {len(hashes) - 1} more" if len(hashes) > 1 else ""
    return f"{size_of(outputs.size(files))} <small>{hashes[0][:12]}{more}</small>" if hashes else ""


def _links(state: State, made: list[str]) -> Iterator[str]:
    for path in made:
        for report in REPORTS:
            full = state.workflow.folder / path / report
            if full.is_file():
                yield f'<a href="{_address(os.path.relpath(full, state.folder))}">{html.escape(report)}</a>'


def _address(path: str) -> str:
    """A path as a page links to it: in an address, `#`, `?` and `%` would mean something else."""
    return quote(os.fsencode(path))
