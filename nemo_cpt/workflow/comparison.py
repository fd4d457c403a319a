"""What differs between the records of two workflows, or of one at two times."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError
from nemo_cpt.output import size_of
from nemo_cpt.workflow.files import ENDINGS, load
from nemo_cpt.workflow.outputs import content, size
from nemo_cpt.workflow.state import RECORD, State

COLUMNS = ("step", "what", "one", "other")
MISSING = "-"


def read_record(path: Path) -> dict[str, Any]:
    """The record that a path names: itself, the one in a workflow's folder, or that of a workflow's file.

    Raises:
        CptError: there is none.
    """
    if path.suffix in (*ENDINGS, ".py"):
        path = State(load(path)).folder
    path = path / RECORD if path.is_dir() else path
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise CptError(f"{path} cannot be read ({error.strerror}): a workflow writes it when it has run") from None
    except ValueError as error:
        raise CptError(f"{path} is no record of a workflow: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("steps"), dict):
        raise CptError(f"{path} is no record of a workflow: it has no steps")
    return found


def compare(one: Path, other: Path) -> list[tuple[str, str, str, str]]:
    """What differs, as rows under `COLUMNS`: versions, parameters with their seeds, contents, results, times.

    Raises:
        CptError: there is no such record.
    """
    found = [read_record(path) for path in (one, other)]
    rows = list(_rows("", "version of ", *(each["versions"] for each in found)))
    for name in dict.fromkeys(name for each in found for name in each["steps"]):
        steps = [each["steps"].get(name) for each in found]
        if any(step is None for step in steps):
            rows += _rows(name, "", *({"state": step["state"]} if step else {"state": "not started"} for step in steps))
        else:
            rows += _of_step(name, *steps)
    return rows


def _of_step(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    both = (one, other)
    yield from _rows(name, "", *({key: each[key] for key in ("do", "state", "code", "seed")} for each in both))
    for kind in ("parameters", "versions"):
        yield from _rows(name, "" if kind == "parameters" else "version of ", *(each[kind] for each in both))
    for kind in ("inputs", "outputs"):
        yield from _rows(name, f"{kind[:-1]} ", *(_contents(each[kind]) for each in both))
    yield from _rows(name, "result: ", *(dict(_figures(each["result"])) for each in both))
    yield from _rows(name, "", *({"seconds": each["seconds"]} for each in both))


def _contents(looked_at: Mapping[str, Any]) -> dict[str, str]:
    return {path: _content(files) for path, files in looked_at.items()}


def _content(files: Mapping[str, Mapping[str, Any]]) -> str:
    """What lies behind a path in a few words: a checkpoint has dozens of files, some of random names."""
    hashes = content(files)
    # Of a single file, its hash as the record has it.
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return f"{len(hashes)} files, {size_of(size(files))}, {digest[:12]}"


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a step returned; of a table of figures each row by its words."""
    for name, value in result.items():
        if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
            for row in value:
                words = [each for each in row if isinstance(each, str)]
                yield ", ".join([name, *words]), [each for each in row if not isinstance(each, str)]
        else:
            yield name, value


def _rows(
    step: str, what: str, one: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, str]]:
    for name in dict.fromkeys([*one, *other]):
        # As text: 1 and True are equal in Python, and different settings.
        texts = [json.dumps(each[name], ensure_ascii=False) if name in each else MISSING for each in (one, other)]
        if texts[0] != texts[1]:
            yield step, f"{what}{name}", texts[0], texts[1]
