"""A corpus cleaned: nothing is lost, each drop has its reason, and the files are the same whatever happens."""

import gzip
import json
import os
import shutil
from pathlib import Path

import orjson
import psutil
import pytest

import nemo_cpt.cleaning
from nemo_cpt.cleaning import Rules, clean, explain, read_cleaning, rules_for
from nemo_cpt.cleaning.contamination import Contamination
from nemo_cpt.cleaning.duplicates import Duplicates
from nemo_cpt.cleaning.heuristics import Length
from nemo_cpt.cleaning.repair import Repair
from nemo_cpt.corpus import atomic_files
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.errors import CptError
from tests.cleaning.conftest import demo
from tests.support.corpus_helpers import error_of_a_full_disk, write_jsonl
from tests.support.crashes import killed_at, lines_of

CODE = Path(nemo_cpt.cleaning.__file__).parent
MOVING = Path(atomic_files.__file__)
NAMES = ["cleaning.json", "dropped.jsonl", "kept.jsonl", "report.html"]


def read(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def without_times(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("kept.jsonl", "dropped.jsonl")}


def test_every_document_is_kept_or_dropped_with_its_reason(tmp_path: Path, corpus: Path, japanese: list[str]) -> None:
    mail = {
        "id": "mail",
        "text": " と、a@example.comに続く。".join(reversed(japanese[:2]))[1:],
        "tags": ["x", None, 1.10],
    }
    bad = [{"id": "short", "text": "短い。"}, {"id": "english", "text": "This is no Japanese text at all. " * 30}]
    copy = {"id": "copy", "text": " " + japanese[3].replace("。", "｡")}
    edited = {"id": "edited", "text": japanese[4][:-20] + "後日追記した。"}
    corpus.write_text(corpus.read_text() + "".join(json.dumps(each) + "\n" for each in (mail, *bad, copy, edited)))
    report = clean(corpus, tmp_path / "out", "ja", workers=2, quiet=True)
    kept, dropped = read(report.files["kept"]), read(report.files["dropped"])
    assert (report.status, report.kept, report.documents) == ("written", len(kept), len(kept) + len(dropped))
    reasons = {each["id"]: each.pop("dropped_by") for each in dropped}
    by_id = {each["id"]: each for each in read(corpus)}
    assert all(each == by_id[each["id"]] for each in dropped if each["id"] != "copy")  # as they came
    assert reasons["short"] == {"rule": "length", "measure": "characters", "value": 3, "at_least": 400}
    assert reasons["english"]["measure"] == "japanese_share"
    twin = reasons["copy"]
    assert (twin["rule"], twin["measure"], twin["value"]) == ("duplicates", "exact", 1)
    assert kept[twin["kept_line"] - 1]["id"] == "d3"
    near = reasons["edited"]
    assert (near["rule"], near["measure"]) == ("duplicates", "similarity")
    assert 0.8 <= near["value"] < 1
    assert kept[near["kept_line"] - 1]["id"] == "d4"
    masked = next(each for each in kept if each["id"] == "mail")
    assert masked == mail | {"text": mail["text"].replace("a@example.com", "<EMAIL>")}
    assert [each["id"] for each in kept] == [name for name in by_id if name not in reasons]  # in their order
    assert kept[0] == by_id["d0"]
    assert sum(each["documents"] for rule in report.dropped.values() for each in rule.values()) == len(dropped)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NAMES


def test_only_the_text_changes(tmp_path: Path, japanese: list[str]) -> None:
    line = '{"id":%s,"n":123456789012345678901234567890,"price":1.10,"text":%s, "none":null}'
    masked = "\\n連絡はa@example.comまで。"
    # 1e400 is no number to orjson: Python's json reads that line from the beginning.
    given = [("1e400", japanese[0]), ("1e400", japanese[1] + masked), ("18446744073709551616", japanese[2] + masked)]
    lines = [line % (number, f'"{text}"'.replace("\n", "\\n")) for number, text in given]
    (tmp_path / "a.jsonl").write_text("".join(each + "\n" for each in lines))
    report = clean(tmp_path / "a.jsonl", tmp_path / "out", "ja", workers=1, quiet=True)
    kept = Path(report.files["kept"]).read_text("utf-8").splitlines()
    assert kept[0] == lines[0]  # untouched, to the byte
    assert all('"n": 123456789012345678901234567890,' in each for each in kept[1:])
    assert '"id": 18446744073709551616,' in kept[2]
    assert all("連絡は<EMAIL>まで" in each for each in kept[1:])
    assert report.changes == {"masked email": 2}


def test_empty_texts_and_fields_that_are_no_json_numbers(tmp_path: Path) -> None:
    lines = [
        '{"id": NaN, "text": "一つの文。"}',
        '{"id": -Infinity, "text": "一つの文｡"}',
        '{"text": ""}',
        '{"text": "二つ"}',
    ]
    (tmp_path / "a.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")
    report = clean(tmp_path / "a.jsonl", tmp_path / "out", Rules("ja", ()), quiet=True)
    assert Path(report.files["kept"]).read_text("utf-8").splitlines() == [lines[0], lines[2], lines[3]]
    assert report.dropped == {"duplicates": {"exact": {"documents": 1, "nbytes": len(lines[1].encode()) + 1}}}


def test_the_files_do_not_depend_on_the_number_of_workers(tmp_path: Path, corpus: Path, japanese: list[str]) -> None:
    with corpus.open("a") as file:  # enough for several tasks
        for number in range(700):
            text = japanese[number % 30][: 500 + number % 70] + f"第{number}号。"
            file.write(json.dumps({"id": number, "text": text}) + "\n")
    for workers in (1, 3):
        clean(corpus, tmp_path / f"w{workers}", "ja", workers=workers, quiet=True)
    assert without_times(tmp_path / "w1") == without_times(tmp_path / "w3")
    one, three = (read_cleaning(tmp_path / f"w{workers}") for workers in (1, 3))
    for each in (one, three):
        each["report"].pop("files")
        each.pop("seconds")
    assert one == three


def test_inputs_are_what_prepare_reads(tmp_path: Path, japanese: list[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "in"
    folder.mkdir()
    lines = write_jsonl(tmp_path / "a.jsonl", japanese[:4]).read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    rows = {"url": [f"u{n}" for n in range(4)], "text": japanese[4:8]}
    parquet.write_table(pa.table(rows), folder / "b.parquet")
    (tmp_path / "c.txt").write_text(japanese[8], "utf-8")
    (tmp_path / "d.json").write_text(json.dumps([{"text": text} for text in japanese[9:12]]), "utf-8")
    report = clean(
        [folder, tmp_path / "c.txt", tmp_path / "d.json"], tmp_path / "out", Rules("ja", (Repair(),)), quiet=True
    )
    kept = read(report.files["kept"])
    assert [each["text"] for each in kept] == [text.strip() for text in japanese[:12]]
    assert kept[4]["url"] == "u0"
    recorded = read_cleaning(tmp_path / "out")
    assert [Path(each["path"]).name for each in recorded["inputs"]] == ["a.jsonl.gz", "b.parquet", "c.txt", "d.json"]
    assert all(each["hash"] for each in recorded["inputs"])
    assert {"nemo_cpt", "rensa", "ftfy"} <= recorded["versions"].keys()


def test_of_the_folder_only_the_kept_documents_are_an_input(tmp_path: Path, corpus: Path) -> None:
    report = clean(corpus, tmp_path / "out", "ja", quiet=True)
    assert [source.path for source in list_sources(tmp_path / "out")] == [report.files["kept"]]


def test_evaluation_sets_are_kept_out(tmp_path: Path, corpus: Path, japanese: list[str]) -> None:
    question = {
        "question": japanese[5][40:100],
        "choices": ["はい", "いいえ"],
        "nested": {"answer": japanese[7][10:60]},
    }
    (tmp_path / "eval.jsonl").write_text(json.dumps(question) + "\n", "utf-8")
    report = clean(corpus, tmp_path / "out", "ja", decontaminate=[tmp_path / "eval.jsonl"], quiet=True)
    dropped = {each["id"]: each["dropped_by"] for each in read(report.files["dropped"])}
    assert report.evaluation_texts == {"looked for": 2, "too short": 2}
    found = {name for name, reason in dropped.items() if reason["rule"] == "contamination"}
    assert found == {"d5", "d7"}
    assert dropped["d5"]["value"] == 60 - 26 + 1 - sum(
        character in "、。\n「」（）" for character in japanese[5][40:100]
    )


def test_evaluation_sets_are_compared_by_what_they_hold(
    tmp_path: Path, corpus: Path, japanese: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = Path("eval.jsonl")
    write_jsonl(written, japanese[5:6])

    def again(*sets: Path | str) -> str:
        return clean(corpus, tmp_path / "out", "ja", decontaminate=list(sets), quiet=True).status

    assert again(written) == "written"
    os.utime(written, ns=(1, 1))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(written.read_bytes())
    assert {again(written), again(written.absolute()), again(moved)} == {"unchanged"}
    write_jsonl(written, japanese[6:7])
    with pytest.raises(CptError, match=r"not made with the evaluation set .*/eval\.jsonl as it is now"):
        again(moved, written)
    with pytest.raises(CptError, match=r"not made with the evaluation set .*/eval\.jsonl as it is now"):
        again(written)
    with pytest.raises(CptError, match="its rules or options are others"):
        again()


def test_evaluation_sets_of_words(tmp_path: Path, english: list[str]) -> None:
    words = english[2].split()
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": " ".join(words[10:23]).upper() + "?"}) + "\n")
    rule = Contamination.of("en", (str(tmp_path / "eval.jsonl"),))
    rules = Rules("en", (rule,), Duplicates(exact=False, near=None))
    source = write_jsonl(tmp_path / "en.jsonl", english)
    report = clean(source, tmp_path / "out", rules, quiet=True)
    assert [each["id"] for each in read(report.files["dropped"])] == [2]
    too_short = tmp_path / "short.jsonl"
    too_short.write_text('{"q": "Who is it?"}\n')
    with pytest.raises(CptError, match="no text is long enough"):
        clean(source, tmp_path / "other", rules_for("en"), decontaminate=too_short, quiet=True)
    assert not (tmp_path / "other").exists()


def test_the_report_opens_offline_and_shows_all(tmp_path: Path, corpus: Path) -> None:
    with corpus.open("a") as file:
        file.write('{"id": "<b>", "text": "<script>alert(1)</script>"}\n')
    report = clean(corpus, tmp_path / "out", "ja", quiet=True)
    page = Path(report.files["report"]).read_text("utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page
    assert "http" not in page.replace("http-equiv", "")
    for name in (
        "dropped: length, characters",
        "japanese_script.hiragana_share",
        "<svg",
        'class="limit"',
        "min_hiragana_share: 0.2",
    ):
        assert name in page


def test_again_is_nothing_to_do_and_another_is_refused(tmp_path: Path, corpus: Path) -> None:
    first = clean(corpus, tmp_path / "out", "ja", quiet=True)
    before = without_times(tmp_path / "out")
    again = clean(corpus, tmp_path / "out", "ja", quiet=True)
    assert (again.status, again.kept, again.files) == ("unchanged", first.kept, first.files)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert clean(corpus, tmp_path / "moved", "ja", quiet=True).files["kept"] == str(tmp_path / "moved" / "kept.jsonl")
    (tmp_path / "moved").rename(tmp_path / "out")
    for changed, found in ((b"{}", "has 2 bytes, and had"), (None, "is not there any more")):
        kept = tmp_path / "out" / "kept.jsonl"
        kept.unlink() if changed is None else kept.write_bytes(changed)
        with pytest.raises(CptError, match=found):
            clean(corpus, tmp_path / "out", "ja", quiet=True)
    assert clean(corpus, tmp_path / "out", "ja", overwrite=True, quiet=True).status == "written"
    other = Rules("ja", (Length(min_characters=10),))
    with pytest.raises(CptError, match="another cleaning: its rules or options are others"):
        clean(corpus, tmp_path / "out", other, quiet=True)
    assert without_times(tmp_path / "out") == before
    corpus.write_text(corpus.read_text() + '{"text": "もう一つ。"}\n')
    with pytest.raises(CptError, match=r"another cleaning: .*ja\.jsonl"):
        clean(corpus, tmp_path / "out", "ja", quiet=True)
    assert clean(corpus, tmp_path / "out", other, overwrite=True, quiet=True).status == "written"
    (tmp_path / "out" / "cleaning.json").unlink()
    with pytest.raises(CptError, match=r"holds kept\.jsonl, .* without a cleaning\.json"):
        clean(corpus, tmp_path / "out", "ja", quiet=True)


def test_rules_that_drop_everything_are_an_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "ja.jsonl", demo("ja"))
    with pytest.raises(
        CptError, match=r"drop all 113 documents: length: characters \(113; the first has .*at least 400"
    ):
        clean(source, tmp_path / "out", "ja", quiet=True)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_named_and_leaves_nothing(tmp_path: Path, corpus: Path) -> None:
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join([*lines[:5], "no json\n", *lines[5:], '{"body": "x"}\n']))
    with pytest.raises(CptError, match="line 6, byte offset"):
        clean(corpus, tmp_path / "out", "ja", quiet=True)
    with pytest.raises(CptError, match="no key 'body'"):
        clean(corpus, tmp_path / "out", "ja", json_key="body", quiet=True)
    assert not (tmp_path / "out").exists()
    report = clean(corpus, tmp_path / "out", "ja", on_error="skip", max_skipped=0.1, quiet=True)
    assert report.skipped == {"not_json": 1, "missing_key": 1}
    for inputs, message in (([], "There is no input"), (tmp_path / "none.jsonl", "There is no input")):
        with pytest.raises(CptError, match=message):
            clean(inputs, tmp_path / "new", "ja", quiet=True)
    shutil.copy(corpus, tmp_path / "kept.jsonl")
    with pytest.raises(CptError, match="lies where the cleaning puts its own"):
        clean(tmp_path / "kept.jsonl", tmp_path, "ja", quiet=True)
    assert not (tmp_path / "new").exists()


def test_columns_that_json_has_no_form_for(tmp_path: Path, japanese: list[str]) -> None:
    import datetime

    import pyarrow as pa
    from pyarrow import parquet

    day = datetime.date(2026, 11, 26)
    parquet.write_table(pa.table({"text": japanese[:3], "day": [day] * 3}), tmp_path / "a.parquet")
    report = clean(tmp_path / "a.parquet", tmp_path / "out", "ja", quiet=True)
    assert read(report.files["kept"])[0]["day"] == "2026-11-26"
    parquet.write_table(pa.table({"text": japanese[:3], "raw": [b"x"] * 3}), tmp_path / "b.parquet")
    with pytest.raises(CptError, match="holds a bytes, which JSON has no form for"):
        clean(tmp_path / "b.parquet", tmp_path / "other", "ja", quiet=True)


def test_a_full_disk_leaves_nothing_and_the_next_run_is_whole(tmp_path: Path, corpus: Path) -> None:
    error = error_of_a_full_disk(lambda: clean(corpus, tmp_path / "out", "ja", workers=1, quiet=True), 20_000)
    assert "File too large" in error
    assert not (tmp_path / "out").exists()
    assert clean(corpus, tmp_path / "out", "ja", quiet=True).status == "written"


def test_a_killed_cleaning_leaves_nothing_half_written_and_a_rerun_gives_the_same(tmp_path: Path, corpus: Path) -> None:
    def run(folder: Path) -> None:
        clean(corpus, folder, "ja", workers=2, quiet=True)

    with corpus.open("a") as file:
        file.write(corpus.read_text().splitlines()[0] + "\n")  # a duplicate
    lines = lines_of(lambda: run(tmp_path / "undisturbed"), CODE)
    expected = without_times(tmp_path / "undisturbed")
    begin, end = lines.with_workers
    points = [1 + lines.count * each // 8 for each in range(8)] + [begin, (begin + end) // 2, lines.count - 3]
    # The files are moved to their places by code of the library's that any folder's writer calls.
    moving = lines_of(lambda: run(tmp_path / "moved"), MOVING).count
    folder = tmp_path / "killed"
    for code, point in [(CODE, each) for each in points] + [(MOVING, moving - back) for back in range(1, 56, 5)]:
        _, workers = killed_at(point, lambda: run(folder), code)
        assert psutil.wait_procs(workers, timeout=60)[1] == []  # workers do not outlive their parent
        if (folder / "cleaning.json").exists():
            assert without_times(folder) == expected
            shutil.rmtree(folder)
    run(folder)
    assert without_times(folder) == expected
    assert sorted(path.name for path in folder.iterdir()) == NAMES


def test_near_duplicates_by_similarity(tmp_path: Path, japanese: list[str]) -> None:
    base = "\n".join(japanese[:2])
    texts = [base, base[:-100], base[: len(base) // 3] + japanese[9], japanese[5], base]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    rules = Rules("ja", (), Duplicates(exact=True, near=0.8))
    dropped = {
        each["id"]: each["dropped_by"]
        for each in read(clean(source, tmp_path / "a", rules, quiet=True).files["dropped"])
    }
    assert {name: each["measure"] for name, each in dropped.items()} == {1: "similarity", 4: "exact"}
    rules = Rules("ja", (), Duplicates(exact=True, near=None))
    assert [each["id"] for each in read(clean(source, tmp_path / "b", rules, quiet=True).files["dropped"])] == [4]
    rules = Rules("ja", (), Duplicates(exact=False, near=None))
    assert clean(source, tmp_path / "c", rules, quiet=True).kept == 5


def test_explain_finds_the_line(tmp_path: Path, corpus: Path, japanese: list[str]) -> None:
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'\n{"text": "short"}\nno json\n' + corpus.read_bytes()))
    found = explain(f"{tmp_path / 'b.jsonl.gz'}:2", rules_for("ja"))
    assert found.failed is not None
    assert (found.failed[0], found.failed[1].value) == ("length", 5)
    assert {rule for rule, _ in found.checks} >= {"repair", "length", "sentences", "character_repetition"}
    assert explain(f"{tmp_path / 'b.jsonl.gz'}:7", rules_for("ja")).document.text == japanese[3].strip()
    for place, message in (
        (f"{tmp_path / 'b.jsonl.gz'}:1", "line 1: it is blank"),
        (f"{tmp_path / 'b.jsonl.gz'}:3", "line 3: not JSON"),
        (f"{tmp_path / 'b.jsonl.gz'}:99", "there is no line 99"),
        (f"{tmp_path / 'none'}:1", "there is no file"),
        ("ja.jsonl", "write FILE:LINE"),
        ("ja.jsonl:0", "lines count from 1"),
    ):
        with pytest.raises(CptError, match=message):
            explain(place, rules_for("ja"))


def test_the_manifest_is_plain_json(tmp_path: Path, corpus: Path) -> None:
    clean(corpus, tmp_path / "out", "ja", quiet=True)
    recorded = orjson.loads((tmp_path / "out" / "cleaning.json").read_bytes())
    assert recorded["options"]["rules"][0]["rule"] == "repair"
    (tmp_path / "out" / "cleaning.json").write_text("{")
    with pytest.raises(CptError, match="is damaged"):
        read_cleaning(tmp_path / "out")
    with pytest.raises(CptError, match="nothing was cleaned"):
        read_cleaning(tmp_path)
