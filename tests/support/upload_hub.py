"""The hub's upload protocol on this machine: who is there, repositories, large files, commits."""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from tests.support.servers import serving

TOKEN, USER = "hf_writewritewritewritewritewrite", "me"


class UploadHub(ThreadingHTTPServer):
    """Holds repositories as their files' bytes by name.

    `cards` are the metadata of other people's models. `hold_after` large files have arrived, further ones wait for
    `release`, and `holding` is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.puts: Counter[str] = Counter()
        self.hold_after: int | None = None
        self.holding, self.release = threading.Event(), threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    with serving(UploadHub()) as server:
        try:
            yield server
        finally:
            server.release.set()


class _Handler(BaseHTTPRequestHandler):
    server: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            return self._json({"name": USER}) if self._known() else self._json({}, 401)
        name = path.removeprefix("/api/models/").partition("/revision/")[0]
        if name in self.server.cards:
            return self._json({"id": name, "sha": "b" * 40, "siblings": [], "cardData": self.server.cards[name]})
        if name not in self.server.repositories:
            return self._json({}, 404, {"X-Error-Code": "RepoNotFound"})
        files = self.server.repositories[name]
        card = files.get("README.md", b"").decode().split("---\n")
        found = {"id": name, "sha": "c" * 40, "private": self.server.private[name]}
        found["siblings"] = [{"rfilename": each} for each in files]
        return self._json(found | ({"cardData": yaml.safe_load(card[1])} if len(card) > 2 else {}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if not self._known():
            self._json({}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            broken = "license: 7" in json.loads(body)["content"]
            errors = [{"message": '"license" must be a string'}] if broken else []
            self._json({"errors": errors, "warnings": []}, 400 if broken else 200)
        elif path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            self._json({"transfer": "basic", "objects": [self._wanted(each) for each in objects]})
        elif not path.startswith(f"/api/models/{USER}/"):
            self._json({}, 403)
        elif "/preupload/" in path:
            files = self.server.repositories[path.split("/preupload/")[0].removeprefix("/api/models/")]
            self._json({"files": [self._mode(each["path"], files) for each in json.loads(body)["files"]]})
        else:
            self._commit(path.split("/commit/")[0].removeprefix("/api/models/"), body)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            held = self.server.hold_after is not None and len(self.server.large) >= self.server.hold_after
            if not held:
                name = hashlib.sha256(data).hexdigest()
                self.server.puts[name] += 1
                self.server.large[name] = data
        if held:
            self.server.holding.set()
            self.server.release.wait()
            self.close_connection = True
            return
        self._json({})

    def _known(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or USER
        if owner != USER:
            return self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
        name = f"{owner}/{wanted['name']}"
        self.server.repositories[name], self.server.private[name] = {".gitattributes": b""}, wanted["private"]
        return self._json({"url": f"{self.server.url}/{name}"})

    def _mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        large = path.endswith(".safetensors")
        found = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in files:
            data = files[path]
            git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            found["oid"] = hashlib.sha256(data).hexdigest() if large else git
        return found

    def _wanted(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}"}}
        return wanted if wanted["oid"] in self.server.large else wanted | {"actions": upload}

    def _commit(self, name: str, body: bytes) -> None:
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.commits.append(name)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{'d' * 40}", "commitOid": "d" * 40})

    def _json(self, value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
