"""What becomes of replies when the server behind an address is slow, fails, breaks off or speaks another language."""

import socket
import threading

import pytest

from nemo_cpt.errors import CptError
from nemo_cpt.inference import Sampling
from nemo_cpt.inference.endpoint import EndpointEngine
from tests.support.chat_server import Body, ChatServer, Fault, FaultError

HELLO = [{"role": "user", "content": "こんにちは"}]


def always(fault: Fault) -> ChatServer:
    def answer(body: Body, number: int) -> str:
        raise FaultError(fault)

    return ChatServer(answer)


@pytest.mark.parametrize("fault", ["broken stream", "503", "hang up"])
def test_what_may_pass_is_tried_again(fault: Fault) -> None:
    def answer(body: Body, number: int) -> str:
        if number == 1:
            raise FaultError(fault)
        return "はい、どうぞ。"

    with ChatServer(answer) as server:
        ((index, reply),) = EndpointEngine(server.url, retries=1).generate([HELLO], Sampling())
    assert (index, reply.text, reply.prompt_tokens, reply.completion_tokens) == (0, "はい、どうぞ。", 100, 10)
    assert len(server.asked) == 2


@pytest.mark.parametrize("fault", ["503", "hang up"])
def test_a_server_that_is_busy_at_the_first_contact_is_asked_again(fault: Fault) -> None:
    def answer(body: Body, number: int) -> str:
        if number == 1:
            raise FaultError(fault)
        return "はい。"

    with ChatServer(answer) as server:
        ((_, reply),) = EndpointEngine(server.url, "named").generate([HELLO], Sampling())
    assert (reply.text, len(server.asked)) == ("はい。", 2)


def test_where_nobody_listens_the_first_contact_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(seconds: float) -> None:
        raise AssertionError(f"it waits {seconds} s to try again")

    monkeypatch.setattr("time.sleep", wait)
    with socket.socket() as nobodys:
        nobodys.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobodys.getsockname()[1]}"
        with pytest.raises(CptError, match=r"does not answer .*refused.*: is the server running there"):
            EndpointEngine(url)
        with pytest.raises(CptError, match=r"does not answer .*refused"):
            list(EndpointEngine(url, "named").stream(HELLO, Sampling()))


@pytest.mark.parametrize(
    ("fault", "requests", "message"),
    [
        ("broken stream", 2, "broke a reply off .*peer closed connection"),
        ("cut stream", 2, "broke a reply off .*names no finish_reason"),
        ("503", 2, "answered 503: .*try later"),
        ("hang up", 2, "does not answer .*disconnected"),
        ("400", 1, "answered 400: .*bad"),
        ("no json", 1, "no answer of an OpenAI-compatible server: Expecting value"),
        ("no chunk", 1, "no answer of an OpenAI-compatible server: a chunk without choices"),
    ],
)
def test_what_does_not_pass_is_said(fault: Fault, requests: int, message: str) -> None:
    with always(fault) as server, pytest.raises(CptError, match=message):
        list(EndpointEngine(server.url, retries=1).generate([HELLO], Sampling()))
    assert len(server.asked) == requests


@pytest.mark.parametrize("fault", ["broken stream", "cut stream", "no json", "no chunk"])
def test_a_stream_that_fails_is_said_too(fault: Fault) -> None:
    with always(fault) as server, pytest.raises(CptError, match=r"broke a reply off|no answer of an OpenAI"):
        list(EndpointEngine(server.url).stream(HELLO, Sampling()))
    assert len(server.asked) == 1  # its text was shown already: nothing to take back


def test_halves_of_a_character_in_two_chunks_become_one() -> None:
    with ChatServer(lambda body, number: "1234\ud83d\ude00 and a lone \ud83d") as server:
        ((_, reply),) = EndpointEngine(server.url).generate([HELLO], Sampling())
    assert reply.text == "1234😀 and a lone \ufffd"


def test_a_server_that_takes_too_long() -> None:
    leave = threading.Event()

    def answer(body: Body, number: int) -> str:
        leave.wait()
        return ""

    with ChatServer(answer) as server:
        with pytest.raises(CptError, match=r"does not answer .*timed out"):
            list(EndpointEngine(server.url, timeout=0.2, retries=0).generate([HELLO], Sampling()))
        leave.set()


def test_replies_under_way_when_another_fails_are_not_lost() -> None:
    under_way, failed = threading.Barrier(3), threading.Event()

    def answer(body: Body, number: int) -> str:
        question = body["messages"][0]["content"]
        under_way.wait()
        if question == "fail":
            failed.set()
            raise FaultError("400")
        failed.wait()
        return question.upper()

    prompts = [[{"role": "user", "content": question}] for question in ("a", "fail", "c")]
    replies = {}
    with ChatServer(answer) as server:
        generated = EndpointEngine(server.url, concurrency=3).generate(prompts, Sampling())
        for _ in range(2):
            index, reply = next(generated)
            replies[index] = reply.text
        with pytest.raises(CptError, match="answered 400"):
            next(generated)
    assert replies == {0: "A", 2: "C"}


def test_after_an_error_no_other_is_asked() -> None:
    with always("400") as server, pytest.raises(CptError, match="answered 400"):
        list(EndpointEngine(server.url, concurrency=1).generate([HELLO] * 3, Sampling()))
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/team/v1/", "http://host:8000/team/v1"),
        ("https://host/v1beta/openai", "https://host/v1beta/openai"),
    ],
)
def test_an_address_is_that_of_a_version(url: str, asked: str) -> None:
    assert EndpointEngine(url, "m").url == asked


def test_a_password_in_an_address_is_neither_shown_nor_kept() -> None:
    engine = EndpointEngine("http://me:secret@127.0.0.1:9", "m", retries=0)
    with pytest.raises(CptError, match=r"^http://127\.0\.0\.1:9/v1 does not answer"):
        list(engine.generate([HELLO], Sampling()))
    assert engine.name == "m at http://127.0.0.1:9/v1"
