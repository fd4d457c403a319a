"""The feed's cutting of files into tasks, and the line parser."""

import gzip
import json
from pathlib import Path

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.corpus.reading.chunks import Feed, lines_of, texts_of
from nemo_cpt.corpus.reading.lines import TextUnder, parse_lines
from nemo_cpt.corpus.reading.sources import InputChangedError, Source
from nemo_cpt.errors import CptError

CONTENTS = st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"\n\n", b"{}", "語".encode(), b"x" * 40]), max_size=60).map(
    b"".join
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feed") / "corpus.jsonl"


def source_of(path: Path, content: bytes, kind: str) -> Source:
    pack = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}[kind]
    path.write_bytes(pack(content))
    return Source(str(path), kind, path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ctime_ns)


@given(
    content=CONTENTS | st.binary(max_size=300), step=st.integers(1, 50), kind=st.sampled_from(["plain", "gzip", "zstd"])
)
@settings(max_examples=500)
def test_every_cut_gives_every_line_once(path: Path, content: bytes, step: int, kind: str) -> None:
    tasks = list(Feed([source_of(path, content, kind)], "text", step))
    blocks = [lines_of(task) for task in tasks]
    assert b"".join(blocks) == content
    assert [task.start for task in tasks] == [0, *(task.stop for task in tasks[:-1])]
    assert [task.index for task in tasks] == list(range(len(tasks)))
    assert [task.last for task in tasks] == [False] * (len(tasks) - 1) + [True]
    for task, block in zip(tasks, blocks, strict=True):
        assert content[task.start : task.stop] == block
        assert block.endswith(b"\n") or task.last
    assert tasks[-1].hash == xxhash.xxh3_128_hexdigest(path.read_bytes())


@given(content=CONTENTS, step=st.integers(1, 50), other_step=st.integers(1, 50), data=st.data())
def test_a_feed_goes_on_from_any_task(
    path: Path, content: bytes, step: int, other_step: int, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["plain", "gzip", "zstd"]))
    source = source_of(path, content, kind)
    tasks = list(Feed([source], "text", step))
    done = data.draw(st.sampled_from(tasks))
    if done.last:
        return
    rest = Feed([source], "text", other_step, (0, done.stop), done.hash)
    assert b"".join(map(lines_of, rest)) == content[done.stop :]
    changed = data.draw(st.integers(0, done.stop - 1))
    altered = content[:changed] + bytes([content[changed] ^ 1]) + content[changed + 1 :]
    for other in (altered, content[:changed], b"more" + content):
        with pytest.raises(InputChangedError, match="changed after a part of it was read"):
            list(Feed([source_of(path, other, kind)], "text", other_step, (0, done.stop), done.hash))


@given(content=CONTENTS, step=st.integers(1, 50), data=st.data())
def test_lines_that_changed_since_they_were_hashed_are_not_read(
    path: Path, content: bytes, step: int, data: st.DataObject
) -> None:
    for task in Feed([source_of(path, content, "plain")], "text", step):
        if task.stop > task.start:
            at = data.draw(st.integers(task.start, task.stop - 1))
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(CptError, match="changed while it was being read"):
                lines_of(task)
            path.write_bytes(content)


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20),
    ascii_only=st.booleans(),
    step=st.integers(1, 64),
)
def test_tasks_parsed_apart_give_all_texts_in_order(path: Path, texts: list[str], ascii_only: bool, step: int) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()
    found = []
    for task in Feed([source_of(path, content, "plain")], "text", step):
        part = texts_of(task, "text")
        assert not part.reading.problems
        found += part.texts
    assert found == texts


@pytest.mark.parametrize(
    ("line", "reason", "at"),
    [
        (b'{"text": "a", nonsense}', "not_json", 14),
        (b'{"text": "a"', "not_json", 12),
        (b"[1, 2]", "not_an_object", 0),
        (b'"text"', "not_an_object", 0),
        (b'{"txt": "a"}', "missing_key", 0),
        (b'{"text": null}', "not_a_string", 0),
        (b'{"text": ["a"]}', "not_a_string", 0),
        (b'{"text": "a\xff"}', "invalid_utf8", 11),
        (b'{"text": "\xed\xa0\x80"}', "invalid_utf8", 10),
        (b'{"text": "\\ud800"}', "lone_surrogate", 0),
        (b"[" * 100_000, "not_json", 0),
        (b'{"n": ' + b"1" * 5000 + b"}", "not_json", 0),
    ],
)
def test_a_bad_line_is_located(line: bytes, reason: str, at: int) -> None:
    before = b'{"text": "first"}\n'
    found = parse_lines(before + line + b"\n" + before, 1000, TextUnder("text"))
    assert found.texts == ["first", "first"]
    [problem] = found.reading.problems
    assert (problem.reason, problem.line, problem.offset) == (reason, 1, 1000 + len(before) + at)
    assert (problem.nbytes, found.reading.nbytes) == (len(line) + 1, 2 * len(before) + len(line) + 1)


def test_what_pythons_json_reads_counts() -> None:
    block = b'\xef\xbb\xbf{"text": "bom"}\r\n\n  \n{"text": "nan", "score": NaN}\n{"text": "last"}'
    found = parse_lines(block, 0, TextUnder("text"))
    assert found.texts == ["bom", "nan", "last"]
    reading = found.reading
    assert (reading.lines, reading.blank, reading.texts, reading.problems) == (5, 2, 3, [])
