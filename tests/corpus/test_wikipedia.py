"""Dumps of Wikipedia: from a server in the layout of dumps.wikimedia.org, or from a file, to JSON lines."""

import bz2
import json
import os
import random
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_cpt.corpus import fetch
from nemo_cpt.corpus.fetching.wikimedia import MIRROR, is_dump
from nemo_cpt.corpus.reading.sources import list_sources
from nemo_cpt.corpus.wikipedia import bzip2_blocks, extraction
from nemo_cpt.corpus.wikipedia.bzip2_blocks import Block, ends_whole, find_blocks, unpack
from nemo_cpt.corpus.wikipedia.extraction import extract
from nemo_cpt.errors import CptError
from tests.corpus.test_corpus_cli import nemo_cpt
from tests.support.crashes import killed_at, lines_of
from tests.support.servers import serving
from tests.support.wikipedia_dump import WikiPage, publish, write_dump

CODE = Path(extraction.__file__).parent
DATE, OLD, COMING = "20260901", "20260801", "20261001"
NAME = f"jawiki-{DATE}-pages-articles-multistream"
JA = [
    WikiPage("&", "'''アンパサンド'''（{{lang-en|ampersand}}、'''&amp;'''）は、[[並立助詞|助詞]]「と」。<ref>注</ref>"),
    WikiPage("言葉", "#REDIRECT [[言語]]", redirect="言語"),
    WikiPage("言語", "'''言語'''（げんご）。\n== 定義 ==\n* [[文字]]\n{{Reflist}}\n[[Category:言語]]"),
    WikiPage("ノート:言語", "議論", 1),
    WikiPage("利用者:甲", "自己紹介", 2),
    WikiPage("Template:国旗", "{{{1}}}", 10),
    WikiPage("京都 (曖昧さ回避)", "'''京都'''\n* [[京都市]]\n{{aimai}}"),
    WikiPage('A"B<C>&D', "題に &lt;記号&gt; と <page> がある。"),
    WikiPage("言語.json", '{"a": 1}', model="json"),
    WikiPage("空", "{{Stub}}"),
    WikiPage("最後", "'''最後'''の文。"),
]  # fmt: skip
ZH = [
    WikiPage("北京", "'''北京'''，-{zh-hans:中国首都;zh-hant:中國首都}-。[[File:X.jpg|thumb|图]]"),
    WikiPage("消歧", "{{disambig}}"),
]
EN = [
    WikiPage("Kyoto", "'''Kyoto''' ({{Nihongo|Kyoto|京都|Kyōto}}) is a [[city]].\n{| class=x\n| y\n|}"),
    WikiPage("K", "{{hndis}}"),
]


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges and lists of what is in it; can break off."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.asked: list[str] = []
        self.break_after: list[int] = []  # bytes after which the next dumps break off

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.root / self.path.strip("/")
        self.server.asked.append(path.name)
        if not path.exists():
            return self.send_error(404)
        if path.is_dir():
            body = "".join(f'<a href="{each.name}/">{each.name}/</a>\n' for each in sorted(path.iterdir())).encode()
            return self._answer(200, body, "text/html")
        body, etag = path.read_bytes(), f'"{path.stat().st_size}"'
        asked = self.headers.get("Range") if self.headers.get("If-Range") == etag else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        place = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if asked else {}
        self._answer(206 if asked else 200, body[start:], "application/octet-stream", {"ETag": etag, **place})

    def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        breaks = self.path.endswith(".xml.bz2") and self.server.break_after
        self.wfile.write(body[: self.server.break_after.pop(0)] if breaks else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("dumps")
    publish(root, "jawiki", OLD, JA[:3], "ja")
    publish(root, "jawiki", DATE, JA, "ja")
    publish(root, "jawiki", COMING, JA, "ja", status="in-progress")
    publish(root, "zhwiki", DATE, ZH, "zh")
    publish(root, "enwiki", DATE, EN, "en")
    (root / "jawiki" / "latest").mkdir()
    for path in (root / "jawiki" / DATE).iterdir():
        if path.name != "dumpstatus.json":  # which the folder of the latest ones does not have
            content = path.read_bytes()
            (root / "jawiki" / "latest" / path.name.replace(DATE, "latest")).write_bytes(content)
    with serving(Server(root)) as running:
        monkeypatch.setenv(MIRROR, running.url)
        yield running


def get(corpus: object, folder: Path, **options: Any) -> list[Any]:
    return fetch(str(corpus), folder, quiet=True, patience=0.01, **options)


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_dump_by_language_and_date(tmp_path: Path, server: Server) -> None:
    dump, text = get(f"wikipedia:ja@{DATE}", tmp_path)
    assert (dump.status, text.status, Path(text.path).name) == ("fetched", "extracted", f"{NAME}.jsonl")
    rows = rows_of(text.path)
    assert rows[0] == {
        "title": "&",
        "id": 1,
        "revision": 100_000_001,
        "url": "https://ja.wikipedia.org/wiki/%26",
        "license": "CC BY-SA 4.0",
        "text": "アンパサンド（ampersand、&）は、助詞「と」。",
    }
    assert {row["title"]: row["text"] for row in rows[1:]} == {
        "言語": "言語（げんご）。\n\n定義\n\n- 文字",
        'A"B<C>&D': "題に <記号> と <page> がある。",
        "最後": "最後の文。",
    }
    counts = {"redirects": 1, "other namespaces": 3, "disambiguations": 1, "not wikitext": 1, "empty": 1}
    assert text.pages == {"articles": 4, **counts}
    manifest = json.loads((tmp_path / f"{NAME}.wikipedia.json").read_text())
    assert (manifest["license"], manifest["wiki"], manifest["pages"]) == ("CC BY-SA 4.0", "jawiki", text.pages)
    assert manifest["dump"]["url"] == f"{server.url}/jawiki/{DATE}/{NAME}.xml.bz2"
    assert (manifest["sha256"], manifest["dump"]["sha256"]) == (text.sha256, dump.sha256)
    # The folder, as it is, is an input of `prepare`: of its files, the text alone.
    assert [Path(source.path).name for source in list_sources(str(tmp_path))] == [f"{NAME}.jsonl"]


def test_what_is_there_is_left_alone_and_its_dump_may_be_deleted(tmp_path: Path, server: Server) -> None:
    dump, text = get(f"wikipedia:ja@{DATE}", tmp_path)
    server.asked.clear()
    assert [file.status for file in get(f"wikipedia:ja@{DATE}", tmp_path)] == ["unchanged", "unchanged"]
    Path(dump.path).unlink()
    [again] = get(f"wikipedia:ja@{DATE}", tmp_path)
    assert (again.status, again.sha256, again.pages) == ("unchanged", text.sha256, text.pages)
    assert not server.asked


def test_the_latest_is_the_last_one_that_is_finished(tmp_path: Path, server: Server) -> None:
    _, text = get("wikipedia:ja@latest", tmp_path / "a")
    assert Path(text.path).name == f"{NAME}.jsonl"
    assert get("wikipedia:ja", tmp_path / "a")[1].status == "unchanged"
    # Wikimedia's own link to it, with its list of checksums under the names with the date
    _, linked = get(f"{server.url}/jawiki/latest/jawiki-latest-pages-articles-multistream.xml.bz2", tmp_path / "b")
    assert linked.sha256 == text.sha256


@pytest.mark.parametrize(
    ("language", "title", "text"),
    [("zh", "北京", "北京，中国首都。"), ("en", "Kyoto", "Kyoto (Kyoto (京都, Kyōto)) is a city.")],
)
def test_other_languages(tmp_path: Path, server: Server, language: str, title: str, text: str) -> None:
    _, made = get(
        f"{server.url}/{language}wiki/{DATE}/{language}wiki-{DATE}-pages-articles-multistream.xml.bz2", tmp_path
    )
    [row] = rows_of(made.path)
    assert (row["title"], row["text"], made.pages["disambiguations"]) == (title, text, 1)


def test_a_broken_download_goes_on(tmp_path: Path, server: Server) -> None:
    server.break_after = [500, 300]
    dump, text = get(f"wikipedia:ja@{DATE}", tmp_path)
    assert (dump.status, len(rows_of(text.path))) == ("resumed", 4)


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, server: Server) -> None:
    path = server.root / "jawiki" / DATE / f"{NAME}.xml.bz2"
    path.write_bytes(write_dump(tmp_path / "x.xml.bz2", JA[:2], "ja").read_bytes())
    for corpus in (f"wikipedia:ja@{DATE}", f"{server.url}/jawiki/{DATE}/{NAME}.xml.bz2"):
        with pytest.raises(CptError, match="SHA-1"):
            get(corpus, tmp_path / "data")
        assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("wikipedia:ja@20260701", f"There are: {COMING}, {DATE}, {OLD}."),
        (f"wikipedia:ja@{COMING}", "no finished dump"),
        ("wikipedia:xx@latest", "has no xxwiki"),
        ("wikipedia:xx@20260901", "has no xxwiki"),
        ("wikipedia:ja@yesterday", "names no dump"),
        ("wikipedia:", "names no dump"),
        ("none.xml.bz2", "There is no file none.xml.bz2"),
    ],
)
def test_a_name_that_is_none_leaves_nothing(tmp_path: Path, server: Server, corpus: str, message: str) -> None:
    done = nemo_cpt("fetch", corpus, "-o", tmp_path / "data")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "data").exists()


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0x55 for byte in content[middle : middle + 40]) + content[middle + 40 :]


