"""Downloads from a real server on this machine: resumed, verified, refused."""

import json
import re
import ssl
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import nemo_cpt.corpus
from nemo_cpt.corpus import fetch
from nemo_cpt.corpus.atomic_files import locked
from nemo_cpt.corpus.fetching.download import CHECKSUMS, LOCK, URLS
from nemo_cpt.corpus.fetching.known_corpora import CORPORA
from nemo_cpt.errors import CptError
from tests.support.crashes import killed_at, lines_of
from tests.support.servers import serving

CONTENT = bytes(range(256)) * 20_000


class Server(ThreadingHTTPServer):
    """Serves CONTENT with ranges; can break off, forget ranges, change the file, or fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = CONTENT, '"one"'
        self.break_after: list[int] = []  # bytes after which the next answers break off
        self.ranges, self.status, self.kind = True, 200, "application/gzip"
        self.sizes = ("Content-Length", "Content-Range")  # the headers that say how much there is
        self.asked: list[str] = []
        self.location = ""  # where it sends everybody

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data/corpus.jsonl.gz?ref_type=heads"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.headers.get("Range", "all"))
        if server.location:
            self.send_response(302)
            self.send_header("Location", server.location)
            return self.end_headers()
        if server.status != 200:
            return self.send_error(server.status)
        asked = self.headers.get("Range") if server.ranges and self.headers.get("If-Range") == server.etag else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        size = len(server.content)
        if start >= size:
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if asked else 200)
        if "Content-Length" in server.sizes:
            self.send_header("Content-Length", str(len(body)))
        if "Content-Range" in server.sizes and asked:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Type", server.kind)
        self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[: server.break_after.pop(0)] if server.break_after else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        yield running


def get(server: Server, folder: Path) -> tuple[str, Path]:
    [fetched] = fetch(server.url, folder, quiet=True, patience=0.01)
    path = Path(fetched.path)
    assert path.read_bytes() == server.content
    assert (path.name, fetched.size) == ("corpus.jsonl.gz", len(server.content))
    assert sorted(p.name for p in folder.iterdir()) == [CHECKSUMS, URLS, "corpus.jsonl.gz"]
    return fetched.status, path


def test_a_file_is_fetched_once_and_its_checksum_kept(tmp_path: Path, server: Server) -> None:
    status, path = get(server, tmp_path)
    assert status == "fetched"
    assert subprocess.run(["sha256sum", "-c", CHECKSUMS], cwd=tmp_path, capture_output=True).returncode == 0
    assert get(server, tmp_path)[0] == "unchanged"
    assert server.asked == ["all"]
    path.write_bytes(b"damaged")
    with pytest.raises(CptError, match="not what SHA256SUMS says"):
        get(server, tmp_path)


def test_broken_connections_are_continued(tmp_path: Path, server: Server) -> None:
    server.break_after = [1_000_000, 50_000, 0]
    assert get(server, tmp_path)[0] == "resumed"
    assert server.asked == ["all", "bytes=1000000-", "bytes=1050000-", "bytes=1050000-"]


def test_a_later_run_continues(tmp_path: Path, server: Server) -> None:
    server.break_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(CptError, match="the same command continues it"):
        fetch(server.url, tmp_path, quiet=True, patience=0.01)
    assert (tmp_path / "corpus.jsonl.gz.part").stat().st_size == 300_000
    assert get(server, tmp_path)[0] == "resumed"
    assert server.asked[-1] == "bytes=300000-"


def test_the_size_of_a_continued_file_is_taken_from_its_range(tmp_path: Path, server: Server) -> None:
    server.break_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(CptError):
        fetch(server.url, tmp_path, quiet=True, patience=0.01)
    server.sizes = ("Content-Range",)
    server.break_after = [50_000]  # no Content-Length tells that this answer is cut short
    assert get(server, tmp_path)[0] == "resumed"
    assert server.asked[-2:] == ["bytes=300000-", "bytes=350000-"]


def test_a_part_without_a_size_is_not_continued(tmp_path: Path, server: Server) -> None:
    server.break_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(CptError):
        fetch(server.url, tmp_path, quiet=True, patience=0.01)
    server.sizes, server.break_after = (), [50_000]
    with pytest.raises(CptError, match="does not say how long"):
        fetch(server.url, tmp_path, quiet=True, patience=0.01)
    assert server.asked[-2:] == ["bytes=300000-", "all"]


def test_a_part_longer_than_the_file_is_begun_anew(tmp_path: Path, server: Server) -> None:
    server.break_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(CptError):
        fetch(server.url, tmp_path, quiet=True, patience=0.01)
    (tmp_path / "corpus.jsonl.gz.part").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path)[0] == "fetched"


def test_a_run_killed_before_it_named_its_file_is_completed(tmp_path: Path, server: Server) -> None:
    path = get(server, tmp_path)[1]
    path.rename(f"{path}.part")
    state = {"url": server.url, "total": len(CONTENT), "validator": server.etag}
    (tmp_path / "corpus.jsonl.gz.part.json").write_text(json.dumps(state))
    get(server, tmp_path)
    assert server.asked == ["all", f"bytes={len(CONTENT)}-"]


def test_a_file_of_another_address_is_not_taken_for_this_one(tmp_path: Path, server: Server) -> None:
    path = get(server, tmp_path)[1]
    other = server.url.replace("/data/", "/other/")
    server.content = CONTENT[::-1]
    with pytest.raises(CptError, match=r"gz came from .*/data/.*, not from .*/other/.*take another folder"):
        fetch(other, tmp_path, quiet=True)
    assert path.read_bytes() == CONTENT
    path.unlink()
    [fetched] = fetch(other, tmp_path, quiet=True)
    assert (fetched.status, path.read_bytes()) == ("fetched", CONTENT[::-1])
    assert "/other/" in (tmp_path / URLS).read_text()
    assert fetch(other, tmp_path, quiet=True)[0].status == "unchanged"


def test_a_file_that_was_not_fetched_is_not_replaced(tmp_path: Path, server: Server) -> None:
    (tmp_path / "corpus.jsonl.gz").write_bytes(b"mine")
    with pytest.raises(CptError, match=r"corpus.jsonl.gz exists and is not in SHA256SUMS.*Move it away"):
        fetch(server.url, tmp_path, quiet=True)
    assert (tmp_path / "corpus.jsonl.gz").read_bytes() == b"mine"
    assert server.asked == []


def test_a_folder_of_an_older_version_stays_usable(tmp_path: Path, server: Server) -> None:
    get(server, tmp_path)
    (tmp_path / URLS).unlink()
    assert fetch(server.url, tmp_path, quiet=True)[0].status == "unchanged"


SIGNED = {
    "password": lambda url: url.replace("http://", "http://user:geheim@"),
    "Amazon": lambda url: f"{url}&X-Amz-Credential=geheim&X-Amz-Date=20261126&X-Amz-Signature=geheim",
    "Azure": lambda url: f"{url}&sv=2024-11-04&se=2026-11-27&sr=b&sp=r&sig=geheim%2B",
    "a long value": lambda url: f"{url}&k=geheimgeheimgeheim",
    "fragment": lambda url: f"{url}#access_token=geheim",
}


@pytest.mark.parametrize("kind", SIGNED)
def test_no_credentials_reach_the_disk_a_message_or_a_report(tmp_path: Path, server: Server, kind: str) -> None:
    url = SIGNED[kind](server.url)

    def kept() -> str:
        return "".join(path.read_text("utf-8", "replace") for path in tmp_path.iterdir())

    for status, message in ((404, "answers 404"), (503, "Cannot fetch")):
        server.status = status
        with pytest.raises(CptError, match=message) as refused:
            fetch(url, tmp_path, quiet=True, patience=0.001)
        assert "geheim" not in str(refused.value) + kept()
        assert "geheim" not in str(refused.value.__cause__)  # which a traceback would show
    server.status, server.break_after = 200, [300_000, 0, 0, 0, 0]
    with pytest.raises(CptError, match="the same command continues it") as broken:
        fetch(url, tmp_path, quiet=True, patience=0.001)
    assert (tmp_path / "corpus.jsonl.gz.part.json").exists()
    assert "geheim" not in str(broken.value) + kept()
    [fetched] = fetch(url, tmp_path, quiet=True)
    assert fetched.status == "resumed"
    assert "geheim" not in fetched.url + kept()
    assert fetch(url, tmp_path, quiet=True)[0].status == "unchanged"


def test_a_server_that_is_not_there_is_named_without_credentials(tmp_path: Path, server: Server) -> None:
    server.server_close()
    url = f"{server.url}&sig=geheim".replace("http://", "http://user:geheim@")
    shown = re.escape(f"{server.url}&sig=*")
    with pytest.raises(CptError, match=f"Cannot fetch {shown}: .*Connection refused") as error:
        fetch(url, tmp_path, quiet=True, patience=0.001)
    assert "geheim" not in str(error.value)


def test_what_an_older_version_noted_is_cleaned_and_still_known(tmp_path: Path, server: Server) -> None:
    get(server, tmp_path)
    url = f"{server.url}&X-Amz-Signature=geheim"
    (tmp_path / URLS).write_text(f"{url}  corpus.jsonl.gz\n")
    assert fetch(f"{server.url}&X-Amz-Signature=renewed", tmp_path, quiet=True)[0].status == "unchanged"
    fetch(url.replace("corpus.", "more."), tmp_path, quiet=True)
    assert "geheim" not in (tmp_path / URLS).read_text()


def test_a_renewed_signature_continues_the_download(tmp_path: Path, server: Server) -> None:
    server.break_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(CptError, match="continues it"):
        fetch(f"{server.url}&X-Amz-Date=1&X-Amz-Signature=one", tmp_path, quiet=True, patience=0.001)
    [fetched] = fetch(f"{server.url}&X-Amz-Date=2&X-Amz-Signature=two", tmp_path, quiet=True)
    assert fetched.status == "resumed"


def test_twenty_kills_leave_nothing_that_the_next_run_does_not_use_or_remove(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "killed"

    def run(target: Path = folder) -> None:
        fetch(server.url, target, quiet=True, patience=0.001)

    code, kills = Path(nemo_cpt.corpus.__file__).parent, 0
    lines = lines_of(lambda: run(tmp_path / "counted"), code)
    for point in range(20):
        server.break_after = [(point + 1) * 200_000]
        kills += killed_at(1 + lines.count * point // 20, run, code)[0]
        if point % 4 == 3:
            get(server, folder)
            (folder / "corpus.jsonl.gz").unlink()
    assert kills >= 15
    server.break_after = []
    assert get(server, folder)[0] == "fetched"
    (folder / ".fetch.lock").touch()  # of a killed run
    path = folder / "corpus.jsonl.gz"
    path.unlink()
    get(server, folder)


def test_two_fetches_into_one_folder_do_not_meet(tmp_path: Path, server: Server) -> None:
    with locked(tmp_path / LOCK, 0), pytest.raises(CptError, match="Another process is writing this output"):
        fetch(server.url, tmp_path, quiet=True, patience=0)
    assert server.asked == []
    assert get(server, tmp_path)[0] == "fetched"


def test_the_names_of_the_notes_are_refused(tmp_path: Path, server: Server) -> None:
    with pytest.raises(CptError, match="SHA256SUMS is where fetch keeps its own notes"):
        fetch(server.url.replace("corpus.jsonl.gz", CHECKSUMS), tmp_path, quiet=True)


@pytest.mark.parametrize("output", ["file", "file/x"])
def test_a_file_in_the_way_of_the_folder(tmp_path: Path, server: Server, output: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CptError, match=rf"Cannot make the folder .*{output}: (File exists|Not a directory)"):
        fetch(server.url, tmp_path / output, quiet=True)


@pytest.mark.parametrize("change", ["etag", "no ranges"])
def test_a_part_of_another_file_is_not_continued(tmp_path: Path, server: Server, change: str) -> None:
    server.break_after = [300_000, 0, 0, 0, 0]
    with pytest.raises(CptError):
        fetch(server.url, tmp_path, quiet=True, patience=0.01)
    if change == "etag":
        server.etag, server.content = '"two"', CONTENT[::-1]
    else:
        server.ranges = False
    assert get(server, tmp_path)[0] == "fetched"


def test_refusals(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(CptError, match="answers 404"):
        fetch(server.url, tmp_path, quiet=True)
    server.status = 503
    with pytest.raises(CptError, match="503"):
        fetch(server.url, tmp_path, quiet=True, patience=0.01)
    assert len(server.asked) == 1 + 5
    server.status, server.kind = 200, "text/html; charset=utf-8"
    with pytest.raises(CptError, match="a web page, not with data"):
        fetch(server.url, tmp_path, quiet=True)
    assert not list(tmp_path.glob("corpus*"))


def encrypt(server: Server, tmp_path: Path) -> tuple[str, Path]:
    """Let a server speak TLS; return its address and its certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files, *subject], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server.url.replace("http:", "https:"), certificate


