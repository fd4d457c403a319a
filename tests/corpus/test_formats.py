"""Any mix of files, formats, encodings and damage gives either every document or an error that names its reason."""

import bz2
import gzip
import io
import json
import lzma
import random
import re
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.corpus import prepare, split
from nemo_cpt.corpus.preparing.job import SAMPLE_BYTES, first_texts
from nemo_cpt.corpus.reading.chunks import Feed, texts_of
from nemo_cpt.corpus.reading.decompression import PIECE, unpack
from nemo_cpt.corpus.reading.formats import BOM, resemblance
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.corpus.reading.tally import Policy, Tally
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import same_files, write_jsonl


def read(paths: list[Path], step: int = 64, skip: bool = False, max_skipped: float = 0.01) -> list[str]:
    """The texts of files, as `prepare` and `split` read them."""
    sources, tally, found = list_sources(paths), Tally(), []
    for task in Feed(sources, "text", step):
        texts = texts_of(task, "text")
        found += texts.texts
        tally.add(task, texts.reading, sources[task.source], Policy(skip, max_skipped))
    tally.check(sources, max_skipped)
    return found


@dataclass(frozen=True)
class Made:
    """A file: its content, and the documents that it holds; None where it holds none that can be read.

    Attributes:
        sound: It has to be read; one that is not may also be refused.
    """

    content: bytes
    documents: list[str] | None
    sound: bool = True


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ['], {"text": "x"}', '\\" [', "a\nb\r\n", "{", "語" * 30, "}{", ",", "\u2028", "\x00"]
)
DOCUMENTS = st.lists(TEXTS, min_size=1, max_size=12)
SKIPPABLE = bytes.fromhex("5b2a4d1804000000") + b"seek"


@st.composite
def lines(draw: st.DrawFn, documents: list[str]) -> bytes:
    """JSON lines, in any of the ways to write them."""
    end, ascii_only = draw(st.sampled_from(["\n", "\r\n", "\n\n", " \n"])), draw(st.booleans())
    made = [json.dumps({"id": i, "text": text}, ensure_ascii=ascii_only) for i, text in enumerate(documents)]
    text = draw(st.sampled_from(["", "\ufeff", "\n"])) + end.join(made) + draw(st.sampled_from(["", end]))
    return text.encode()


@st.composite
def array(draw: st.DrawFn, documents: list[str]) -> bytes:
    """A JSON array of objects, in any of the ways to write it."""
    rows = [{"id": [i, {"of": []}], "text": text} for i, text in enumerate(documents)]
    indent, ascii_only = draw(st.sampled_from([None, 0, 2])), draw(st.booleans())
    before, after = draw(st.sampled_from(["", "\ufeff", " \n"])), draw(st.sampled_from(["", "\n", " \r\n\n"]))
    return (before + json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + after).encode()


@st.composite
def packed(draw: st.DrawFn, content: bytes) -> tuple[list[bytes], str]:
    """The content in one or several parts that follow each other in a file, each whole by itself; and their format."""
    kind = draw(st.sampled_from(["plain", "gzip", "zstd"]))
    if kind == "plain":
        return [content], kind
    cuts = sorted(draw(st.sets(st.integers(0, len(content)), max_size=3)))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    if kind == "gzip":
        return [gzip.compress(piece) for piece in pieces], kind
    with_checksum = zstandard.ZstdCompressor(write_checksum=True)
    skippable = st.sampled_from([SKIPPABLE, b""])
    frames = [part for piece in pieces for part in (draw(skippable), with_checksum.compress(piece))]
    return [*frames, draw(skippable)], kind


def unpacked(parts: list[bytes], kind: str) -> bytes:
    """What other libraries say that whole parts hold."""
    if kind == "gzip":
        return gzip.decompress(b"".join(parts))
    reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(b"".join(parts)), read_across_frames=True)
    return reader.read() if kind == "zstd" else b"".join(parts)


