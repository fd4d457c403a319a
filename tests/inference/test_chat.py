"""The commands `chat` and `serve`, and what a conversation remembers."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from nemo_cpt.cli import app
from nemo_cpt.errors import CptError
from nemo_cpt.evaluation import evaluate
from nemo_cpt.inference import Piece, Prompt, Sampling, models
from nemo_cpt.inference.chat import Chat, Side, titles, typed_lines
from nemo_cpt.inference.transformers_engine import TransformersEngine

COMMAND = [sys.executable, "-m", "nemo_cpt.cli"]


@pytest.fixture(scope="module")
def engine(make_model: Callable[[str], Path]) -> TransformersEngine:
    return TransformersEngine(make_model("llama"))


def chat(*engines: TransformersEngine, **options: Any) -> tuple[Chat, io.StringIO]:
    shown = io.StringIO()
    sides = [Side(engine) for engine in engines]
    return Chat(sides, Sampling(max_tokens=6), console=Console(file=shown, width=100), **options), shown


def command(*arguments: str) -> Any:
    """A command that is refused, without a process of its own."""
    from nemo_cpt.cli import inference  # noqa: F401  registers the commands

    return CliRunner().invoke(app, list(arguments))


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
    assert [message["content"] for message in talk.sides[0].history][:1] == [
        "Once more"
    ]  # the system prompt began anew
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
    assert len(talk.sides[0].history) == 2


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
    assert [message["content"] for message in talk.sides[0].history] == ["Hello", "begun"]
    talk.run(["Go on"])
    assert len(talk.sides[0].history) == 4


def test_two_models_side_by_side(engine: TransformersEngine, make_model: Callable[[str], Path]) -> None:
    talk, shown = chat(engine, TransformersEngine(make_model("qwen2_tied")))
    talk.run(["京都"])
    assert "llama" in shown.getvalue()
    assert "qwen2_tied" in shown.getvalue()
    assert [len(side.history) for side in talk.sides] == [2, 2]


def test_models_in_folders_of_one_name_are_told_apart(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    folders = [tmp_path / run / "hf" for run in ("one", "two")]
    for folder in folders:
        folder.parent.mkdir()
        folder.symlink_to(make_model("llama"))
    sides = [Side(TransformersEngine(folder)) for folder in folders]
    assert titles(sides) == [str(folder) for folder in folders]
    assert titles(sides[:1]) == ["hf"]


def test_a_question_asked_again_has_another_answer_and_a_session_the_same_ones(engine: TransformersEngine) -> None:
    sessions = []
    for _ in range(2):
        talk, _ = chat(engine)
        talk.run(["/temperature 2", "/tokens 12", "Hello"])
        first = talk.sides[0].history[1]
        talk.run(["/reset", "Hello"])
        sessions.append((first, talk.sides[0].history[1]))
    assert sessions[0][0] != sessions[0][1]
    assert sessions[0] == sessions[1]


def test_a_reply_has_the_room_that_the_context_leaves(engine: TransformersEngine) -> None:
    talk, shown = chat(engine)
    talk.run(["/tokens 5000", "Hello", "a" * 500, "/reset", "Hello"])
    first, second = talk.sides[0].history[1]["content"], shown.getvalue()
    assert first
    assert "fills the context" in second.replace("\n", " ")


def test_a_reply_cannot_steer_the_terminal(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, shown = chat(engine)
    told = "\x1b]0;owned\x07a b\x9b2J\u200d"
    monkeypatch.setattr(engine, "stream", lambda prompt, sampling: iter([Piece(told, "stop")]))
    talk.run(["Hello"])
    assert shown.getvalue() == "]0;owneda b2J\u200d\n"
    assert talk.sides[0].history[1]["content"] == told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--against", "http://127.0.0.1:1", "--device", "cpu"], "device cannot be set for a model that a server has"),
        (["--against-key-env", "HOME"], "--against, which is not given"),
    ],
)
def test_chat_refuses_what_it_would_not_use(arguments: list[str], says: str) -> None:
    assert says in str(command("chat", "http://127.0.0.1:1", *arguments).exception)
    assert "is no endpoint" in str(command("chat", "nowhere", "--api-key-env", "HOME").exception)


def test_a_base_is_refused_where_no_model_is_merged_into_one(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    whole = str(make_model("llama"))
    for words in (["chat", whole, "--against", whole], ["serve", whole, "--port", "0"]):
        refused = str(command(*words, "--base", "nowhere").exception)
        assert re.search("base.*leave (it|base=nowhere) away", refused), refused
    with pytest.raises(CptError, match="base is set, and nothing that is to be evaluated uses it"):
        evaluate(whole, tmp_path, base="nowhere")


def test_chat_in_a_pipe(make_model: Callable[[str], Path]) -> None:
    arguments = [
        sys.executable,
        "-X",
        "importtime",
        *COMMAND[1:],
        "chat",
        str(make_model("llama")),
        "--max-tokens",
        "4",
        "--temperature",
        "0",
    ]
    done = subprocess.run(arguments, input="Hello\n/quit\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    assert "torch" in done.stderr
    assert "sklearn" not in done.stderr  # a fifth of the time to the first token
    engine = TransformersEngine(make_model("llama"))
    ((_, reply),) = engine.generate([[{"role": "user", "content": "Hello"}]], Sampling(max_tokens=4))
    assert done.stdout.strip() == reply.text.strip()


@pytest.mark.parametrize(
    ("line", "says"),
    [(b"/tokens 5.5", "'5.5' is no whole number"), (b"caf\xe9", "line 2 of standard input is not in UTF-8")],
)
def test_an_error_in_a_pipe_is_no_reply(
    line: bytes, says: str, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that reads the replies would take it for one."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n" + line + b"\nHello\n")))
    talk, written = chat(engine, interactive=False)
    with pytest.raises(CptError, match=says):
        talk.run(typed_lines("> "))
    assert len(talk.sides[0].history) == 2
    assert "number" not in written.getvalue()


def test_lines_of_windows_are_texts_without_their_ends(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"  Hello\r\n")))
    talk, _ = chat(engine, interactive=False)
    talk.run(typed_lines("> "))
    assert talk.sides[0].history[0]["content"] == "  Hello"


def test_serve_answers_and_ends_in_good_order(make_model: Callable[[str], Path]) -> None:
    arguments = [*COMMAND, "serve", str(make_model("llama")), "--port", "0", "--api-key-env", "TINY_KEY"]
    server = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ | {"TINY_KEY": "secret-key"})
    assert server.stderr is not None
    address = next(line for line in server.stderr if "http://" in line).split()[-1]
    headers = {"Authorization": "Bearer secret-key"}
    assert httpx.get(f"{address}/models", headers=headers).json()["data"][0]["id"] == "llama"
    answer = httpx.post(
        f"{address}/completions", json={"prompt": "my diary", "max_tokens": 3}, headers=headers, timeout=60
    )
    assert answer.json()["usage"]["completion_tokens"] >= 1
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    logged = server.stderr.read()
    assert "secret-key" not in logged
    assert "diary" not in logged
    assert "completions" not in logged


def test_serve_can_be_asked_and_stopped_once_it_says_its_address(make_model: Callable[[str], Path]) -> None:
    arguments = [*COMMAND, "serve", str(make_model("llama")), "--port", "0"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(line for line in server.stderr if "http://" in line).split()[-1]
        with socket.create_connection(("127.0.0.1", urlsplit(address).port or 0)):
            server.terminate()
        assert server.wait(60) == 0


def test_a_second_ctrl_c_ends_the_replies_with_an_error_and_no_traceback(make_model: Callable[[str], Path]) -> None:
    arguments = [*COMMAND, "serve", str(make_model("long_context")), "--port", "0"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        address = next(line for line in server.stderr if "http://" in line).split()[-1]
        # Longer than anybody waits.
        asked = {"prompt": "Kyoto", "max_tokens": 60_000, "min_tokens": 60_000, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{address}/completions", json=asked, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            while not _is_closed(address):
                next(lines)  # the reply goes on
            server.send_signal(signal.SIGINT)
            (last,) = [line for line in lines if "error" in line]
        assert "the server is shutting down" in last
        assert server.wait(60) == 0
        assert "Traceback" not in server.stderr.read()


def _is_closed(address: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", urlsplit(address).port or 0)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_port_of_a_server_that_is_still_loading_is_taken(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        arguments = ["serve", str(make_model("llama")), "--port", str(free.getsockname()[1])]
    said = list[str]()

    def load(*_: object, **options: object) -> None:
        if said:
            raise CptError("both have come here")
        said.append("the model is loaded")
        said.append(str(command(*arguments).exception))
        raise CptError("enough")

    monkeypatch.setattr(models, "open_transformers", load)
    assert str(command(*arguments).exception) == "enough"
    assert said[0] == "the model is loaded"
    assert "choose another --port" in said[1]


def test_a_key_that_no_header_could_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_cpt.cli.inference import key_of_variable

    for value, says in (("ключ", "that no HTTP header carries"), ("a\nb", "no HTTP header"), (" \n", "is not set")):
        monkeypatch.setenv("TINY_KEY", value)
        with pytest.raises(CptError, match=says):
            key_of_variable("TINY_KEY")
    monkeypatch.setenv("TINY_KEY", "secret-key\n")
    assert key_of_variable("TINY_KEY") == "secret-key"


@pytest.mark.parametrize("words", [["serve", "nowhere"], ["chat", "{model}", "--against", "nowhere"]])
def test_a_path_that_is_no_models_is_known_before_a_model_is_loaded(
    make_model: Callable[[str], Path], words: list[str]
) -> None:
    given = [each.format(model=make_model("llama")) for each in words]
    code = (
        f"import sys; sys.argv = {['nemo-cpt', *given]!r}\nimport atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from nemo_cpt.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert "there is no model at nowhere" in done.stderr


def test_serve_refuses() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, says in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--host", "0.0.0.0"], "name the variable of a key"),
            (["--api-key-env", "NO_SUCH_VARIABLE"], "the variable NO_SUCH_VARIABLE"),
            (["--chat-template", "alpaca-xx"], "there is no chat template alpaca-xx"),
            (["--max-waiting", "0"], "--max-waiting is 0"),
            (["--engine", "sglang"], "there is no engine sglang"),
            (["--engine", "vllm", "--nemo-api", "--device", "cpu"], "--device, --nemo-api: of this project's own"),
        ):
            refused = command("serve", "nowhere", *arguments)
            assert (refused.exit_code, says in str(refused.exception)) == (1, True), refused