BAD = {
    "cut": (lambda good: good[:-30], "is cut short"),
    "cut between two streams": (lambda good: good[: good.rindex(b"BZh9")], "without </mediawiki>"),
    "damaged": (damaged, "is damaged"),
    "no bzip2": (lambda good: b"PK\x03\x04" + good, "is no bzip2 file"),
    "XML": (bz2.decompress, "bzip2 -k packs it"),
    "no dump": (lambda good: bz2.compress(b"Some text.\n" * 1000), "holds no MediaWiki export"),
    "empty": (lambda good: b"", "is no bzip2 file"),
    "no articles": (lambda good: good, "holds no article, of 30 redirects"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_whole_dump_leaves_nothing(tmp_path: Path, kind: str) -> None:
    change, message = BAD[kind]
    noise = random.Random(1)
    pages = [
        WikiPage(f"P{n}", noise.randbytes(3000).hex(), redirect="x" if kind == "no articles" else "") for n in range(30)
    ]
    path = write_dump(tmp_path / "x.xml.bz2", pages, streams_of=10)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CptError, match=message):
        get(path, tmp_path / "data", workers=1)
    assert not (tmp_path / "data").exists()


def test_text_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    path = write_dump(tmp_path / "x.xml.bz2", EN)
    [text] = get(path, tmp_path)
    write_dump(path, EN * 2)
    with pytest.raises(CptError, match=r"is the text of another x\.xml\.bz2"):
        get(path, tmp_path)
    assert len(rows_of(text.path)) == 1
    Path(text.path).write_bytes(Path(text.path).read_bytes().replace(b"Kyoto", b"Osaka"))
    with pytest.raises(CptError, match=r"is not what x\.wikipedia\.json says"):
        get(path, tmp_path)
    (tmp_path / "x.wikipedia.json").unlink()
    with pytest.raises(CptError, match="no dump was its source"):
        get(path, tmp_path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 4 MB of articles, one of them longer than a block, in streams and in a single one."""
    folder = tmp_path_factory.mktemp("large")
    noise = random.Random(5)
    pages = [
        WikiPage(f"P{n}", f"'''P{n}''' [[a|b]] " + noise.randbytes(noise.randrange(9000)).hex()) for n in range(300)
    ]
    pages[150] = WikiPage("Long", noise.randbytes(1_200_000).hex())
    write_dump(folder / "many.xml.bz2", pages, streams_of=20)
    write_dump(folder / "one.xml.bz2", pages, streams_of=0)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, large: Path) -> bytes:
    """The text of an undisturbed run."""
    [text] = get(large / "many.xml.bz2", tmp_path_factory.mktemp("expected"), workers=2)
    assert [row["title"] for row in rows_of(text.path)] == [f"P{n}" if n != 150 else "Long" for n in range(300)]
    return Path(text.path).read_bytes()


@pytest.mark.parametrize(("name", "workers"), [("many", 1), ("one", 2), ("one", 1)])
def test_neither_streams_nor_workers_matter(
    tmp_path: Path, large: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, name: str, workers: int
) -> None:
    monkeypatch.setattr(extraction, "_TASK", 1)  # a page lies in several tasks, and a task in one page
    [text] = get(large / f"{name}.xml.bz2", tmp_path, workers=workers)
    assert Path(text.path).read_bytes() == expected


@pytest.mark.parametrize("name", ["many", "one"])
def test_killed_anywhere_it_goes_on(
    tmp_path: Path, large: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(extraction, "_TASK", 1)
    monkeypatch.setattr(extraction, "_JOURNAL_BYTES", 1)

    def run(folder: Path) -> None:
        extract(large / f"{name}.xml.bz2", folder, workers=2, quiet=True)

    lines = lines_of(lambda: run(tmp_path / "counted"), CODE)
    output = tmp_path / "data" / f"{name}.jsonl"
    unfinished = 0
    for kill in range(8):
        killed_at(lines.count * (2 * kill + 1) // 16, lambda: run(tmp_path / "data"), CODE)
        unfinished += (tmp_path / "data" / f"{name}.jsonl.journal").exists()
        assert not output.exists() or output.read_bytes() == expected
    assert unfinished
    text = extract(large / f"{name}.xml.bz2", tmp_path / "data", workers=2, quiet=True)
    assert output.read_bytes() == expected
    assert text.pages == {"articles": 300}
    assert left_in(tmp_path / "data") == [f"{name}.jsonl", f"{name}.wikipedia.json"]


def test_an_unfinished_run_of_another_dump_is_not_continued(
    tmp_path: Path, large: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "_TASK", 1)
    monkeypatch.setattr(extraction, "_JOURNAL_BYTES", 1)
    dump = tmp_path / "x.xml.bz2"
    dump.write_bytes((large / "one.xml.bz2").read_bytes())
    lines = lines_of(lambda: get(dump, tmp_path / "counted"), CODE)
    assert killed_at(lines.count // 2, lambda: get(dump, tmp_path / "data"), CODE)[0]
    assert (tmp_path / "data" / "x.jsonl.journal").exists()
    dump.write_bytes((large / "many.xml.bz2").read_bytes())
    # The killed one's workers may still hold the lock, until the kernel has ended them too.
    [text] = fetch(str(dump), tmp_path / "data", quiet=True, patience=60)
    assert (text.status, Path(text.path).read_bytes()) == ("extracted", expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=3000), st.integers(1, 9), st.integers(1, 200)), min_size=1, max_size=4))
def test_any_bzip2_file_is_its_blocks(
    tmp_path_factory: pytest.TempPathFactory, streams: list[tuple[bytes, int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bz2"
    contents = [content * times for content, _, times in streams]
    path.write_bytes(b"".join(bz2.compress(each, streams[n][1]) for n, each in enumerate(contents)))
    assert ends_whole(path)
    blocks = list(find_blocks(path))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert unpack(descriptor, blocks) == b"".join(contents)
        # From any block on, as a run goes on that was killed
        for number, block in enumerate(blocks):
            assert list(find_blocks(path, block.start)) == blocks[number:]
    finally:
        os.close(descriptor)


def test_blocks_are_found_where_the_file_is_read_in_pieces(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(find_blocks(large / "one.xml.bz2"))
    assert len(expected) > 3
    for size in (1_000, 7_919):
        monkeypatch.setattr(bzip2_blocks, "_PIECE", size)
        assert list(find_blocks(large / "one.xml.bz2")) == expected


def test_packed_data_that_looks_like_a_mark_is_no_border(large: Path) -> None:
    with (large / "one.xml.bz2").open("rb") as file:
        first, second, *_ = find_blocks(large / "one.xml.bz2")
        content = unpack(file.fileno(), [first, second])
        middle = first.start + 12_345
        as_block = [Block(first.start, middle), Block(middle, first.stop), second]
        as_end = [Block(first.start, middle), second]
        assert unpack(file.fileno(), as_block) == unpack(file.fileno(), as_end) == content


@pytest.mark.parametrize(
    ("corpus", "it_is"),
    [
        ("https://dumps.wikimedia.org/enwiki/20260901/enwiki-20260901-pages-articles1.xml-p1p41242.bz2", True),
        ("https://dumps.wikimedia.org/jawiki/latest/jawiki-latest-pages-articles.xml.bz2", True),
        (
            "https://dumps.wikimedia.org/other/simplewiki/2026-09-01/xml/bzip2/simplewiki-2026-09-01-p1p1252.xml.bz2",
            True,
        ),
        ("https://dumps.wikimedia.org/jawiki/20260901/jawiki-20260901-pages-articles-multistream-index.txt.bz2", False),
        ("https://e.org/corpus.jsonl.gz", False),
        ("hf:wikimedia/wikipedia", False),
        ("data/x.xml.bz2", True),
    ],
)
def test_a_dump_is_known_by_its_name(corpus: str, it_is: bool) -> None:
    assert is_dump(corpus) == it_is
