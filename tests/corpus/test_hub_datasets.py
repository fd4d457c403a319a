"""Datasets of the Hugging Face hub, from a server on this machine that speaks the hub's endpoints."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from nemo_cpt.corpus import fetch
from nemo_cpt.corpus.fetching.download import CHECKSUMS, URLS
from nemo_cpt.errors import CptError
from tests.support.corpus_helpers import same_files, write_jsonl, write_reference
from tests.support.servers import serving

NAME, TOKEN = "someone/news", "hf_secretsecretsecretsecretsecret"


class Hub(ThreadingHTTPServer):
    """Serves a folder as the dataset NAME; `trouble` is what its API answers instead: a status and the hub's code."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.trouble: tuple[int, str] | None = None
        self.broken = ""  # a file whose next answer breaks off half way
        self.flipped = ""  # one that is sent with a bit flipped
        self.fetched: list[str] = []

    @property
    def environment(self) -> dict[str, str]:
        home = self.folder.parent / "home"
        url = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}

    @property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps(self.entries()).encode()).hexdigest()

    def entries(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.rglob("*.*")):
            data = path.read_bytes()
            name, oid = str(path.relative_to(self.folder)), hashlib.sha1(data).hexdigest()
            entry = {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": oid}
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "sha256": hashlib.sha256(data).hexdigest()}
            found.append(entry | {"lfs": lfs | {"size": len(data), "pointerSize": 130}})
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self.send_json([entry for entry in self.server.entries() if entry["path"] in wanted])

    def answer(self) -> None:
        path = urlsplit(self.path).path
        api, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
        if self.server.trouble and path.startswith("/api/"):
            self.send(self.server.trouble[0], b"{}", {"X-Error-Code": self.server.trouble[1]})
        elif path.startswith(f"{api}/tree/"):
            folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
            self.send_json([entry for entry in self.server.entries() if entry["path"].startswith(folder)])
        elif path == api or path.startswith(f"{api}/revision/"):
            self.send_json({"id": NAME, "sha": self.server.commit, "siblings": self.server.entries()})
        elif path.startswith(files) and (self.server.folder / path[len(files) + 41 :]).is_file():
            self.send_file(path[len(files) + 41 :])  # after the commit
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound" if NAME in path else "RepoNotFound"})

    def send_file(self, name: str) -> None:
        data = (self.server.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.server.commit}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.command == "GET":
            self.server.fetched.append(name)
        if self.command == "GET" and self.server.flipped == name:
            data = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
        if self.command == "GET" and self.server.broken == name:
            self.server.broken = ""
            self.close_connection = True
            return self.send(200, data, headers, len(data) // 2)
        return self.send(206 if start else 200, data[start:], headers)

    def send_json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str], part: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:part])


@pytest.fixture
def hub(tmp_path: Path, texts: list[str]) -> Iterator[Hub]:
    folder = tmp_path / "served"
    (folder / "data").mkdir(parents=True)
    write_jsonl(folder / "data" / "train-0.jsonl", texts[:20])
    write_jsonl(folder / "data" / "train-1.jsonl", texts[20:40])
    write_jsonl(folder / "data" / "test-0.jsonl", texts[40:50])
    with serving(Hub(folder)) as running:
        yield running


def command(hub: Hub, *arguments: object) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "nemo_cpt.cli", *map(str, arguments)],
        env=kept | hub.environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    return done


def test_a_dataset_is_fetched_once_and_checked(hub: Hub, tmp_path: Path, texts: list[str], small: Path) -> None:
    out = tmp_path / "out"
    hub.broken = "data/train-1.jsonl"
    broken = command(hub, "fetch", f"hf:{NAME}", "-o", out)
    assert (broken.returncode, (out / CHECKSUMS).exists()) == (2, False)
    assert "A rerun goes on" in broken.stderr
    done = command(hub, "fetch", f"hf:{NAME}", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)["files"]
    assert [Path(file["path"]).name for file in files] == ["test-0.jsonl", "train-0.jsonl", "train-1.jsonl"]
    assert {file["status"] for file in files} == {"fetched"}
    for path in (hub.folder / "data").iterdir():
        assert (out / "data" / path.name).read_bytes() == path.read_bytes()
    assert subprocess.run(["sha256sum", "-c", CHECKSUMS], cwd=out, capture_output=True).returncode == 0
    fetched = len(hub.fetched)
    again = json.loads(command(hub, "fetch", f"hf:{NAME}", "-o", out, "--json").stdout)["files"]
    assert {file["status"] for file in again} == {"unchanged"}
    assert len(hub.fetched) == fetched


