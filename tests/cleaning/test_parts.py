"""A cleaning in parts: the files of one run, duplicates across parts included."""

import json
import os
from pathlib import Path

import orjson
import pytest

import nemo_cpt.cleaning
from nemo_cpt.cleaning import CleaningReport, clean, read_cleaning
from nemo_cpt.cleaning.parts import clean_part, existing, join, make_plan, missing
from nemo_cpt.corpus.plan import Plan
from nemo_cpt.errors import CptError
from tests.support.crashes import killed_at, lines_of

TASKS = 4
CODE = Path(nemo_cpt.cleaning.__file__).parent
OPTIONS = {"on_error": "skip", "max_skipped": 0.2, "workers": 1, "quiet": True}
STOP = {"on_error": "stop", "max_skipped": None}


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory, japanese: list[str]) -> Path:
    """A corpus whose last documents repeat its first, with some that are too short and a line that is no JSON."""
    path = tmp_path_factory.mktemp("dirty") / "ja.jsonl"
    texts = [*japanese, "短い。", japanese[1].replace("。", "｡"), japanese[2] + "後日追記した。", "短い文。"]
    lines = [json.dumps({"id": number, "text": text}, ensure_ascii=False) for number, text in enumerate(texts)]
    path.write_text("\n".join([*lines[:7], "no JSON", *lines[7:]]) + "\n", "utf-8")
    return path


def evaluation_set(dirty: Path) -> Path:
    """A set with a text of one document, and one that is too short to be looked for."""
    path = dirty.with_name("evaluation.jsonl")
    if not path.exists():
        text = json.loads(dirty.read_text("utf-8").splitlines()[5])["text"]
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in (text[50:200], "短い")))
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, dirty: Path) -> Path:
    """What one run makes of it."""
    folder = tmp_path_factory.mktemp("one") / "out"
    report = clean(dirty, folder, "ja", decontaminate=evaluation_set(dirty), **OPTIONS)
    assert {"exact", "similarity"} <= report.dropped["duplicates"].keys()
    assert "contamination" in report.dropped
    return folder


def made(dirty: Path, folder: Path, **options: object) -> Plan:
    plan = make_plan(dirty, folder, "ja", TASKS, **{"decontaminate": evaluation_set(dirty)} | OPTIONS | options)
    for number in plan.take_up(lambda: missing(plan)):
        clean_part(plan.folder, number)
    return plan


def same(one: Path, other: Path) -> bool:
    """Whether two cleanings are equal but for their times and paths."""
    manifests = []
    for folder in (one, other):
        manifest = read_cleaning(folder)
        del manifest["seconds"], manifest["report"]["files"]
        manifests.append(manifest)
    files = ("kept.jsonl", "dropped.jsonl")
    return manifests[0] == manifests[1] and all(
        (one / file).read_bytes() == (other / file).read_bytes() for file in files
    )


def test_the_parts_together_are_what_one_run_makes(tmp_path: Path, dirty: Path, one: Path) -> None:
    plan = made(dirty, tmp_path / "out")
    assert len(plan.shares) == TASKS
    report = join(plan.folder)
    assert isinstance(report, CleaningReport)
    assert report.status == "written"
    assert same(one, tmp_path / "out")
    pages = [(folder / "report.html").read_text() for folder in (one, tmp_path / "out")]
    # Pictures, limits and samples; not the times.
    assert pages[0][pages[0].index("<svg") :].replace(str(one), "") == pages[1][pages[1].index("<svg") :]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in one.iterdir())
    assert join(plan.folder).status == "unchanged"
    again = OPTIONS | {"decontaminate": evaluation_set(dirty)}
    assert clean(dirty, tmp_path / "out", "ja", **again).status == "unchanged"
    assert existing(make_plan(dirty, tmp_path / "out", "ja", TASKS, **again)) is not None
    with pytest.raises(CptError, match="left out what gives no text"):
        existing(make_plan(dirty, tmp_path / "out", "ja", TASKS, **again | STOP))


def test_parts_that_skipped_are_not_taken_where_nothing_may_be(tmp_path: Path, dirty: Path) -> None:
    made(dirty, tmp_path / "out")
    options = OPTIONS | {"decontaminate": evaluation_set(dirty)} | STOP
    with pytest.raises(CptError, match="is not what this job would make: it left out what gives no text"):
        missing(make_plan(dirty, tmp_path / "out", "ja", TASKS, **options))


def test_what_is_done_stays_and_what_is_killed_is_done_again(tmp_path: Path, dirty: Path, one: Path) -> None:
    plan = made(dirty, tmp_path / "out")
    count = lines_of(lambda: join(made(dirty, tmp_path / "counted").folder), CODE).count
    (Path(plan.part(2)) / "part.json").unlink()
    assert missing(plan) == [2]
    with pytest.raises(CptError, match=r"1 of the 4 parts .* not done"):
        join(plan.folder)
    before = (Path(plan.part(1)) / "part.json").stat().st_mtime_ns
    lines = lines_of(lambda: clean_part(plan.folder, 2), CODE).count
    (Path(plan.part(2)) / "part.json").unlink()
    assert killed_at(lines // 2, lambda: clean_part(plan.folder, 2), CODE)[0]
    assert missing(plan) == [2]
    for number in range(TASKS):
        clean_part(plan.folder, number)
    assert (Path(plan.part(1)) / "part.json").stat().st_mtime_ns == before
    for place in range(1, 8):
        killed_at(count * place // 8, lambda: join(plan.folder), CODE)
    join(plan.folder)
    assert same(one, tmp_path / "out")
    assert not plan.folder.exists()


def test_other_rules_and_changed_inputs_are_refused(tmp_path: Path, dirty: Path, one: Path) -> None:
    path = tmp_path / "ja.jsonl"
    path.write_bytes(dirty.read_bytes())
    plan = made(path, tmp_path / "out")
    other = make_plan(
        path, tmp_path / "out", "ja", TASKS, **OPTIONS | {"json_key": "id", "decontaminate": evaluation_set(path)}
    )
    with pytest.raises(CptError, match="parts of another job: json_key is 'text', not 'id'"):
        other.take_up(lambda: missing(other))
    # Of the same size and a later time: only the content tells.
    path.write_bytes(dirty.read_bytes().replace(b"no JSON", b"on JSON"))
    with pytest.raises(CptError, match=r"content of .*ja\.jsonl changed"):
        join(plan.folder)
    again = OPTIONS | {"decontaminate": evaluation_set(path)}
    anew = make_plan(path, tmp_path / "out", "ja", TASKS, overwrite=True, **again)
    assert len(anew.take_up(lambda: missing(anew))) == 1
    # An evaluation set that was only touched, and named otherwise, is the same.
    os.utime(evaluation_set(path), ns=(1, 1))
    named = Path(os.path.relpath(evaluation_set(path)))
    assert make_plan(path, tmp_path / "out", "ja", TASKS, **OPTIONS | {"decontaminate": named}).key == anew.key
    alone = clean(path, tmp_path / "out", "ja", **again)
    assert f"{anew.folder} holds parts of an earlier command with --tasks" in alone.warnings[-1]
    with pytest.raises(CptError, match="tasks is 0"):
        make_plan(path, tmp_path / "out", "ja", 0, **OPTIONS)


def test_rules_that_drop_everything_are_an_error_of_the_join(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": f"短い文。{number}"}) + b"\n" for number in range(20)))
    plan = made(path, tmp_path / "out", decontaminate=())
    with pytest.raises(CptError, match="The rules drop all 20 documents"):
        join(plan.folder)
    assert not (tmp_path / "out" / "kept.jsonl").exists()
    assert missing(plan) == []
