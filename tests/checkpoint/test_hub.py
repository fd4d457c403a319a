"""download() against a local HTTP server that speaks the hub's endpoints, and misbehaves on request."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import small_models as models

from nemo_cpt.checkpoint import download, import_hf
from nemo_cpt.errors import CptError

REPO, COMMIT, TOKEN = "someone/small-llama", "a" * 40, "hf_secretsecretsecretsecretsecret"


class _Hub(ThreadingHTTPServer):
    """Serves a folder as the repository `REPO`; `trouble` maps a file's name (or "api") to what goes wrong."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.trouble: dict[str, str] = {}
        self.fetched: list[str] = []
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: _Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            self._api(path)
        elif path.startswith(f"/{REPO}/resolve/"):
            self._file(path.split("/", 5)[5], body)
        else:
            self._error(404, "RepoNotFound")

    def _api(self, path: str) -> None:
        if trouble := self.server.trouble.get("api"):
            self._error(int(trouble.partition(" ")[0]), trouble.partition(" ")[2])
        elif not path.startswith(f"/api/models/{REPO}/revision/"):
            self._error(404, "RepoNotFound")
        elif path.rpartition("/")[2] not in ("main", COMMIT):
            self._error(404, "RevisionNotFound")
        else:
            self._send(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": self._siblings()}).encode())

    def _siblings(self) -> list[dict[str, object]]:
        found = []
        for path in sorted(self.server.folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                entry: dict[str, object] = {"rfilename": str(path.relative_to(self.server.folder)), "size": len(data)}
                if path.suffix == ".safetensors":
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                found.append(entry)
        return found

    def _file(self, name: str, body: bool) -> None:
        data = (self.server.folder / name).read_bytes()
        trouble = self.server.trouble.get(name, "")
        if trouble[:3].isdigit():
            self._error(int(trouble.partition(" ")[0]), trouble.partition(" ")[2])
            return
        if trouble == "flipped" and body:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if body:
            self.server.fetched.append(name)
            if wanted := self.headers.get("Range"):
                self.server.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{hashlib.sha1(name.encode()).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if trouble in ("dropped", "truncated") and body and start == 0:
            self._broken(data, headers, trouble)
            return
        self._send(206 if start else 200, data[start:], headers, body)

    def _broken(self, data: bytes, headers: dict[str, str], trouble: str) -> None:
        """Half of the file: with the whole length announced (a dropped line), or with half of it (a truncated file)."""
        half = data[: len(data) // 2]
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data if trouble == "dropped" else half)))
        self.end_headers()
        self.wfile.write(half)
        self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    folder = models.make("llama31", tmp_path / "served")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "LICENSE").write_text("terms")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # other tests go offline in this process
    server = _Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


SHARD = "model-00002-of-00004.safetensors"


def _refused(hub: _Hub, dest: Path, message: str, repo_id: str = REPO, revision: str = "main") -> str:
    with pytest.raises(CptError, match=message) as caught:
        download(repo_id, dest, revision, endpoint=hub.url)
    assert not dest.exists()
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_a_model_arrives_without_what_nothing_uses(hub: _Hub, tmp_path: Path) -> None:
    report = download(REPO, tmp_path / "model", endpoint=hub.url)
    models.assert_same_weights(hub.folder, tmp_path / "model")
    assert report.commit == COMMIT
    assert set(report.left_out) == {"original/consolidated.00.pth", "pytorch_model.bin"}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(report.files)
    assert report.bytes_total == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    import_hf(tmp_path / "model", tmp_path / "nemo")

    hub.fetched.clear()
    assert download(REPO, tmp_path / "model", endpoint=hub.url).already_there
    assert hub.fetched == []


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo")])
def test_gated(hub: _Hub, tmp_path: Path, status: int, code: str) -> None:
    hub.trouble["api"] = f"{status} {code}"
    message = _refused(hub, tmp_path / "model", "is gated")
    assert f"{hub.url}/{REPO}" in message
    assert "HF_TOKEN" in message


def test_gated_files_behind_an_open_listing(hub: _Hub, tmp_path: Path) -> None:
    """What the hub does: a gated repository lists its files to anybody."""
    hub.trouble = {path.name: "403 GatedRepo" for path in hub.folder.iterdir()}
    _refused(hub, tmp_path / "model", "is gated")


def test_forbidden_without_a_reason(hub: _Hub, tmp_path: Path) -> None:
    hub.trouble["api"] = "403"
    _refused(hub, tmp_path / "model", r"refuses access .*HTTP 403.*HF_TOKEN")


def test_wrong_name_and_wrong_revision(hub: _Hub, tmp_path: Path) -> None:
    _refused(hub, tmp_path / "model", "There is no model someone/else", repo_id="someone/else")
    _refused(hub, tmp_path / "model", "no revision 'v9'", revision="v9")
    _refused(hub, tmp_path / "model", "is no repository's name", repo_id="a/b/c")


def test_no_network(hub: _Hub, tmp_path: Path) -> None:
    hub.shutdown()
    hub.server_close()
    _refused(hub, tmp_path / "model", "could not be reached")


def test_a_server_in_trouble(hub: _Hub, tmp_path: Path) -> None:
    hub.trouble["api"] = "500"
    _refused(hub, tmp_path / "model", "HTTP 500")


@pytest.mark.parametrize("trouble", ["dropped", "truncated"])
def test_a_broken_transfer_leaves_nothing_finished_and_resumes(hub: _Hub, tmp_path: Path, trouble: str) -> None:
    hub.trouble[SHARD] = trouble
    _refused(hub, tmp_path / "model", "arrived truncated")
    hub.trouble.clear()
    hub.fetched.clear()
    download(REPO, tmp_path / "model", endpoint=hub.url)
    assert hub.fetched == [SHARD]
    half = (hub.folder / SHARD).stat().st_size // 2
    assert hub.ranges == [f"bytes={half}-"]
    models.assert_same_weights(hub.folder, tmp_path / "model")


def test_a_flipped_bit_is_found(hub: _Hub, tmp_path: Path) -> None:
    hub.trouble[SHARD] = "flipped"
    _refused(hub, tmp_path / "model", rf"{SHARD} arrived damaged: .*SHA-256")
    hub.trouble.clear()
    download(REPO, tmp_path / "model", endpoint=hub.url)
    models.assert_same_weights(hub.folder, tmp_path / "model")


def test_no_space(hub: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(total=10**9, used=10**9 - 1000, free=1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _refused(hub, tmp_path / "model", r"needs 0\.00 GB more, .* has 0\.00 GB free")
    assert hub.fetched == []


def test_pickles_only(hub: _Hub, tmp_path: Path) -> None:
    for path in hub.folder.glob("*.safetensors"):
        path.unlink()
    _refused(hub, tmp_path / "model", "no safetensors")


def test_an_existing_folder_of_something_else(hub: _Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(CptError, match="exists and is not someone/small-llama"):
        download(REPO, tmp_path / "model", endpoint=hub.url)
