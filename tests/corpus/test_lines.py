"""The range cutter and the line parser."""

import io
import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.corpus.lines import cut_ranges, parse_lines, read_range

CONTENTS = st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"\n\n", b"{}", "語".encode(), b"x" * 40]), max_size=60).map(
    b"".join
)


class NamedBytes(io.BytesIO):
    name = "corpus.jsonl"


@given(content=CONTENTS | st.binary(max_size=300), step=st.integers(1, 50))
@settings(max_examples=500)
def test_every_cut_gives_every_line_once(content: bytes, step: int) -> None:
    file = NamedBytes(content)
    blocks = [read_range(file, start, stop) for start, stop in cut_ranges(0, len(content), step)]
    assert b"".join(block for _, block in blocks) == content
    for offset, block in blocks:
        if block:
            assert content[offset : offset + len(block)] == block
            assert offset == 0 or content[offset - 1 : offset] == b"\n"
            assert block.endswith(b"\n") or offset + len(block) == len(content)


@given(content=CONTENTS, cuts=st.sets(st.integers(1, 200)))
def test_uneven_cuts_give_every_line_once(content: bytes, cuts: set[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    pairs = [(a, b) for a, b in pairwise(edges) if a < b]
    assert b"".join(read_range(NamedBytes(content), a, b)[1] for a, b in pairs) == content


@given(start=st.integers(0, 10_000), size=st.integers(0, 10_000), step=st.integers(1, 3_000))
def test_ranges_cover_the_rest_of_the_file(start: int, size: int, step: int) -> None:
    covered = [byte for pair in cut_ranges(start, size, step) for byte in pair]
    assert covered[2::2] == covered[1:-1:2]
    assert (covered[0], covered[-1]) == (start, size) if start < size else not covered


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20),
    ascii_only=st.booleans(),
    step=st.integers(1, 64),
)
def test_ranges_parsed_apart_give_all_texts_in_order(texts: list[str], ascii_only: bool, step: int) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()
    file = NamedBytes(content)
    found = []
    for start, stop in cut_ranges(0, len(content), step):
        offset, block = read_range(file, start, stop)
        part = parse_lines(block, offset, "text")
        assert not part.problems
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
    found = parse_lines(before + line + b"\n" + before, 1000, "text")
    assert found.texts == ["first", "first"]
    [problem] = found.problems
    assert (problem.reason, problem.line, problem.offset) == (reason, 1, 1000 + len(before) + at)


def test_what_pythons_json_reads_counts() -> None:
    block = b'\xef\xbb\xbf{"text": "bom"}\r\n\n  \n{"text": "nan", "score": NaN}\n{"text": "last"}'
    found = parse_lines(block, 0, "text")
    assert found.texts == ["bom", "nan", "last"]
    assert (found.lines, found.blank, found.problems) == (5, 2, [])
