"""Bad input: located by file, line and byte, or left out, counted and listed."""

import gzip
import json
import multiprocessing
import os
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import zstandard

import nemo_cpt.corpus
from nemo_cpt.cleaning import Rules, clean
from nemo_cpt.cleaning.duplicates import Duplicates
from nemo_cpt.conversations import prepare as prepare_chats
from nemo_cpt.corpus import prepare, split
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import same_files, write_jsonl
from tests.support.crashes import go_on, lines_of, paused_at

CODE = Path(nemo_cpt.corpus.__file__).parent
GOOD = b'{"text": "good"}\n'
BAD = [
    (b"{nonsense}\n", "not_json", "not JSON", 1),
    (b'{"txt": "a"}\n', "missing_key", "no key 'text'; it has 'txt'", 0),
    (b'{"text": 5}\n', "not_a_string", "'text' is a int, not a string", 0),
    (b'{"text": "\xe3\x81"}\n', "invalid_utf8", "byte 0xe3 is not UTF-8", 10),
    (b'{"text": "\\udc00"}\n', "lone_surrogate", r"lone surrogate U\+DC00", 0),
]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize(("line", "reason", "message", "at"), BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_stops_with_its_place(
    tmp_path: Path, small: Path, line: bytes, reason: str, message: str, at: int, packed: bool
) -> None:
    content = GOOD * 700 + line + GOOD * 500
    path = tmp_path / "bad.jsonl"
    path.write_bytes(gzip.compress(content) if packed else content)
    offset = 700 * len(GOOD) + at
    with pytest.raises(CptError, match=rf"bad.jsonl, line 701, byte offset {offset}: .*{message}"):
        prepare(path, tmp_path / "out", small, chunk_bytes=1000, quiet=True)
    assert not [name for name in leftovers(tmp_path) if name.endswith((".idx", ".bin"))]
    # The same job goes on from where it stopped, once it may skip the line
    report = prepare(path, tmp_path / "out", small, chunk_bytes=1000, on_error="skip", quiet=True)
    assert (report.status, report.documents, report.skipped) == ("resumed", 1200, {reason: 1})


def test_skipped_lines_are_counted_and_listed(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join(GOOD * 10 + line for line, *_ in BAD))
    report = prepare(path, tmp_path / "out", small, on_error="skip", max_skipped=0.1, chunk_bytes=100, quiet=True)
    assert report.skipped == {reason: 1 for _, reason, *_ in BAD}
    listed = [json.loads(line) for line in Path(f"{report.prefix}.skipped.jsonl").read_text().splitlines()]
    assert [(entry["reason"], entry["line"]) for entry in listed] == [
        (reason, 11 * number) for number, (_, reason, *_) in enumerate(BAD, 1)
    ]
    assert all(entry["path"] == str(path) for entry in listed)
    assert report.documents == 50
    assert "5 lines were left out" in report.warnings[0]


def test_what_was_skipped_is_not_taken_where_nothing_may_be(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"".join(b'{"text": "good %d"}\n' % number for number in range(400)) + b"no JSON\n")
    rules = Rules("en", (), Duplicates(exact=False, near=None))
    for make in (partial(prepare, tokenizer=small), partial(split, validation=0.1), partial(clean, rules=rules)):
        made = make(path, tmp_path / "out", on_error="skip", quiet=True)
        assert (made.status, made.skipped) == ("written", {"not_json": 1})
        with pytest.raises(CptError, match=r"it left out what gives no text \(not_json 1\), and on_error='stop'"):
            make(path, tmp_path / "out", quiet=True)
        # A run of its own would be refused, too.
        with pytest.raises(CptError, match=r"\(not_json 1\), 0\.249 % of its inputs, and 0\.2 % may be skipped"):
            make(path, tmp_path / "out", on_error="skip", max_skipped=0.002, quiet=True)
        assert make(path, tmp_path / "out", on_error="skip", quiet=True).status == "unchanged"


def test_an_unfinished_run_that_skipped_is_not_gone_on_with_where_nothing_may_be(tmp_path: Path, small: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_bytes(GOOD * 700 + b"no JSON\n" + GOOD * 500)
    second.write_bytes(gzip.compress(GOOD * 9000)[:-20])
    with pytest.raises(CptError, match=r"may be skipped.*The next run goes on"):
        prepare([first, second], tmp_path / "out", small, on_error="skip", chunk_bytes=1000, quiet=True)
    with pytest.raises(CptError, match=r"is not one to go on with: it left out what gives no text \(not_json 1"):
        prepare([first, second], tmp_path / "out", small, chunk_bytes=1000, quiet=True)
    report = prepare([first, second], tmp_path / "out", small, on_error="skip", max_skipped=1, quiet=True)
    assert report.status == "resumed"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("cut", [0.5, 0.9999])
def test_a_truncated_file_is_noticed(tmp_path: Path, small: Path, suffix: str, cut: float) -> None:
    noise = random.Random(1)
    made = ["".join(chr(noise.randrange(0x4E00, 0x9FA0)) for _ in range(1000)) for _ in range(300)]
    content = write_jsonl(tmp_path / "plain", made).read_bytes()
    packed = gzip.compress(content) if suffix == "gz" else zstandard.compress(content)
    path = tmp_path / f"cut.jsonl.{suffix}"
    path.write_bytes(packed[: int(len(packed) * cut)])
    with pytest.raises(CptError, match=rf"cut.jsonl.{suffix}, line \d+, byte offset \d+: the (gzip|zstd) file"):
        prepare(path, tmp_path / "out", small, quiet=True)
    with pytest.raises(
        CptError, match=rf"{path.stat().st_size:,} bytes are in files that break off.*: 100 % of the inputs"
    ):
        prepare(path, tmp_path / "out", small, on_error="skip", quiet=True)
    report = prepare(path, tmp_path / "out", small, on_error="skip", max_skipped=1, quiet=True)
    assert report.skipped == {"damaged": 1}
    assert len(made) * cut * 0.6 < report.documents < len(made)


def test_corrupt_bytes_in_a_compressed_file_are_noticed(tmp_path: Path, texts: list[str], small: Path) -> None:
    packed = bytearray(gzip.compress(write_jsonl(tmp_path / "plain", texts).read_bytes()))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "corrupt.gz").write_bytes(packed)
    with pytest.raises(CptError, match=r"corrupt\.gz, line \d+, byte offset \d+: (the gzip file breaks|byte 0x)"):
        prepare(tmp_path / "corrupt.gz", tmp_path / "out", small, quiet=True)


def test_nothing_to_do_is_an_error(tmp_path: Path, small: Path) -> None:
    for inputs in ([], tmp_path / "none.jsonl", str(tmp_path / "*.jsonl"), tmp_path):
        with pytest.raises(CptError, match=r"no input|no file"):
            prepare(inputs, tmp_path / "out", small, quiet=True)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(CptError, match=r"There is no input .*empty\.josnl; near: .*empty\.jsonl\."):
        prepare(tmp_path / "empty.josnl", tmp_path / "out", small, quiet=True)
    with pytest.raises(CptError, match=r"empty.jsonl, line 1, .*the file is empty\. Mend it"):
        prepare(tmp_path / "empty.jsonl", tmp_path / "out", small, quiet=True)
    with pytest.raises(CptError, match="hold no document"):
        prepare(tmp_path / "empty.jsonl", tmp_path / "out", small, on_error="skip", quiet=True)
    assert leftovers(tmp_path) == []


def test_an_input_named_twice_is_refused(tmp_path: Path, jsonl: Path, texts: list[str], small: Path) -> None:
    with pytest.raises(CptError, match="twice"):
        prepare([jsonl, tmp_path / "*.jsonl"], tmp_path / "out", small, quiet=True)
    (tmp_path / "link.jsonl").symlink_to(jsonl)
    (tmp_path / "hard.jsonl").hardlink_to(jsonl)
    for name in ("link.jsonl", "hard.jsonl"):
        with pytest.raises(CptError, match=f"{name} is among the inputs twice, by a link: it is {jsonl}, too"):
            prepare([jsonl, tmp_path / name], tmp_path / "out", small, quiet=True)
    # A store by content, such as the hub's cache, has one file for all that are empty.
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").symlink_to(tmp_path / "empty.jsonl")
    inputs = [jsonl, tmp_path / "empty.jsonl", tmp_path / "other.jsonl"]
    assert prepare(inputs, tmp_path / "out", small, quiet=True, on_error="skip").documents == len(texts)
    with pytest.raises(CptError, match=r"empty\.jsonl is among the inputs twice; its"):
        prepare(inputs[1:2] * 2, tmp_path / "out", small, quiet=True)


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstandard.ZstdCompressor().compress)])
def test_a_file_beside_what_it_was_unpacked_to_is_refused(
    tmp_path: Path, texts: list[str], ending: str, pack: Callable[[bytes], bytes]
) -> None:
    content = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    for packed in (pack(content), pack(content[:100]) + pack(content[100:])):
        (tmp_path / f"a.jsonl.{ending}").write_bytes(packed)
        with pytest.raises(CptError, match=rf"a\.jsonl\.{ending} is among the inputs beside .*a\.jsonl, which begins"):
            list_sources(tmp_path)
    # Others of such names are two files.
    (tmp_path / f"a.jsonl.{ending}").write_bytes(pack(b"\n".join(reversed(content.splitlines()))))
    assert len(list_sources(tmp_path)) == 2


