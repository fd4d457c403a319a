"""The commands `chat` and `serve`, and what a conversation remembers."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from nemo_cpt.inference import Piece, Prompt, Sampling
from nemo_cpt.inference.chat import Chat
from nemo_cpt.inference.transformers_engine import TransformersEngine

COMMAND = [sys.executable, "-m", "nemo_cpt.cli"]


@pytest.fixture(scope="module")
def engine(make_model: Callable[[str], Path]) -> TransformersEngine:
    return TransformersEngine(make_model("llama"))


def chat(*engines: TransformersEngine, **options: bool) -> tuple[Chat, io.StringIO]:
    shown = io.StringIO()
    return Chat(list(engines), Sampling(max_tokens=6), console=Console(file=shown, width=100), **options), shown


def test_a_conversation_is_remembered_reset_and_saved(engine: TransformersEngine, tmp_path: Path) -> None:
    talk, shown = chat(engine)
    file = tmp_path / "chat.json"
    talk.run(
        [
            "Hello\n",
            "/tokens 3\n",
            "Again\n",
            f"/save {file}\n",
            "/system Be brief.\n",
            "Once more\n",
            "/quit\n",
            "No\n",
        ]
    )
    (saved,) = json.loads(file.read_text())
    first, second = saved["messages"][1]["content"], saved["messages"][3]["content"]
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in saved["messages"]] == ["Hello", first, "Again", second]
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    ((_, wanted),) = engine.generate([[*history, {"role": "user", "content": "Again"}]], Sampling(max_tokens=3))  # type: ignore[list-item]
    assert second == wanted.text
    assert [message["content"] for message in talk.histories[0]][:1] == ["Once more"]  # the system prompt began anew
    assert first in shown.getvalue()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/temperature hot", "'hot' is no number"),
        ("/temperature -1", "temperature is -1.0"),
        ("/tokens 0", "max_tokens is 0"),
        ("/dance", "no command /dance"),
        ("/save", "name a file"),
        ("/save /proc/none/x", "cannot be written"),
    ],
)
def test_wrong_commands_do_not_end_it(engine: TransformersEngine, line: str, says: str) -> None:
    talk, shown = chat(engine)
    talk.run([line, "Hello"])
    assert says in shown.getvalue().replace("\n", " ")
    assert len(talk.histories[0]) == 2


def test_ctrl_c_stops_the_reply_and_not_the_program(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, shown = chat(engine)

    def interrupted(prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        yield Piece("begun")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "stream", interrupted)
        talk.run(["Hello"])
    assert "(stopped)" in shown.getvalue()
    assert [message["content"] for message in talk.histories[0]] == ["Hello", "begun"]
    talk.run(["Go on"])
    assert len(talk.histories[0]) == 4


def test_two_models_side_by_side(engine: TransformersEngine, make_model: Callable[[str], Path]) -> None:
    talk, shown = chat(engine, TransformersEngine(make_model("qwen2_tied")))
    talk.run(["京都"])
    assert "llama" in shown.getvalue()
    assert "qwen2_tied" in shown.getvalue()
    assert [len(history) for history in talk.histories] == [2, 2]


def test_chat_in_a_pipe(make_model: Callable[[str], Path]) -> None:
    command = [*COMMAND, "chat", str(make_model("llama")), "--max-tokens", "4", "--temperature", "0"]
    done = subprocess.run(command, input="Hello\n/quit\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pynvml" not in done.stderr
    engine = TransformersEngine(make_model("llama"))
    ((_, reply),) = engine.generate([[{"role": "user", "content": "Hello"}]], Sampling(max_tokens=4))
    assert done.stdout.strip() == reply.text.strip()


def test_serve_answers_and_ends_in_good_order(make_model: Callable[[str], Path]) -> None:
    command = [*COMMAND, "serve", str(make_model("llama")), "--port", "0", "--api-key-env", "TINY_KEY"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"TINY_KEY": "geheim"})
    assert server.stderr is not None
    address = next(line for line in server.stderr if "http://" in line).split()[-1]
    headers = {"Authorization": "Bearer geheim"}
    assert httpx.get(f"{address}/models", headers=headers).json()["data"][0]["id"] == "llama"
    answer = httpx.post(f"{address}/completions", json={"prompt": "a", "max_tokens": 3}, headers=headers, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] >= 1
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) in (0, -signal.SIGTERM)
    assert "geheim" not in server.stderr.read()


def test_serve_refuses(make_model: Callable[[str], Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, says in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--host", "0.0.0.0"], "name the variable of a key"),
            (["--api-key-env", "NO_SUCH_VARIABLE"], "the variable NO_SUCH_VARIABLE"),
        ):
            done = subprocess.run([*COMMAND, "serve", "nowhere", *arguments], capture_output=True, text=True)
            assert (done.returncode, says in done.stderr) == (2, True), done.stderr
