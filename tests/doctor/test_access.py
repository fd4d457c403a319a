"""The hub's answers from a local server, and where wandb's key may be."""

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nemo_cpt.doctor import Examination, Job, access
from tests.support.servers import serving

TOKEN = "hf_secretsecretsecretsecretsecret"
KEY = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        status, code = self.server.answer
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.answer, server.asked = (200, ""), []
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(server):
        yield server


def ask(hub: str | None = "meta-llama/Llama-3.1-8B", job: Job | None = None):
    found = access.hugging_face(Examination(job, hub=hub))
    assert TOKEN not in found.found + found.cure
    return found


def test_a_readable_model(hub):
    found = ask()
    assert (found.state, found.found) == ("ok", "meta-llama/Llama-3.1-8B is readable with the token found")
    assert hub.asked == [("/meta-llama/Llama-3.1-8B/resolve/main/config.json", f"Bearer {TOKEN}")]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model(hub, status):
    hub.answer = (status, "GatedRepo")
    found = ask()
    assert found.state == "error"
    assert f"HTTP {status}, GatedRepo" in found.found
    assert "accept its conditions" in found.cure
    assert "HF_TOKEN" in found.cure


def test_without_a_token(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.answer = (401, "")
    assert "is refused without a token" in ask().found
    assert hub.asked[0][1] is None
    (tmp_path / "token").write_text(TOKEN)
    found = ask()
    assert "is refused with the token found" in found.found
    assert "the token expired, was revoked or is mistyped" in found.cure  # and not: accept its conditions
    assert hub.asked[1][1] == f"Bearer {TOKEN}"


def test_no_such_model_and_a_hub_in_trouble(hub):
    hub.answer = (404, "RepoNotFound")
    assert ask("no/such").state == "error"
    hub.answer = (404, "EntryNotFound")
    assert ask("no/config").state == "ok"
    hub.answer = (503, "")
    assert ask().state == "warning"
    assert ask("a/b/c").state == "error"


def test_no_network_is_a_warning(hub):
    hub.shutdown()
    hub.server_close()
    found = ask()
    assert found.state == "warning"
    assert "does not answer" in found.found


def test_a_hub_that_never_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(access, "PROCESS_SECONDS", 2)
        assert ask().found == "no answer in 2 s"


def test_offline_is_a_warning(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask().found.startswith("HF_HUB_OFFLINE is set")


def test_the_hub_is_not_asked_where_nothing_is_fetched(hub, world):
    assert ask(None, Job("r", base=str(world / "base"), gpus_per_node=8)).state == "skipped"
    assert ask(None, Job("r", base="none")).state == "skipped"
    assert not hub.asked
    assert ask(None, Job("r", base="none", gpus_per_node=8)).state == "ok"
    assert "Llama-3.1-8B" in hub.asked[0][0]


def wandb(tmp_path: Path, wanted: bool = False, **environ: str):
    found = access.weights_and_biases(
        Examination(Job("r", logs_to_wandb=wanted), environ={"NETRC": str(tmp_path / "netrc"), **environ})
    )
    assert KEY not in found.found + found.cure
    return found


def test_where_wandbs_key_may_be(tmp_path):
    assert wandb(tmp_path).state == "skipped"
    assert wandb(tmp_path, True).state == "error"
    assert wandb(tmp_path, True, WANDB_MODE="offline").state == "ok"
    assert wandb(tmp_path, WANDB_API_KEY=KEY).found == "logged in by WANDB_API_KEY"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb(tmp_path).state == "ok"
    assert wandb(tmp_path, WANDB_BASE_URL="https://wandb.example.org").state == "skipped"
    (tmp_path / "netrc").write_text("machine\n")
    assert wandb(tmp_path).state == "skipped"