def test_certificates_are_verified(tmp_path: Path, server: Server) -> None:
    secure, certificate = encrypt(server, tmp_path)
    with pytest.raises(CptError, match=r"certificate of 127.0.0.1 cannot be verified"):
        fetch(secure, tmp_path / "out", quiet=True)
    assert server.asked == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        [fetched] = fetch(secure, tmp_path / "out", quiet=True)
    assert Path(fetched.path).read_bytes() == CONTENT


def test_an_encrypted_address_leads_to_none_that_is_not(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    secure, certificate = encrypt(server, tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with serving(Server()) as other:
        server.location = other.url
        with pytest.raises(CptError, match=r"https://.* leads on to http://127.0.0.1.*, which is not encrypted"):
            fetch(secure, tmp_path / "out", quiet=True)
        assert (len(server.asked), other.asked) == (1, [])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("corpus", "message"), [("nix", "no corpus 'nix'.*llm-jp/ja_wiki"), ("http://example.com/a", "Use https")]
)
def test_unknown_corpora(tmp_path: Path, corpus: str, message: str) -> None:
    with pytest.raises(CptError, match=message):
        fetch(corpus, tmp_path)


def test_the_catalogue_has_the_files_of_the_japanese_wikipedia() -> None:
    urls = CORPORA["llm-jp/ja_wiki"].urls
    assert len(urls) == len(set(urls)) == 15
    assert all(url.startswith("https://") for url in urls)
