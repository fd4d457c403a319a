"""What servers and proxies do wrong: either the very file arrives, or an error with its reason, never a mixture."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nemo_cpt.corpus import fetch
from nemo_cpt.corpus.fetching.download import ATTEMPTS, CHECKSUMS, URLS
from nemo_cpt.errors import CptError
from tests.support.servers import serving

OLD, NEW = (random.Random(seed).randbytes(3_000_000) for seed in (1, 2))
LONGER = NEW + NEW[:1000]
HAVE = 1_000_000
NAME = "corpus.jsonl.gz"


@dataclass(frozen=True)
class Answer:
    """One answer: `body` with `headers`, and what the connection does to it.

    Attributes:
        begin: Where the body begins in its file; gives a Content-Range unless `headers` has one.
        cut: Bytes after which the connection closes.
        length: The Content-Length, "" for none; the body's by default.
        chunked: Send it in chunks.
    """

    body: bytes = OLD
    status: int = 200
    begin: int = 0
    cut: int | None = None
    length: str | None = None
    chunked: bool = False
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"old"', "Last-Modified": YESTERDAY})


YESTERDAY, TODAY = "Wed, 25 Nov 2026 08:00:00 GMT", "Thu, 26 Nov 2026 08:00:00 GMT"
OF_NEW = {"ETag": '"new"', "Last-Modified": TODAY}
WHOLE, CUT = Answer(), Answer(cut=HAVE)
NEW_WHOLE = Answer(NEW, headers=OF_NEW)
REST = Answer(OLD[HAVE:], 206, HAVE)


def part(of: bytes, begin: int = HAVE, **headers: str) -> Answer:
    """A part that says that it is of the file with `headers` ("" for none), "old" by default."""
    given = Answer().headers | {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(of[begin:], 206, begin, headers=given)


class Server(ThreadingHTTPServer):
    """Gives one answer after the other, the last one for ever, and notes what it was asked."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), Handler)
        self.answers: list[Answer] = []
        self.asked: list[str] = []
        self.url = f"http://{address}:{self.server_port}/{NAME}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range", "all"))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        self.close_connection = True
        self.send_response(answer.status)
        size = answer.begin + len(answer.body)
        headers = {"Content-Range": f"bytes {answer.begin}-{size - 1}/{size}"} if answer.status == 206 else {}
        if answer.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif answer.length != "":
            headers["Content-Length"] = answer.length or str(len(answer.body))
        for name, value in ({"Connection": "close"} | headers | answer.headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        body = answer.body[: answer.cut]
        if not answer.chunked:
            self.wfile.write(body)
        for place in range(0, len(body), 100_000) if answer.chunked else ():
            piece = body[place : place + 100_000]
            self.wfile.write(b"%x\r\n" % len(piece) + piece + b"\r\n")
        if answer.chunked and answer.cut is None:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        yield running


ARRIVES = {
    "whole": ([WHOLE], "fetched", OLD),
    "whole, in chunks": ([Answer(chunked=True)], "fetched", OLD),
    "cut, then the rest": ([CUT, REST], "resumed", OLD),
    "cut in its chunks, then the rest": ([Answer(chunked=True, cut=HAVE), REST], "resumed", OLD),
    "cut, the rest cut, then the rest": (
        [CUT, Answer(OLD[HAVE:], 206, HAVE, cut=500_000), part(OLD, HAVE + 500_000)],
        "resumed",
        OLD,
    ),
    "cut, the rest in chunks": ([CUT, Answer(OLD[HAVE:], 206, HAVE, chunked=True)], "resumed", OLD),
    "cut, ranges are ignored": ([CUT, WHOLE], "fetched", OLD),
    "cut, another file since": ([CUT, NEW_WHOLE], "fetched", NEW),
    "cut, If-Range is ignored: a part of another file": ([CUT, part(NEW, **OF_NEW), NEW_WHOLE], "fetched", NEW),
    "cut, a part of a file of another size": ([CUT, part(LONGER), Answer(LONGER)], "fetched", LONGER),
    "cut, a part of another time": ([CUT, part(NEW, Last_Modified=TODAY), NEW_WHOLE], "fetched", NEW),
    "cut, a part of no known file": ([CUT, part(NEW, ETag="", Last_Modified=""), NEW_WHOLE], "fetched", NEW),
    "cut, a part without a place, from byte 0": (
        [CUT, Answer(OLD, 206, headers=WHOLE.headers | {"Content-Range": ""}), WHOLE],
        "fetched",
        OLD,
    ),
    "cut, a part that begins too early": ([CUT, part(OLD, HAVE - 1000), WHOLE], "fetched", OLD),
    "cut, a part that begins too late": ([CUT, part(OLD, HAVE + 1000), WHOLE], "fetched", OLD),
    "cut, a part of a file of unknown size": (
        [CUT, Answer(OLD[HAVE:], 206, headers=WHOLE.headers | {"Content-Range": f"bytes {HAVE}-2999999/*"}), WHOLE],
        "fetched",
        OLD,
    ),
    "cut, a part whose length is not its range's": (
        [CUT, Answer(OLD[HAVE:], 206, HAVE, length="1999"), WHOLE],
        "fetched",
        OLD,
    ),
    "cut, several ranges at once": (
        [CUT, part(OLD, Content_Range="", Content_Type="multipart/byteranges; boundary=x"), WHOLE],
        "fetched",
        OLD,
    ),
    "cut, no such range any more": ([CUT, Answer(b"", 416), NEW_WHOLE], "fetched", NEW),
    "cut, nothing to recognise it by": ([Answer(cut=HAVE, headers={}), WHOLE], "fetched", OLD),
    "cut, only a weak validator": ([Answer(cut=HAVE, headers={"ETag": 'W/"old"'}), WHOLE], "fetched", OLD),
    "busy, then there": ([Answer(b"", 503), Answer(b"", 429), WHOLE], "fetched", OLD),
    "a packed file that is called an encoding": ([Answer(headers={"Content-Encoding": "x-gzip"})], "fetched", OLD),
    # No client can know better: the connection is over where the length says
    "a length that is too small": ([Answer(length="1500000")], "fetched", OLD[:1_500_000]),
}


@pytest.mark.parametrize("behaviour", ARRIVES)
def test_the_very_file_arrives(tmp_path: Path, server: Server, behaviour: str) -> None:
    answers, status, content = ARRIVES[behaviour]
    server.answers = list(answers)
    [fetched] = fetch(server.url, tmp_path, quiet=True, patience=0.001)
    assert (tmp_path / NAME).read_bytes() == content
    assert fetched.status == status
    assert len(server.asked) == len(answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKSUMS, URLS, NAME]


REFUSED = {
    "no length, closed half way": (Answer(length="", cut=HAVE), 1, "does not say how long"),
    "no length": (Answer(length=""), 1, "does not say how long"),
    "a length that is no number": (Answer(length="many"), 1, "does not say how long"),
    "an empty file": (Answer(b""), 1, "is an empty file"),
    "an empty file in chunks": (Answer(b"", chunked=True), 1, "is an empty file"),
    "a length that is too large": (Answer(length="4000000", headers={}), ATTEMPTS, "3000000 of 4000000 bytes arrived"),
    "chunks that never end": (Answer(chunked=True, cut=HAVE, headers={}), ATTEMPTS, "Cannot fetch"),
    "parts nobody asked for": (Answer(OLD, 206), ATTEMPTS, "part of another file"),
    "a web page": (Answer(headers={"Content-Type": "text/html"}), 1, "a web page, not with data"),
    "gone": (Answer(b"", 404), 1, "answers 404"),
    "never there": (Answer(b"", 503), ATTEMPTS, "answers 503"),
    "an encoding nobody asked for": (Answer(headers={"Content-Encoding": "br"}), 1, "is sent compressed"),
    "round in circles": (Answer(b"", 302, headers={"Location": f"/{NAME}"}), 31, "30 redirects"),
    "to another protocol": (Answer(b"", 302, headers={"Location": "file:///etc/passwd"}), 1, "cannot be fetched"),
}


@pytest.mark.parametrize("behaviour", REFUSED)
def test_it_is_refused_with_its_reason(tmp_path: Path, server: Server, behaviour: str) -> None:
    answer, asked, message = REFUSED[behaviour]
    server.answers = [answer]
    with pytest.raises(CptError, match=message):
        fetch(server.url, tmp_path, quiet=True, patience=0.001)
    assert len(server.asked) == asked
    kept = {f"{NAME}.part", f"{NAME}.part.json"} if asked == ATTEMPTS else set()  # what the next run may go on with
    assert {path.name for path in tmp_path.iterdir()} <= kept


def test_what_is_refused_is_not_continued_as_another_file(tmp_path: Path, server: Server) -> None:
    server.answers = [CUT, Answer(b"", 404)]
    with pytest.raises(CptError, match="404"):
        fetch(server.url, tmp_path, quiet=True, patience=0.001)
    server.answers = [part(NEW, **OF_NEW), NEW_WHOLE]
    assert fetch(server.url, tmp_path, quiet=True, patience=0.001)[0].status == "fetched"
    assert (tmp_path / NAME).read_bytes() == NEW
    assert server.asked == ["all", f"bytes={HAVE}-", f"bytes={HAVE}-", "all"]


def test_without_encryption_a_redirect_leads_no_further_than_this_machine(tmp_path: Path, server: Server) -> None:
    with serving(Server("127.0.0.2")) as other:
        other.answers = [WHOLE]
        server.answers = [Answer(b"", 302, headers={"Location": f"{other.url}?X-Amz-Signature=geheim"})]
        with pytest.raises(CptError, match=r"leads on to http://127.0.0.2.*=\*, which is not encrypted") as error:
            fetch(server.url, tmp_path, quiet=True)
        assert "geheim" not in str(error.value)
        assert other.asked == []
    server.answers = [Answer(b"", 302, headers={"Location": f"http://localhost:{server.server_port}/elsewhere"}), WHOLE]
    assert fetch(server.url, tmp_path, quiet=True)[0].status == "fetched"


def test_leftovers_of_a_killed_run_go(tmp_path: Path, server: Server) -> None:
    server.answers = [WHOLE]
    fetch(server.url, tmp_path, quiet=True)
    for name in (f"{NAME}.part.json", f"{NAME}.part.json.part", f"{CHECKSUMS}.part", f"{URLS}.part"):
        (tmp_path / name).write_text(json.dumps({"url": server.url}))
    assert fetch(server.url, tmp_path, quiet=True)[0].status == "unchanged"
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKSUMS, URLS, NAME]