def test_a_dataset_replaces_no_file_of_another_origin(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data" / "train-0.jsonl").write_text("mine")
    refused = command(hub, "fetch", f"hf:{NAME}", "-o", out)
    assert (refused.returncode, "train-0.jsonl exists and is not in SHA256SUMS" in refused.stderr) == (2, True)
    assert (out / "data" / "train-0.jsonl").read_text() == "mine"
    (out / "data" / "train-0.jsonl").unlink()
    assert command(hub, "fetch", f"hf:{NAME}", "-o", out).returncode == 0
    (out / URLS).write_text((out / URLS).read_text().replace(NAME, "someone/else"))
    refused = command(hub, "fetch", f"hf:{NAME}", "-o", out)
    assert "came from hf:someone/else, not from hf:someone/news" in refused.stderr


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub as this process knows it."""
    url = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_bytes_that_are_not_the_hubs_are_not_taken(here: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    here.flipped = "data/train-1.jsonl"
    with pytest.raises(CptError, match=r"train-1\.jsonl arrived damaged"):
        fetch(f"hf:{NAME}", out)
    assert not (out / CHECKSUMS).exists()
    here.flipped = ""
    fetch(f"hf:{NAME}", out)
    assert (out / "data/train-1.jsonl").read_bytes() == (here.folder / "data/train-1.jsonl").read_bytes()


@pytest.mark.parametrize("seen", [True, False])
def test_a_file_that_changed_here_is_neither_called_right_nor_replaced(here: Hub, tmp_path: Path, seen: bool) -> None:
    """`seen`: its time changed too, by which the hub's client goes."""
    out = tmp_path / "out"
    fetch(f"hf:{NAME}", out)
    noted, mine = (out / CHECKSUMS).read_text(), out / "data/train-1.jsonl"
    times = mine.stat()
    mine.write_text(changed := mine.read_text().upper())
    if not seen:
        os.utime(mine, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CptError, match=r"train-1\.jsonl is not what SHA256SUMS says"):
        fetch(f"hf:{NAME}", out)
    assert (mine.read_text(), (out / CHECKSUMS).read_text()) == (changed, noted)


def test_two_revisions_do_not_end_up_in_one_folder(here: Hub, tmp_path: Path, texts: list[str]) -> None:
    out = tmp_path / "out"
    fetch(f"hf:{NAME}", out)
    (here.folder / "README.md").write_text("Words about it change, and the data are the same.")
    assert {each.status for each in fetch(f"hf:{NAME}", out)} == {"fetched", "unchanged"}
    write_jsonl(here.folder / "data/train-1.jsonl", texts[20:41])
    with pytest.raises(CptError, match=r"train-1\.jsonl came from an earlier revision"):
        fetch(f"hf:{NAME}", out)
    (here.folder / "data/train-1.jsonl").rename(here.folder / "data/train-1-of-2.jsonl")  # the shards were cut anew
    with pytest.raises(CptError, match=r"holds data/train-1\.jsonl, which hf:someone/news had at an earlier revision"):
        fetch(f"hf:{NAME}", out)
    assert sorted(path.name for path in (out / "data").iterdir()) == ["test-0.jsonl", "train-0.jsonl", "train-1.jsonl"]


def test_a_dataset_is_prepared_by_name(hub: Hub, tmp_path: Path, texts: list[str], small: Path) -> None:
    for number, (name, of) in enumerate({f"hf:{NAME}": texts[:40], f"hf:{NAME}:test": texts[40:50]}.items()):
        done = command(hub, "prepare", name, "-o", tmp_path / f"ds{number}", "-t", small, "--workers", 2)
        assert done.returncode == 0, done.stderr
        expected = write_reference(tmp_path / f"expected{number}", of, small)
        assert same_files(f"{tmp_path}/ds{number}_text_document", expected)
    assert "unchanged" in command(hub, "prepare", f"hf:{NAME}", "-o", tmp_path / "ds0", "-t", small).stdout
    write_jsonl(hub.folder / "data" / "train-1.jsonl", texts[20:41])
    assert (
        "content of hf:someone/news changed"
        in command(hub, "prepare", f"hf:{NAME}", "-o", tmp_path / "ds0", "-t", small).stderr
    )


@pytest.mark.parametrize(
    ("trouble", "name", "message"),
    [
        (
            (401, "GatedRepo"),
            NAME,
            "is gated. Open .*/datasets/someone/news, accept its conditions, then set .*HF_TOKEN",
        ),
        ((403, "GatedRepo"), NAME, "is gated"),
        (None, "someone/nothing", "no dataset someone/nothing"),
        ((503, ""), NAME, "503"),
    ],
)
def test_refusals_say_what_to_do(
    hub: Hub, tmp_path: Path, trouble: tuple[int, str] | None, name: str, message: str
) -> None:
    hub.trouble = trouble
    done = command(hub, "fetch", f"hf:{name}", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "out" / CHECKSUMS).exists()
