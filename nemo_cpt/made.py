"""What a folder was made of, noted in it: a rerun of the same finds it done, and reads nothing large for that."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_cpt.checksums import hash_of
from nemo_cpt.errors import CptError

RECORD = ".made.json"  # no part of what was made: it holds times, and another one each time
_SMALL = 2**25  # bytes: tokenizers and configurations have fewer, which people edit; to read weights takes minutes
_FORMAT = 1  # raised when an older reader would misread what is new
Stamps = Sequence[Sequence[Any]]  # of each file its name, its size, and the time of its last change


@dataclass(frozen=True)
class Making:
    """A folder that is to be made, stamped before anything of it is read.

    Attributes:
        command: of `nemo-cpt` that makes it.
        inputs: the files that it reads, by the parameter's name.
        options: all else that decides what comes out.
    """

    command: str
    inputs: Mapping[str, Stamps]
    options: Mapping[str, Any]

    def done(self, dest: Path) -> dict[str, Any] | None:
        """Return the report of this very making if its folder is there, None where the place is free.

        Raises:
            CptError: something else has its place.
        """
        if not (dest.exists() or dest.is_symlink()):
            return None
        recorded = _read(dest)
        if reason := _unsaid(dest, recorded) or self._unlike(recorded) or _changed(dest, recorded):
            raise CptError(f"{dest} exists already: {reason}. Give another destination, or remove it first.")
        report: dict[str, Any] = recorded["report"]
        return report

    def note(self, folder: Path, report: Mapping[str, Any]) -> None:
        """Note in a folder that is filled, and has not its name yet, what it was made of."""
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in _files_below(folder)}
        record = {
            "format": _FORMAT,
            "command": self.command,
            "inputs": self.inputs,
            "options": self.options,
            "sizes": sizes,
            "sums": {name: hash_of(folder / name) for name, size in sizes.items() if size <= _SMALL},
            "report": report,
        }
        (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def _unlike(self, recorded: Mapping[str, Any]) -> str:
        """What makes it another than the one that is recorded; empty where it is the same."""
        if recorded["command"] != self.command:
            return f"`nemo-cpt {recorded['command']}` made it"
        # As JSON gives them back: lists for tuples.
        ours = json.loads(json.dumps({"inputs": self.inputs, "options": self.options}))
        for name, value in ours["options"].items():
            if (was := recorded["options"].get(name)) != value:
                return f"it was made with {name}={was!r}, and this is {value!r}"
        for name, stamps in ours["inputs"].items():
            if (was := recorded["inputs"].get(name)) != stamps:
                other = next((each[0] for each in stamps if each not in (was or ())), None)
                return f"its {name} was another" + (f", or {other} of it was written since" if other else "")
        return ""


def stamps(files: Iterable[Path]) -> Stamps:
    """The stamps of files, in their order: content that is as it was has the same, wherever its folder was moved to."""
    stats = [(path.name, path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def files_of(folder: Path) -> list[Path]:
    """A folder's own files, but for hidden ones."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]


def _files_below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]


def _read(dest: Path) -> dict[str, Any]:
    try:
        recorded = json.loads((dest / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _unsaid(dest: Path, recorded: Mapping[str, Any]) -> str:
    """What stands there that does not say what it was made of; empty where it does."""
    if recorded.get("format") == _FORMAT:
        return ""
    if not dest.is_dir():
        return "it is a file" if dest.exists() else "it is a link that leads nowhere"
    names = sorted(path.name for path in dest.iterdir())
    return f"it holds {', '.join(names[:4]) or 'nothing'}, and does not say what it was made of"


def _changed(dest: Path, recorded: Mapping[str, Any]) -> str:
    """Which of the files that were made is not there, or is another one; empty where all are as they were."""
    for name, size in recorded["sizes"].items():
        there = (dest / name).stat().st_size if (dest / name).is_file() else None
        if there != size:
            return f"its {name} " + ("is gone" if there is None else f"has {there:,} bytes, and had {size:,}")
    # A token's id for another is as many bytes.
    changed = (name for name, known in recorded.get("sums", {}).items() if hash_of(dest / name) != known)
    return f"its {name} was changed since" if (name := next(changed, "")) else ""