def test_copies_among_the_inputs_are_told(tmp_path: Path, texts: list[str], small: Path) -> None:
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", texts[:5] if name != "b" else texts[5:10])
    assert prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "two", small, quiet=True).warnings == []
    report = prepare(str(tmp_path / "*.jsonl"), tmp_path / "three", small, quiet=True)
    assert report.documents == 15
    copy, of = tmp_path / "c.jsonl", tmp_path / "a.jsonl"
    assert report.warnings == [f"{copy} has the same bytes as {of}: the dataset has what is in them more than once."]


def test_a_missing_column_names_the_others(tmp_path: Path, small: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"body": ["a"], "title": ["b"]}), tmp_path / "p.parquet")
    with pytest.raises(CptError, match="no column 'text'; it has body, title"):
        prepare(tmp_path / "p.parquet", tmp_path / "out", small, quiet=True)
    report = prepare(tmp_path / "p.parquet", tmp_path / "out", small, json_key="body", quiet=True)
    assert report.prefix == f"{tmp_path}/out_body_document"


def test_a_null_in_a_column_has_its_row(tmp_path: Path, small: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a"] * 1500 + [None] + ["b"] * 10}), tmp_path / "p.parquet")
    with pytest.raises(CptError, match=r"p.parquet, line 1501, row 1500: 'text' is null"):
        prepare(tmp_path / "p.parquet", tmp_path / "out", small, quiet=True)


def corrupt_parquet(path: Path, page: int) -> list[str]:
    """Write Chinese noise in row groups of 1,000, and break the data of one in the middle; return the texts."""
    import pyarrow as pa
    from pyarrow import parquet

    noise = random.Random(2)
    made = ["".join(chr(noise.randrange(0x4E00, 0x9FA0)) for _ in range(100)) for _ in range(4000)]
    table = pa.table({"text": made})
    parquet.write_table(table, path, compression="zstd", row_group_size=1000, use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(page).column(0)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 500] = bytes(500)
    path.write_bytes(content)
    return made


def test_a_corrupt_page_of_a_parquet_file_is_noticed(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "p.parquet"
    made = corrupt_parquet(path, page=2)
    with pytest.raises(CptError, match=r"p.parquet, line 2001, row 2000: the Parquet file breaks near its row 2000: "):
        prepare(path, tmp_path / "out", small, quiet=True)
    with pytest.raises(CptError, match=r"--max-skipped 1\). The next run goes on after 2,000 documents"):
        prepare(path, tmp_path / "out", small, on_error="skip", quiet=True)
    report = prepare(path, tmp_path / "out", small, on_error="skip", max_skipped=1, quiet=True)
    assert (report.status, report.documents, report.skipped) == ("resumed", 2000, {"damaged": 1})
    expected = prepare(write_jsonl(tmp_path / "good.jsonl", made[:2000]), tmp_path / "expected", small, quiet=True)
    assert same_files(report.prefix, expected.prefix)
    with pytest.raises(CptError, match=r"p.parquet, line 2001, .*the Parquet file breaks"):
        split(path, tmp_path / "sets", validation=0.1, quiet=True)
    sets = split(path, tmp_path / "sets", validation=0.1, on_error="skip", max_skipped=1, quiet=True)
    assert sets.skipped == {"damaged": 1}


def test_a_parquet_file_that_is_corrupt_from_its_start_on(tmp_path: Path, jsonl: Path, small: Path) -> None:
    corrupt_parquet(tmp_path / "p.parquet", page=0)
    with pytest.raises(CptError, match=r"line 1, row 0: the Parquet file breaks near its row 0"):
        prepare(tmp_path / "p.parquet", tmp_path / "out", small, quiet=True)
    inputs = [tmp_path / "p.parquet", jsonl]
    with pytest.raises(CptError, match=r"p.parquet: none of its 0 lines gives a text .*take it out of the inputs"):
        prepare(inputs, tmp_path / "out", small, on_error="skip", max_skipped=1, quiet=True)


def test_rotten_bytes_of_a_parquet_file_with_checksums_are_noticed(tmp_path: Path, small: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": [f"document {number}" for number in range(100)]})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    parquet.write_table(table, tmp_path / "p.parquet", **options)
    content = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(content.replace(b"document 50", b"document 05"))
    with pytest.raises(CptError, match=r"the Parquet file breaks near its row 0: .*CRC"):
        prepare(tmp_path / "p.parquet", tmp_path / "out", small, quiet=True)


@pytest.mark.parametrize("change", ["grows", "shrinks"])
def test_a_file_that_changes_while_being_read_is_noticed(
    tmp_path: Path, texts: list[str], small: Path, change: str
) -> None:
    path = write_jsonl(tmp_path / "live.jsonl", texts * 20)
    size = path.stat().st_size
    ours, theirs = multiprocessing.Pipe()

    def job(output: Path, source: Path = path) -> None:
        try:
            prepare(source, output, small, fast=False, chunk_bytes=20_000, workers=1, quiet=True)
        except CptError as error:
            theirs.send(str(error))

    undisturbed = write_jsonl(tmp_path / "undisturbed.jsonl", texts * 20)
    lines = lines_of(lambda: job(tmp_path / "counted", undisturbed), CODE)
    process = paused_at(sum(lines.with_workers) // 2, lambda: job(tmp_path / "out"), CODE)
    assert (tmp_path / "out_text_document.bin.part").exists()
    os.truncate(path, size // 3 if change == "shrinks" else size + 9)
    go_on(process)
    process.join()
    assert ours.poll()
    assert re.search(r"live.jsonl.* (changed|shrank)", ours.recv())
    assert not (tmp_path / "out_text_document.idx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"workers": 0}, "workers is 0"),
        ({"verify": -1}, "verify is -1"),
        ({"eod_token": "<nope>"}, "no single token '<nope>'"),
    ],
)
def test_bad_options(tmp_path: Path, jsonl: Path, small: Path, options: dict, message: str) -> None:
    with pytest.raises(CptError, match=message):
        prepare(jsonl, tmp_path / "out", small, quiet=True, **options)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("output", ["file/ja", "file/x/ja"])
def test_a_file_in_the_way_of_the_output(tmp_path: Path, jsonl: Path, small: Path, output: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CptError, match=r"Cannot make the folder .*: (File exists|Not a directory). Take another out"):
        prepare(jsonl, tmp_path / output, small, quiet=True)


def test_an_output_that_cannot_be_opened(tmp_path: Path, jsonl: Path, small: Path) -> None:
    (tmp_path / "out_text_document.journal").mkdir()
    with pytest.raises(CptError, match=r"Cannot write .*out_text_document.journal: Is a directory"):
        prepare(jsonl, tmp_path / "out", small, quiet=True)


@pytest.mark.parametrize("inner", ["", "news"])
def test_a_saved_dataset_of_several_splits_wants_one_named(
    tmp_path: Path, texts: list[str], small: Path, inner: str
) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_dict({"text": some}) for name, some in (("train", texts), ("test", texts[:9]))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "data" / inner))
    with pytest.raises(CptError, match=r"saved dataset.*; name the one .*/test, .*/train\."):
        prepare(tmp_path / "data", tmp_path / "out", small, quiet=True)
    report = prepare(tmp_path / "data" / inner / "train", tmp_path / "out", small, quiet=True)
    assert report.documents == len(texts)


def test_a_folder_is_listed_without_what_commands_wrote_there(tmp_path: Path, texts: list[str], small: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "raw.jsonl", [*texts[:60], "bad"])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", texts[60:70])
    split(folder, folder, validation=str(held_out), quiet=True)  # of several sets in it, one must be named
    (folder / ".part").mkdir()
    write_jsonl(folder / ".part" / "train.jsonl", texts)
    (folder / "raw.jsonl").unlink()
    (folder / "more.jsonl").write_text("{bad\n" + (folder / "train.jsonl").read_text("utf-8"))
    prepare(folder, folder / "ds", small, on_error="skip", max_skipped=0.02, quiet=True)
    (folder / "x.jsonl.part").touch()
    (folder / "x.jsonl.part.json").write_text("{}")
    (folder / "notes_document.json").write_text('{"text": "a corpus of the user"}\n')
    (folder / "chats.jsonl").write_text('{"query": "Who?", "answer": "You."}\n')
    prepare_chats(folder / "chats.jsonl", folder / "sft", small, template="alpaca-en", quiet=True)
    (folder / "chats.jsonl").unlink()
    # Of many tasks of a `clean`, of which one was killed.
    (folder / "cleaning.parts" / "part-00001.unfinished").mkdir(parents=True)
    (folder / "cleaning.parts" / "plan.json").write_text("{}")
    for name in ("kept.jsonl", "dropped.jsonl"):
        write_jsonl(folder / "cleaning.parts" / "part-00001.unfinished" / name, texts)
    names = [Path(source.path).name for source in list_sources(folder)]
    assert names == ["more.jsonl", "notes_document.json", "train.jsonl"]


def test_folders_behind_links_are_read_once_and_what_is_hidden_is_not(tmp_path: Path) -> None:
    for name in ("data/a.jsonl", "data/in/b.jsonl", "out/c.jsonl", "out/deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    data = tmp_path / "data"
    # Jupyter's copies, and what macOS puts beside files on other disks.
    for name in (".ipynb_checkpoints/a-checkpoint.jsonl", "in/._b.jsonl"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text('{"text": "an earlier version"}\n')
    for name, target in (("aside", "../out"), ("deep", "../out/deep"), ("here", "in"), ("loop", "."), ("up", "..")):
        (data / name).symlink_to(target)
    found = [source.path.removeprefix(f"{data}/") for source in list_sources(data)]
    assert found == ["a.jsonl", "aside/c.jsonl", "aside/deep/d.jsonl", "in/b.jsonl"]
    (data / "lost.jsonl").symlink_to("nowhere")
    with pytest.raises(CptError, match=r"Cannot read the input .*lost\.jsonl: No such file"):
        list_sources(data)


def test_bad_tokenizers(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer.json").write_text('{"version": ')
    for checkpoint, place in (("base", "hf"), ("steps=9", "context/tokenizer")):
        (tmp_path / checkpoint / place).mkdir(parents=True)
        (tmp_path / checkpoint / place / "tokenizer.json").touch()
    for folder, message in [
        ("empty", "holds no tokenizer .*\\)\\.$"),
        ("base", "There is one in .*/base/hf"),
        ("steps=9", "There is one in .*/steps=9/context/tokenizer"),
        ("torn", "cannot be loaded"),
        ("none/x", "no tokenizer folder"),
    ]:
        with pytest.raises(CptError, match=message):
            prepare(jsonl, tmp_path / "out", tmp_path / folder, quiet=True)
