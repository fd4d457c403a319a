"""download() against a local HTTP server that speaks the hub's endpoints, and misbehaves on request."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nemo_cpt.checkpoint import download, import_hf
from nemo_cpt.corpus import fetch
from nemo_cpt.errors import CptError
from tests.support import small_models as models
from tests.support.servers import serving

REPO, COMMIT, TOKEN = "someone/small-llama", "a" * 40, "hf_secretsecretsecretsecretsecret"


class _Hub(ThreadingHTTPServer):
    """Serves a folder as the repository `REPO`; `trouble` maps a file's name (or "api") to what goes wrong.

    Other revisions are other folders, by their commit; `names` are branches and tags.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.commits = {COMMIT: folder}
        self.names = {"main": COMMIT}
        self.trouble: dict[str, str] = {}
        self.fetched: list[str] = []
        self.meanwhile: Callable[[], object] | None = None  # done once, when the first file is asked for
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
            self._file(*path.split("/", 5)[4:], body)
        else:
            self._error(404, "RepoNotFound")

    def _api(self, path: str) -> None:
        if trouble := self.server.trouble.get("api"):
            self._error(int(trouble.partition(" ")[0]), trouble.partition(" ")[2])
        elif not path.startswith(f"/api/models/{REPO}/revision/"):
            self._error(404, "RepoNotFound")
        elif (commit := self._commit(path.rpartition("/")[2])) is None:
            self._error(404, "RevisionNotFound")
        else:
            found = {"id": REPO, "sha": commit, "siblings": self._siblings(self.server.commits[commit])}
            self._send(200, json.dumps(found).encode())

    def _commit(self, revision: str) -> str | None:
        commit = self.server.names.get(revision, revision)
        return commit if commit in self.server.commits else None

    def _siblings(self, folder: Path) -> list[dict[str, object]]:
        found = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
                entry: dict[str, object] = {
                    "rfilename": str(path.relative_to(folder)), "size": len(data), "blobId": blob,
                }  # fmt: skip
                if path.suffix == ".safetensors":
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                found.append(entry)
        return found

    def _file(self, commit: str, name: str, body: bool) -> None:
        data = (self.server.commits[commit] / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
        trouble = self.server.trouble.get(name, "")
        if trouble[:3].isdigit():
            self._error(int(trouble.partition(" ")[0]), trouble.partition(" ")[2])
            return
        if trouble == "flipped" and body:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if body and (meanwhile := self.server.meanwhile):
            self.server.meanwhile = None
            meanwhile()
        if body:
            self.server.fetched.append(name)
            if wanted := self.headers.get("Range"):
                self.server.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
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
        # A code is one word; other errors have the hub's words alone.
        headers = {"X-Error-Message": code} | ({} if " " in code else {"X-Error-Code": code})
        self._send(status, b"{}", headers if code else {})

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
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # other tests go offline in this process
    with serving(_Hub(folder)) as server:
        yield server


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
    model = tmp_path / "model"
    arrived = [path for path in model.rglob("*") if path.is_file() and path.name != ".download.json"]
    assert sorted(str(path.relative_to(model)) for path in arrived) == sorted(report.files)
    assert "additional_chat_templates/tool_use.jinja" in report.files
    assert report.bytes_total == sum(path.stat().st_size for path in arrived)
    import_hf(tmp_path / "model", tmp_path / "nemo")
    assert not (tmp_path / "nemo" / "hf" / ".download.json").exists()

    hub.fetched.clear()
    assert download(REPO, tmp_path / "model", endpoint=hub.url).already_there
    shutil.rmtree(model / "additional_chat_templates")  # as an older version left it
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


FINE_GRAINED = "Please enable access to public gated repositories in your fine-grained token settings"


def test_a_token_that_lacks_a_permission(hub: _Hub, tmp_path: Path) -> None:
    """The listing is open to anybody; the hub alone knows what of the token is to be changed."""
    hub.trouble = {SHARD: f"403 {FINE_GRAINED}"}
    _refused(hub, tmp_path / "model", rf"refuses access .*HTTP 403: {FINE_GRAINED}\)")


def test_a_token_that_is_none_any_more(hub: _Hub, tmp_path: Path) -> None:
    hub.trouble["api"] = "401 Invalid credentials in Authorization header"
    message = _refused(hub, tmp_path / "model", "does not take the token that was sent .*it expired, was revoked")
    assert "conditions" not in message


def test_what_the_environment_says_wrong(hub: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ended in a traceback of a library's."""
    with monkeypatch.context() as wrong:
        wrong.setattr("huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER", True)
        _refused(hub, tmp_path / "model", "HF_HUB_ENABLE_HF_TRANSFER is set, and hf_transfer is not installed")
    with monkeypatch.context() as wrong:
        wrong.setenv("HF_TOKEN", "hf_鍵")
        _refused(hub, tmp_path / "model", "HF_TOKEN holds letters that no token has")
    with monkeypatch.context() as wrong:
        wrong.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nowhere.pem"))
        for fetches in (
            lambda: download(REPO, tmp_path / "model", endpoint="https://127.0.0.1:1"),
            lambda: fetch("https://127.0.0.1:1/a.jsonl", tmp_path / "corpus"),
        ):
            with pytest.raises(CptError, match=r"nowhere\.pem: REQUESTS_CA_BUNDLE, or CURL_CA_BUNDLE, names a file"):
                fetches()
    with monkeypatch.context() as wrong:
        wrong.setenv("HTTP_PROXY", "nonsense://x")
        wrong.setenv("NO_PROXY", "")
        _refused(hub, tmp_path / "model", r"could not be reached .*Check the proxy \(HTTPS_PROXY")


def test_an_endpoint_that_is_no_address(hub: _Hub, tmp_path: Path) -> None:
    for endpoint in ("hub.example", "127.0.0.1:8000"):
        with pytest.raises(CptError, match=r"is no address: HF_ENDPOINT .* begins with https://"):
            download(REPO, tmp_path / "model", endpoint=endpoint)


def test_a_second_download_to_one_folder(hub: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first is under way it is refused, and takes nothing from it; whoever waited finds what has come."""
    monkeypatch.setattr("nemo_cpt.checkpoint.downloading._PATIENCE_SECONDS", 0)
    hub.meanwhile = lambda: _refused(hub, tmp_path / "model", "Another process is writing this output")
    download(REPO, tmp_path / "model", endpoint=hub.url)
    models.assert_same_weights(hub.folder, tmp_path / "model")
    assert [path.name for path in tmp_path.glob("model*")] == ["model"]


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


def test_ctrl_c_ends_it_at_once_and_it_goes_on(hub: _Hub, tmp_path: Path) -> None:
    """While a file is on its way, for which the hub's client would wait."""
    asked, released = threading.Event(), threading.Event()
    hub.meanwhile = lambda: (asked.set(), released.wait(300))
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "nemo_cpt.cli",
        "download",
        REPO,
        str(tmp_path / "model"),
        "--json",
    ]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert asked.wait(120)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
            released.set()
    assert (process.returncode, output) == (130, "")
    assert "nemo-cpt: stopped; what arrived is kept, and the same command goes on" in errors
    assert not (tmp_path / "model").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["already_there"] is False, done.stderr
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
    with pytest.raises(CptError, match=rf"exists and is not {REPO} at main \({COMMIT}\): .* is missing"):
        download(REPO, tmp_path / "model", endpoint=hub.url)


# --- other revisions ---

OTHER, RENAMED = "b" * 40, "c" * 40


@pytest.fixture
def revisions(hub: _Hub, tmp_path: Path) -> _Hub:
    """`step2000`: other weights of the same size; `readme`: other words about the same model."""
    other = shutil.copytree(hub.folder, tmp_path / "step2000")
    shard = other / SHARD
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    readme = shutil.copytree(hub.folder, tmp_path / "readme")
    (readme / "README.md").write_text("# Words\n")
    hub.commits |= {OTHER: other, RENAMED: readme}
    hub.names |= {"step2000": OTHER, "readme": RENAMED}
    return hub


def test_another_revision_is_not_reported_as_fetched(revisions: _Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(REPO, model, endpoint=revisions.url)
    with pytest.raises(CptError, match=rf"holds {REPO} at {COMMIT} and is not {REPO} at step2000 \({OTHER}\): {SHARD}"):
        download(REPO, model, "step2000", endpoint=revisions.url)
    models.assert_same_weights(revisions.folder, model)
    report = download(REPO, tmp_path / "two", "step2000", endpoint=revisions.url)
    assert (report.commit, report.already_there) == (OTHER, False)
    models.assert_same_weights(tmp_path / "step2000", tmp_path / "two")


def test_a_small_file_of_another_revision_is_seen(revisions: _Hub, tmp_path: Path) -> None:
    download(REPO, tmp_path / "model", endpoint=revisions.url)
    config = tmp_path / "step2000" / "config.json"
    config.write_text(config.read_text().replace("500000.0", "700000.0"))  # the same size
    shutil.copy(revisions.folder / SHARD, tmp_path / "step2000" / SHARD)
    with pytest.raises(CptError, match=r"config\.json has other bytes"):
        download(REPO, tmp_path / "model", "step2000", endpoint=revisions.url)


def test_a_branch_that_moved_on(revisions: _Hub, tmp_path: Path) -> None:
    """The model is the same where only words about it changed; the commit is the new one's then."""
    download(REPO, tmp_path / "model", endpoint=revisions.url)
    revisions.names["main"] = RENAMED
    revisions.fetched.clear()
    report = download(REPO, tmp_path / "model", endpoint=revisions.url)
    assert (report.commit, report.already_there, revisions.fetched) == (RENAMED, True, [])
    record = json.loads((tmp_path / "model" / ".download.json").read_text())
    assert record["commit"] == RENAMED

    (revisions.commits[RENAMED] / "LICENSE").write_text("other terms")
    with pytest.raises(CptError, match=rf"at {RENAMED} and is not .*: LICENSE is missing or has another size"):
        download(REPO, tmp_path / "model", endpoint=revisions.url)


@pytest.mark.parametrize("same", [True, False])
def test_a_folder_that_another_tool_made(same: bool, revisions: _Hub, tmp_path: Path) -> None:
    download(REPO, tmp_path / "model", "main" if same else "step2000", endpoint=revisions.url)
    (tmp_path / "model" / ".download.json").unlink()
    revisions.fetched.clear()
    if same:
        assert download(REPO, tmp_path / "model", endpoint=revisions.url).already_there
        assert (tmp_path / "model" / ".download.json").is_file()
    else:
        with pytest.raises(CptError, match=rf"exists and is not {REPO} at main .*: {SHARD} has other bytes"):
            download(REPO, tmp_path / "model", endpoint=revisions.url)
    assert revisions.fetched == []


def test_what_is_left_of_another_revision_is_not_mixed_in(revisions: _Hub, tmp_path: Path) -> None:
    """The first breaks off; the second has one file of weights where the first had four."""
    from safetensors.torch import save_file

    revisions.trouble[SHARD] = "dropped"
    with pytest.raises(CptError, match="arrived truncated"):
        download(REPO, tmp_path / "model", endpoint=revisions.url)
    partial = tmp_path / "model.download"
    assert (partial / "model.safetensors.index.json").is_file()
    revisions.trouble.clear()
    other = tmp_path / "step2000"
    every = models.tensors(other)
    for path in other.glob("model*.safetensors*"):
        path.unlink()
    save_file(every, other / "model.safetensors", metadata={"format": "pt"})
    download(REPO, tmp_path / "model", "step2000", endpoint=revisions.url)
    assert [path.name for path in (tmp_path / "model").glob("model*")] == ["model.safetensors"]
    models.assert_same_weights(other, tmp_path / "model")


def test_weights_that_are_not_the_hubs(hub: _Hub, tmp_path: Path) -> None:
    download(REPO, tmp_path / "model", endpoint=hub.url)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(CptError, match=r"model\.safetensors is not of it"):
        download(REPO, tmp_path / "model", endpoint=hub.url)


def test_bytes_that_changed_after_the_download(hub: _Hub, tmp_path: Path) -> None:
    model = tmp_path / "model"
    download(REPO, model, endpoint=hub.url)
    data = bytearray((model / SHARD).read_bytes())
    data[-2] ^= 1
    (model / SHARD).write_bytes(data)
    with pytest.raises(CptError, match=rf"{SHARD} is not what was downloaded"):
        import_hf(model, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()