def documents_of(content: bytes) -> list[str] | None:
    """What Python's json says that JSON lines hold; None where it says that one of them is none."""
    try:
        found = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip(" \r\t")]
        return [entry["text"] for entry in found] if all(type(entry["text"]) is str for entry in found) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


@st.composite
def sound(draw: st.DrawFn) -> Made:
    documents = draw(DOCUMENTS)
    content = draw(lines(documents) | array(documents))
    return Made(b"".join(draw(packed(content))[0]), documents)


@st.composite
def cut(draw: st.DrawFn) -> Made:
    """A file that ends early: between two parts of it nobody can know."""
    content = draw(lines(draw(DOCUMENTS)))
    parts, kind = draw(packed(content))
    whole = b"".join(parts)
    size = draw(st.integers(0, len(whole) - 1))
    ends = [sum(map(len, parts[:count])) for count in range(len(parts) + 1)]
    if kind == "plain":
        return Made(whole[:size], documents_of(whole[:size]), sound=False)
    rest = unpacked(parts[: ends.index(size)], kind) if size in ends else None
    return Made(whole[:size], None if rest is None else documents_of(rest), sound=False)


@st.composite
def altered(draw: st.DrawFn) -> Made:
    """A file of which some bytes are others, or came in between; of a plain one nobody can know that."""
    content = draw(lines(draw(DOCUMENTS)))
    parts, kind = draw(packed(content))
    whole = b"".join(parts)
    at, size = draw(st.integers(0, len(whole) - 1)), draw(st.integers(0, 9))
    changed = whole[:at] + draw(st.binary(min_size=1, max_size=9) | st.just(bytes(9))) + whole[at + size :]
    if kind == "plain":
        return Made(changed, documents_of(changed), sound=False)
    try:
        return Made(changed, documents_of(unpacked([changed], kind)), sound=False)
    except (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError):
        return Made(changed, None)


@st.composite
def broken_array(draw: st.DrawFn) -> Made:
    """A JSON array with a token too much; a comma too much does no harm."""
    content = draw(array(draw(DOCUMENTS)))
    at, size = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 9))
    token = draw(st.sampled_from([b"", b'"', b"]", b"}", b"{", b",", b"\n", b"\\"]))
    before, after = content[:at], content[at + size :]
    for meant in (before + token + after, before + after) if token == b"," else (before + token + after,):
        with suppress(ValueError, KeyError, TypeError):
            documents = [row["text"] for row in json.loads(meant.decode("utf-8-sig"))]
            return Made(before + token + after, documents, sound=False)
    return Made(before + token + after, documents_of(before + token + after), sound=False)


