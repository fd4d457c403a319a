"""What another version of the library wrote is read as far as this one knows it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_cpt.corpus import split
from nemo_cpt.corpus.splitting.splits import REPORT
from nemo_cpt.records import restored
from nemo_cpt.training.run_lock import FOLDER, read_owner, this_process


@dataclass(frozen=True)
class Kind:
    """Stands for a report."""

    name: str
    count: int = 0


def test_fields_of_a_newer_version_are_left_out() -> None:
    assert restored(Kind, {"name": "a", "count": 2, "newer": 3}) == Kind("a", 2)
    assert restored(Kind, {"name": "a", "count": 2}, count=4) == Kind("a", 4)
    assert restored(Kind, {"name": "an older version's"}) == Kind("an older version's")
    with pytest.raises(TypeError, match="name"):
        restored(Kind, {"count": 2})


def test_what_a_newer_version_finished_or_holds_is_not_taken_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    split(tmp_path / "all.jsonl", tmp_path / "out", validation=0.2, quiet=True)
    report = tmp_path / "out" / REPORT
    recorded = json.loads(report.read_text())
    report.write_text(json.dumps(recorded | {"report": recorded["report"] | {"newer": 1}}))
    assert split(tmp_path / "all.jsonl", tmp_path / "out", validation=0.2, quiet=True).status == "unchanged"
    owner = this_process({})
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "owner.json").write_text(json.dumps(vars(owner) | {"newer": 1}))
    assert read_owner(tmp_path) == owner