def as_tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("corpus.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def as_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("corpus.jsonl", content)
    return file.getvalue()


def as_csv(content: bytes) -> bytes:
    return b"id,text\n" + b"".join(b"%d,text %d\n" % (i, i) for i in range(content.count(b"\n") + 2))


def as_arrow(content: bytes) -> bytes:
    import pyarrow as pa

    table, file = pa.table({"text": ["a"]}), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def numbers(content: bytes) -> bytes:
    return b"[1, 2, 3]\n"


FOREIGN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "xz": (lzma.compress, "is xz, which is not read. Unpack it first: xz -dk "),
    "bzip2": (bz2.compress, "is bzip2, which is not read. Unpack it first: bzip2 -dk "),
    "zip": (as_zip, "is a zip archive"),
    "tar": (as_tar, "is a tar archive"),
    "tar.gz": (lambda content: gzip.compress(as_tar(content)), "is a gzip file that holds a tar archive"),
    "gzip in zstd": (lambda content: zstandard.compress(gzip.compress(content)), "is a gzip file inside a zstd file"),
    "7z": (lambda content: bytes.fromhex("377abcaf271c0004") + content, "is a 7z archive"),
    "PDF": (lambda content: b"%PDF-1.7\n" + content, "is a PDF"),
    "Arrow": (as_arrow, "is an Arrow stream"),
    "lz4": (lambda content: bytes.fromhex("04224d1864") + content, "is lz4"),
    "UTF-16": (lambda content: content.decode().encode("utf-16"), "is UTF-16.*iconv -f UTF-16"),
    "UTF-16 without a mark": (lambda content: content.decode().encode("utf-16-le"), "NUL bytes"),
    "UTF-32": (lambda content: content.decode().encode("utf-32"), "is UTF-32"),
    "UTF-16 in gzip": (lambda content: gzip.compress(content.decode().encode("utf-16")), "gzip file that holds UTF-16"),
    "torn": (lambda content: bytes(500) + content, "NUL bytes"),
    "LFS pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\noid \n", "a Git LFS pointer"),
    "CSV": (as_csv, "seems to be CSV with the columns id, text: under a name that ends in .csv"),
    "TSV in gzip": (lambda content: gzip.compress(as_csv(content).replace(b",", b"\t")), "seems to be TSV"),
    "XML": (lambda content: b"<mediawiki>\n<page>\n", "XML or HTML; of a dump of Wikipedia"),
    "a value over lines": (lambda content: b'{\n "a": [\n {"text": "a"}\n ]\n}\n', "one JSON value over several lines"),
    "CR alone": (lambda content: b'{"text": "a"}\r{"text": "b"}\r', "lines end in CR alone"),
    "several on a line": (lambda content: b'{"text": "a"}{"text": "b"}\n', "several JSON objects"),
    "plain text": (lambda content: b"A text.\n", "seems to be plain text: under a name that ends in .txt"),
    "an array of numbers": (numbers, "a JSON list, not an object"),
    "another key": (lambda content: b'{"content": "a"}\n' * 3, "no key 'text'; it has 'content'"),
    "a Parquet file that is cut": (lambda content: b"PAR1" + content, "is not a whole Parquet file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


def place(folder: Path, files: list[Made | bytes], names: list[str]) -> list[Path]:
    """Write files whose names say what they like."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    paths = [folder / f"{number}{name}" for number, name in enumerate(names)]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file if isinstance(file, bytes) else file.content)
    return paths


NAMES = st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".zst", ".parquet", ".txt", ""])


@given(files=st.lists(sound(), min_size=1, max_size=3), step=st.integers(1, 200), data=st.data())
@settings(max_examples=300)
def test_sound_files_give_every_document(folder: Path, files: list[Made], step: int, data: st.DataObject) -> None:
    paths = place(folder, files, data.draw(st.lists(NAMES, min_size=len(files), max_size=len(files))))
    assert read(paths, step) == [text for file in files for text in file.documents or []]


@given(files=st.lists(sound() | cut() | altered() | broken_array(), min_size=1, max_size=3), step=st.integers(1, 200))
@settings(max_examples=600)
def test_damaged_files_give_every_document_or_an_error(folder: Path, files: list[Made], step: int) -> None:
    paths = place(folder, files, [".jsonl"] * len(files))
    try:
        found = read(paths, step)
    except CptError as error:
        assert not all(file.sound and file.documents is not None for file in files)
        assert any(str(path) in str(error) for path in paths)  # noqa: PT017
        return
    assert found == [text for file in files for text in file.documents or [None]]


@given(files=st.lists(sound() | cut() | altered() | broken_array(), min_size=1, max_size=3), step=st.integers(1, 200))
@settings(max_examples=300)
def test_what_is_skipped_is_little_or_an_error(folder: Path, files: list[Made], step: int) -> None:
    paths = place(folder, files, [".jsonl"] * len(files))
    try:
        found = read(paths, step, skip=True)
    except CptError:
        assert not all(file.sound and file.documents is not None for file in files)
        return
    # Too few lines in a file for one of them to be less than 1 %: nothing but empty files can be left out
    assert found == [text for file in files for text in file.documents or []]


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("skip", [False, True])
def test_foreign_formats_are_named(folder: Path, kind: str, skip: bool) -> None:
    write, message = FOREIGN[kind]
    good = b'{"text": "good"}\n' * 300
    for name in (".jsonl", ".jsonl.gz"):
        paths = place(folder, [good, write(good), good], [".jsonl", name, ".jsonl"])
        with pytest.raises(CptError, match=message) as error:
            read(paths, skip=skip)
        assert f"1{name}" in str(error.value)


@given(
    good=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    bad=st.lists(st.integers(0, 400), max_size=4),
    allowed=st.sampled_from([0, 0.01, 0.05, 0.3, 1]),
    seed=st.integers(0, 99),
)
@settings(max_examples=300)
def test_the_share_that_is_skipped_is_of_lines_and_of_bytes(
    folder: Path, good: list[int], bad: list[int], allowed: float, seed: int
) -> None:
    kept, lost = (
        [json.dumps({key: "x" * size}) + "\n" for size in sizes] for key, sizes in (("text", good), ("no", bad))
    )
    shuffled = random.Random(seed).sample(kept + lost, len(kept + lost))
    [path] = place(folder, ["".join(shuffled).encode()], [".jsonl"])
    share = max(len(lost) / len(shuffled), len("".join(lost)) / len("".join(shuffled)))
    if share > allowed:
        with pytest.raises(
            CptError, match=r"lines give no text.*may be skipped|only \d+ of its \d+ lines gives a text"
        ):
            read([path], skip=True, max_skipped=allowed)
    else:
        assert len(read([path], skip=True, max_skipped=allowed)) == len(good)


def test_a_file_of_pzstd_is_read(tmp_path: Path, texts: list[str], small: Path) -> None:
    if not shutil.which("pzstd"):
        pytest.skip("needs pzstd (apt install zstd)")
    plain = write_jsonl(tmp_path / "plain.jsonl", texts)
    subprocess.run(["pzstd", "-q", plain, "-o", tmp_path / "packed.jsonl.zst"], check=True)
    reports = [prepare(tmp_path / f"{n}", tmp_path / n, small, quiet=True) for n in ("plain.jsonl", "packed.jsonl.zst")]
    assert same_files(reports[0].prefix, reports[1].prefix)
    sets = split(tmp_path / "packed.jsonl.zst", tmp_path / "sets", validation=0.2, on_error="skip", quiet=True)
    assert sum(sets.documents.values()) + sets.repeated == len(texts)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_json_array_is_read(
    tmp_path: Path, texts: list[str], small: Path, indent: int | None, pack: Callable[[bytes], bytes]
) -> None:
    expected = prepare(write_jsonl(tmp_path / "lines.jsonl", texts), tmp_path / "expected", small, quiet=True)
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    (tmp_path / "array.json").write_bytes(pack(json.dumps(rows, indent=indent, ensure_ascii=False).encode()))
    report = prepare(tmp_path / "array.json", tmp_path / "ds", small, chunk_bytes=3000, verify=20, quiet=True)
    assert same_files(report.prefix, expected.prefix)
    sets = split(tmp_path / "array.json", tmp_path / "sets", validation=0.2, quiet=True)
    found = [json.loads(line) for path in sets.files.values() for line in Path(path).read_bytes().splitlines()]
    assert sorted(found, key=lambda row: row["id"]) == rows


def test_an_element_of_an_array_is_located(tmp_path: Path, small: Path) -> None:
    content = b'[\n  {"text": "a"},\n  {"txt": "b"}\n]\n'
    (tmp_path / "array.json").write_bytes(content)
    with pytest.raises(CptError, match=rf"line 2, byte offset {content.index(b',') + 1}: no key 'text'; it has 'txt'"):
        prepare(tmp_path / "array.json", tmp_path / "ds", small, quiet=True)


def test_a_packed_file_in_a_folder_is_not_left_out(tmp_path: Path, texts: list[str], small: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts)
    for name in ("b.jsonl.xz", "c.ndjson.bz2"):
        (tmp_path / name).write_bytes((lzma if "xz" in name else bz2).compress(b'{"text": "b"}\n'))
        with pytest.raises(CptError, match=f"{name} is (xz|bzip2), which is not read. Unpack it first"):
            prepare(tmp_path, tmp_path / "out", small, quiet=True)
        (tmp_path / name).unlink()
    (tmp_path / "D.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "d"}\n'))
    (tmp_path / "e.ndjson.gz").write_bytes(gzip.compress(b'{"text": "e"}\n'))
    assert prepare(tmp_path, tmp_path / "out", small, quiet=True).documents == len(texts) + 2


@pytest.mark.parametrize("piece_bytes", [7, 64, PIECE])
def test_padding_around_gzip_members_is_passed_over_wherever_it_is_read(piece_bytes: int) -> None:
    one, other = (gzip.compress(line) for line in (b"one\n", b"other\n"))
    # Also of such a length that a piece begins within it.
    for padding in (1, 512, PIECE - len(one), PIECE):
        content = io.BytesIO(one + bytes(padding) + other + bytes(padding))
        assert b"".join(unpack(content, "gzip", piece_bytes)) == b"one\nother\n"


def test_pipes_unfinished_downloads_and_addresses_are_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.jsonl.part").write_text('{"text": "half"}\n')
    (tmp_path / "x.jsonl.part.json").write_text("{}")
    for name, message in (
        (tmp_path / "pipe", "is a pipe or a device"),
        (tmp_path / "x.jsonl.part", "an unfinished download"),
        ("https://me:geheim@example.com/x.jsonl", r"https://example.com/x.jsonl is an address; .*nemo-cpt fetch"),
    ):
        with pytest.raises(CptError, match=message):
            list_sources(name)


@pytest.mark.parametrize("run", ["prepare", "split"])
def test_a_file_without_a_text_is_an_error_also_where_lines_are_skipped(
    tmp_path: Path, texts: list[str], small: Path, run: str
) -> None:
    def act(**options: object) -> dict[str, int]:
        paths = sorted(tmp_path.glob("*.jsonl"))
        if run == "prepare":
            return prepare(paths, tmp_path / "ds", small, on_error="skip", quiet=True, **options).skipped
        return split(paths, tmp_path / "sets", validation=0.2, on_error="skip", quiet=True, **options).skipped

    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl").write_text("id,text\n1,one\n")
    with pytest.raises(
        CptError, match=r"b.jsonl: none of its 2 lines gives a text \(line 1.*seems to be CSV.*take it out"
    ):
        act(max_skipped=1)
    (tmp_path / "b.jsonl").write_text("\n \n")  # nothing is lost with it
    assert act() == {"empty_file": 1}


@pytest.mark.parametrize("run", ["prepare", "split"])
def test_more_than_a_hundredth_is_not_skipped_without_a_word(
    tmp_path: Path, texts: list[str], small: Path, run: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", (texts * 3)[:97])
    path.write_text(path.read_text("utf-8") + "bad\n" * 3, "utf-8")

    def act(**options: object) -> dict[str, int]:
        if run == "prepare":
            return prepare(path, tmp_path / "ds", small, quiet=True, **options).skipped
        return split(path, tmp_path / "sets", validation=0.2, quiet=True, **options).skipped

    with pytest.raises(
        CptError, match=r"3 of 100 lines give no text \(not_json 3\): 3 %.*line 98.*--max-skipped 0.03\)"
    ):
        act(on_error="skip")
    assert not list(tmp_path.glob("*.idx")) + list(tmp_path.glob("sets/*.jsonl"))
    assert act(on_error="skip", max_skipped=0.03) == {"not_json": 3}


def test_what_may_be_skipped_is_a_share_of_what_is_skipped(tmp_path: Path, jsonl: Path, small: Path) -> None:
    for options, message in (
        ({"max_skipped": 0.1}, "nothing is skipped: add on_error='skip'"),
        ({"max_skipped": 2, "on_error": "skip"}, "max_skipped is 2; it must lie between 0 and 1"),
    ):
        with pytest.raises(CptError, match=message):
            prepare(jsonl, tmp_path / "ds", small, quiet=True, **options)
        with pytest.raises(CptError, match=message):
            split(jsonl, tmp_path / "sets", quiet=True, **options)


@pytest.mark.parametrize("key", ["text", None])
def test_tasks_of_long_rows_are_as_small_as_those_of_lines(tmp_path: Path, key: str | None) -> None:
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    texts = [str(number) * (50_000 if number % 10 else 10) for number in range(60)]
    columns = {"text": texts, "id": list(range(60))}
    parquet.write_table(pa.table(columns), tmp_path / "long.parquet", row_group_size=25)
    Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    lines = "".join(f"{number},{text}\n" for number, text in enumerate(texts))
    (tmp_path / "long.csv").write_text("id,text\n" + lines)
    for name in ("long.parquet", "saved", "long.csv"):
        tasks = list(Feed(list_sources(tmp_path / name), key, 1 << 18))
        rows = [value if key else value["text"] for task in tasks for value in task.data or ()]
        assert rows == texts, name
        assert len(tasks) > 10, name
        assert [task.start for task in tasks[1:]] == [task.stop for task in tasks[:-1]], name


def test_of_a_file_that_is_one_document_tokenizers_are_tried_on_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("word " * 200_000)
    texts = first_texts(list_sources(tmp_path / "book.txt"), "text")
    assert [len(text) for text in texts] == [SAMPLE_BYTES]


def test_blank_lines_end_no_csv(tmp_path: Path) -> None:
    (tmp_path / "gap.csv").write_text("id,text\n1,before\n" + "\n" * 2500 + "2,behind\n")
    assert read([tmp_path / "gap.csv"], step=1 << 20) == ["before", "behind"]


def test_a_text_file_is_a_document_and_a_row_of_csv_is_one(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "a.txt").write_bytes(BOM + b"Two\r\nlines, {no} JSON.\n")
    (tmp_path / "deeper/b.md").write_text("# A title\n")
    (tmp_path / "c.csv").write_text('id,text\n1,"a, b"\n\n2,"one\nand ""two"""\n')
    (tmp_path / "d.tsv").write_text("text\tid\nan, other\t3\n")
    (tmp_path / "e.csv").write_text("id;text\n4;x, y\n")
    for about in ("README.md", "LICENSE.txt"):
        (tmp_path / about).write_text("not data")
    texts = ["Two\r\nlines, {no} JSON.\n", "a, b", 'one\nand "two"', "an, other", "# A title\n", "x, y"]
    assert read([tmp_path]) == texts
    (tmp_path / "f.jsonl").write_text('{"text": "alone"}\n')  # beside which the others only tell of it
    assert read([tmp_path]) == ["alone"]
    assert read([f"{tmp_path}/*.txt", tmp_path / "README.md"]) == [
        "not data",
        texts[0],
        "not data",
    ]  # what is named is taken


def test_json_lines_and_arrays_stay_such_under_any_name(tmp_path: Path) -> None:
    for number, name in enumerate(("a.txt", "a.md", "a.csv")):
        (tmp_path / name).write_text(['{"text": "x"}\n', ' [ {"text": "x"} ]', '\n{"text": "x"}\n'][number])
        assert read([tmp_path / name]) == ["x"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"id,body\n1,a\n", "has no column 'text'; it has id, body. --json-key takes another"),
        (b"id,text\n1,a, b\n", "3 fields where the header has 2, by line 2"),
        (b'id,text\n1,"a\n', "unexpected end of data"),
        (b"id,text\n" + b"1,a\n" * 9000 + b"1,\xff\n", "the CSV file breaks near its row "),
        (b"text,text\na,b\n", "names a column twice"),
        (b"\xe9,text\na,b\n", "is no UTF-8"),
    ],
)
def test_bad_csv(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(CptError, match=re.escape(says)):
        read([tmp_path / "a.csv"])


@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_text_in_another_encoding_is_told_the_cure(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(("text\n" + "a\n" * 9000 + "café\n").encode("latin-1"))
    with pytest.raises(CptError, match=r"can't decode byte 0xe9 .* in another encoding, convert it with iconv"):
        read([tmp_path / name])


def test_an_empty_input_resembles_nothing() -> None:
    assert resemblance(b"") == resemblance(b"\xef\xbb\xbf\n") == ""
