"""The HTTP server, through OpenAI's own client and through bare requests, in a real process-wide uvicorn."""

import asyncio
import itertools
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from nemo_cpt.errors import CptError
from nemo_cpt.inference import Sampling, open_engine
from nemo_cpt.inference import server as server_module
from nemo_cpt.inference.decoding import Request
from nemo_cpt.inference.endpoint import EndpointEngine
from nemo_cpt.inference.hosts import LOCAL_HOSTS, names_to_answer
from nemo_cpt.inference.scheduler import QueueFullError, Scheduler, Ticket
from nemo_cpt.inference.server import MOST_BYTES, Server, configuration, make_app
from nemo_cpt.inference.transformers_engine import TransformersEngine

HELLO = [{"role": "user", "content": "The old town of Kyoto"}]


class Gate:
    """Holds the decoder at its next step until it is opened, so that a test knows what is running and what waits."""

    def __init__(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        from nemo_cpt.inference.decoding import Decoder

        self.open, self.reached = threading.Event(), threading.Event()
        step = Decoder.step

        def gated(decoder: Decoder) -> Any:
            if decoder.rows:
                self.reached.set()
                self.open.wait()
            return step(decoder)

        monkeypatch.setattr(Decoder, "step", gated)


@contextmanager
def serving(engine: TransformersEngine, log_requests: bool = False, **options: Any) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)  # connections wait from here on, whenever the server begins to take them
        server = Server(configuration(make_app(engine, served_as="tiny", **options), log_requests))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def engine(make_model: Callable[[str], Path]) -> TransformersEngine:
    return TransformersEngine(make_model("llama"))


@pytest.fixture(scope="module")
def url(engine: TransformersEngine) -> Iterator[str]:
    with serving(engine, nemo_api=True) as address:
        yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def replied(engine: TransformersEngine, prompt: Any, **sampling: Any) -> str:
    ((_, reply),) = engine.generate([prompt], Sampling(**sampling))
    return reply.text


def test_a_chat_streamed_and_whole(client: openai.OpenAI, engine: TransformersEngine) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == replied(engine, HELLO, max_tokens=20)
    assert whole.usage and whole.usage.prompt_tokens == len(engine.encode(HELLO))  # type: ignore[arg-type]  # noqa: PT018
    streamed = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    text = "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert streamed[-1].usage == whole.usage
    # As OpenAI's schema demands: null, and not left out, which clients in strict languages do not read.
    assert {("usage" in chunk.model_fields_set, chunk.usage) for chunk in streamed[:-1]} == {(True, None)}
    assert "refusal" in whole.choices[0].message.model_fields_set
    assert [chunk.choices[0].finish_reason for chunk in streamed if chunk.choices][-1] == whole.choices[0].finish_reason


def test_a_completion_with_choices_stop_and_seed(client: openai.OpenAI, engine: TransformersEngine) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["a", "京都"], "max_tokens": 12, "temperature": 1.2, "seed": 4}
    first, again = (client.completions.create(n=3, **asked) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert [choice.index for choice in first.choices] == list(range(6))
    assert len({choice.text for choice in first.choices}) > 2
    ids = client.completions.create(**asked | {"prompt": [engine.encode("a"), engine.encode("京都")], "n": 3})
    assert [choice.text for choice in ids.choices] == [choice.text for choice in first.choices]
    greedy = replied(engine, "a", max_tokens=12)
    stopped = client.completions.create(model="tiny", prompt="a", max_tokens=12, temperature=0, stop=[greedy[3:6]])
    assert stopped.choices[0].text == greedy[: greedy.index(greedy[3:6])]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_completion_that_names_no_length_has_the_room_that_its_prompt_leaves(
    client: openai.OpenAI, engine: TransformersEngine
) -> None:
    prompts = ["a", "京都 " * 12]
    choices = client.completions.create(model="tiny", prompt=prompts, temperature=0).choices
    assert [each.text for each in choices] == [replied(engine, each, max_tokens=engine.room(each)) for each in prompts]


def test_logprobs_in_both_forms(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )  # type: ignore[call-overload]
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    assert content[0].top_logprobs[0].logprob == content[0].logprob
    assert "refusal" in chat.choices[0].logprobs.model_fields_set
    text = client.completions.create(model="tiny", prompt="a", max_tokens=3, temperature=0, logprobs=1)
    assert len(text.choices[0].logprobs.token_logprobs) == text.usage.completion_tokens  # type: ignore[union-attr]


def test_logprobs_of_tokens_that_are_parts_of_characters(client: openai.OpenAI) -> None:
    """Japanese falls apart: clients put the bytes together, and different tokens must not share a key."""
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "temperature": 0, "extra_body": {"min_tokens": 30}}
    chat = client.chat.completions.create(messages=HELLO, logprobs=True, **asked).choices[0]
    content = chat.logprobs.content
    parts = [each for each in content if each.token.startswith("\\x")]
    assert parts
    assert all(bytes(each.bytes).decode(errors="backslashreplace") == each.token for each in parts)
    text = client.completions.create(prompt="京都", logprobs=20, **asked).choices[0].logprobs
    assert any(each.startswith("bytes:\\x") for each in text.tokens)
    assert {len(each) for each in text.top_logprobs} == {20}
    drawn = client.completions.create(prompt="京都", logprobs=1, **asked | {"temperature": 2}).choices[0].logprobs
    assert [top[token] for top, token in zip(drawn.top_logprobs, drawn.tokens, strict=True)] == drawn.token_logprobs
    assert max(map(len, drawn.top_logprobs)) == 2


def test_equal_prompts_of_a_request_are_drawn_apart(client: openai.OpenAI) -> None:
    drawn = client.completions.create(model="tiny", prompt=["a"] * 4, max_tokens=12, temperature=1)
    assert len({choice.text for choice in drawn.choices}) > 1


def test_a_setting_that_breaks_arithmetic_harms_nobody_else(client: openai.OpenAI, url: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 8}
    cold = client.completions.create(temperature=1e-45, **asked).choices[0].text
    assert cold == client.completions.create(temperature=0, **asked).choices[0].text
    hot = client.completions.create(temperature=1e39, extra_body={"min_tokens": 8}, **asked)
    assert hot.usage and hot.usage.completion_tokens == 8  # type: ignore[union-attr]  # noqa: PT018
    answer = httpx.post(f"{url}/v1/completions", json=asked | {"repetition_penalty": 1e-45})
    assert (answer.status_code, "it must be 0.01 to 100" in answer.text) == (400, True)


def test_models_health_and_metrics(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    for path in ("health", "metrics", "v1/models", "v1/models/tiny", "v1/models/other"):
        asked, answered = httpx.head(f"{url}/{path}"), httpx.get(f"{url}/{path}")
        assert (asked.status_code, asked.content) == (answered.status_code, b"")
        assert asked.headers["content-type"] == answered.headers["content-type"]
    refused = httpx.put(f"{url}/health")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")
    client.completions.create(model="tiny", prompt="a", max_tokens=2, temperature=0)
    told = httpx.get(f"{url}/metrics").text
    assert 'nemo_cpt_answers_total{path="/v1/completions",status="200"}' in told
    assert "nemo_cpt_requests_waiting 0.0" in told


def test_nemos_own_request_of_2023(url: str, engine: TransformersEngine) -> None:
    body = {
        "sentences": ["The first 200 years"], "tokens_to_generate": 8, "temperature": 1.0, "add_BOS": True, "top_k": 0,
        "top_p": 0.9, "greedy": True, "all_probs": False, "repetition_penalty": 1.2, "min_tokens_to_generate": 2,
    }  # fmt: skip
    answer = httpx.put(f"{url}/generate", json=body)
    wanted = replied(engine, body["sentences"][0], max_tokens=8, top_p=0.9, repetition_penalty=1.2, min_tokens=2)
    told = answer.json()
    assert told.keys() == {"sentences", "tokens", "logprob", "token_ids", "offsets"}
    assert told["sentences"] == [body["sentences"][0] + wanted]
    assert told["tokens"][0][0] == "<bos>"
    assert told["offsets"][0][:2] == [0, 5]
    assert len(told["token_ids"][0]) == len(told["tokens"][0]) == len(told["offsets"][0])


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (
            "/v1/chat/completions",
            {"messages": HELLO, "tools": [{"type": "function"}]},
            400,
            "tools: List should have at",
        ),
        ("/v1/chat/completions", {"messages": HELLO, "functions": []}, 400, "functions: Extra inputs are not perm"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages is empty"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 400, "role 'tool'"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "content of type NoneType"),
        ("/v1/chat/completions", {"model": "gpt-4", "messages": HELLO}, 404, "no model 'gpt-4' here; it is 'tiny'"),
        ("/v1/completions", {"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
        ("/v1/completions", {"prompt": "a" * 2000}, 400, "the model's context is 256"),
        ("/v1/completions", {"prompt": "a\ud800"}, 400, "a lone surrogate"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\udfff"}]}, 400, "a lone surrogate"),
        ("/v1/completions", {"prompt": "a", "seed": 10**30}, 400, "exceeds 64-bit range"),
        ("/v1/completions", {"prompt": []}, 400, "at least 1 item"),
        ("/v1/completions", {"prompt": {}}, 400, "prompt.str: Input should be a valid string; prompt: Input should be"),
        ("/v1/completions", {"prompt": [1, 999]}, 400, "outside of 0 to 399"),
        ("/v1/completions", {"prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a" * (MOST_BYTES + 1)}, 413, "at most 1048576 bytes"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
        ("/v1/completions", {"prompt": ["a"] * 17, "n": 16}, 400, "may ask for 256 replies, and not 272"),
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream is not"),
        ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": {"other": True}}, 400, "other"),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens is 0"),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 2, "max_completion_tokens": 3}, 400, "give one"),
        ("/v1/chat/completions", {"messages": HELLO, "top_logprobs": 2}, 400, "logprobs is not"),
        ("/v1/chat/completions", {"messages": [HELLO[0] | {"name": "Ann"}]}, 400, "messages[0] has name"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            400,
            "a part that is no text",
        ),
        ("/v1/embeddings", {"input": "a"}, 404, "Not Found"),
    ],
)
def test_errors_are_openais(url: str, path: str, body: dict, status: int, says: str) -> None:
    answer = httpx.post(f"{url}{path}", json=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    if says.startswith("the model's context"):
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_request_that_there_is_no_memory_for_ends_alone(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(make_model("llama"))
    expected, long = replied(engine, "a", max_tokens=40), "The old town of Kyoto " * 6
    attention = engine.network.model.layers[1].self_attn
    forward = attention.forward

    def limited(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[1] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", limited)
    gate = Gate(engine, monkeypatch)
    with serving(engine) as url, ThreadPoolExecutor(3) as pool:
        asked = {"max_tokens": 40, "temperature": 0}

        def ask(prompt: str) -> httpx.Response:
            return httpx.post(f"{url}/v1/completions", json=asked | {"prompt": prompt}, timeout=60)

        first = pool.submit(ask, "a")
        gate.reached.wait()
        others = [pool.submit(ask, prompt) for prompt in (long, "a")]
        gate.open.set()
        refused, beside = (each.result() for each in others)
        assert first.result().json()["choices"][0]["text"] == expected
        assert beside.json()["choices"][0]["text"] == expected
        assert refused.status_code == 500
        assert "there is no memory for a prompt of" in refused.json()["error"]["message"]
        assert ask("a").json()["choices"][0]["text"] == expected


def test_messages_as_clients_write_them(url: str, engine: TransformersEngine) -> None:
    """Content in parts, OpenAI's newer name of the system role, and fields that change nothing mean what they say."""
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    written = [
        {"role": "developer", "content": "Be brief.", "name": None, "type": "text"},
        {"role": "user", "content": parts, "tool_calls": []},
    ]
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "stop": None, "seed": None, "tools": None}
    changing_nothing = {
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"], "logit_bias": {},
        "response_format": {"type": "text"}, "frequency_penalty": 0.0, "presence_penalty": 0, "top_k": -1,
        "store": False, "service_tier": "auto", "user": "Ann", "safety_identifier": "a", "prompt_cache_key": "b",
        "metadata": {"of": "me"},
    }  # fmt: skip
    texts = [
        httpx.post(f"{url}/v1/chat/completions", json=asked | {"messages": messages} | more).json()["choices"][0][
            "message"
        ]
        for messages, more in ((plain, {}), (written, changing_nothing))
    ]
    wanted = {"role": "assistant", "content": replied(engine, plain, max_tokens=8), "refusal": None}
    assert texts[0] == texts[1] == wanted


def test_other_origins_and_bodies_without_a_length_are_refused(url: str) -> None:
    preflight = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{url}/v1/completions", headers=preflight)
    assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (405, False)
    endless = httpx.post(f"{url}/v1/completions", content=iter([b'{"prompt": "a"}']))  # chunked
    assert endless.status_code == 413


def test_a_page_whose_name_leads_here_gets_no_answer(engine: TransformersEngine) -> None:
    """DNS rebinding: to the browser the server is then of the page's own origin."""
    names = names_to_answer("127.0.0.1", ["Models.example.org"])
    asked = {
        "127.0.0.1": 200, "localhost:{port}": 200, "[::1]:{port}": 200, "LOCALHOST.": 200, "models.example.org:80": 200,
        "evil.example:{port}": 403, "127.0.0.1.evil.example": 403, "localhost.evil.example": 403, "": 403,
    }  # fmt: skip
    with serving(engine, hosts=names) as url:
        for name, status in asked.items():
            answer = httpx.get(f"{url}/v1/models", headers={"Host": name.format(port=url.rpartition(":")[2])})
            assert answer.status_code == status, name
            assert status == 200 or answer.json()["error"]["code"] == "host_not_allowed"
        preflight = {"Host": "evil.example", "Origin": "http://evil.example"}
        assert httpx.options(f"{url}/v1/completions", headers=preflight).status_code == 403


def test_by_which_names_a_server_is_asked() -> None:
    assert names_to_answer("0.0.0.0", []) is None  # no machine knows all of its names; there requests carry a key
    assert names_to_answer("0.0.0.0", ["gpu1"]) == {*LOCAL_HOSTS, "0.0.0.0", "gpu1"}
    assert "10.0.0.7" in (names_to_answer("10.0.0.7", []) or ())


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_curl_line_of_2023_as_it_stands(url: str) -> None:
    """Of the wiki page by which people asked NeMo's server, but for the port."""
    body = """{
     "sentences": ["The first 200 years of the Joseon era were marked by relative peace. The alphabet was created by "],
     "tokens_to_generate": 30,
     "temperature": 1.0,
     "add_BOS": true,
     "top_k": 0,
     "top_p": 0.9,
     "greedy": false,
     "all_probs": false,
     "repetition_penalty": 1.2,
     "min_tokens_to_generate": 2
     }"""
    command = ["curl", "-sS", "-X", "PUT", f"{url}/generate", "-H", "Content-Type: application/json", "-d", body]
    answers = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(2)]
    sentences = [answer["sentences"][0] for answer in answers]
    assert all(sentence.startswith(json.loads(body)["sentences"][0]) for sentence in sentences)
    assert sentences[0] != sentences[1]  # drawn, with other random numbers each time


def test_the_harness_own_client(url: str, tmp_path: Path) -> None:
    for package in ("lm_eval", "tenacity"):
        pytest.importorskip(package, reason="lm-evaluation-harness is not installed with its API models, lm_eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    client = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="tiny", tokenized_requests=False)
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0, "do_sample": False}
    prompt = client.apply_chat_template([{"role": "user", "content": "a"}])
    asked = [Instance("generate_until", {}, (prompt, settings), number) for number in range(2)]
    assert len(client.generate_until(asked)) == 2


def test_a_body_that_is_no_json(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", content=b"{nonsense", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    as_a_form = httpx.post(f"{url}/v1/completions", content=b'{"prompt": "a"}')  # as `curl -d` sends it
    assert as_a_form.status_code == 400
    assert "(a JSON object, sent with Content-Type: application/json): Input should be a valid dict" in as_a_form.text


def test_the_key(engine: TransformersEngine) -> None:
    with serving(engine, api_key="geheim") as url:
        for key, status in ((None, 401), ("wrong", 401), ("geheim", 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
        assert httpx.get(f"{url}/health").status_code == 200


def test_a_full_queue_refuses_and_loses_nothing(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One running, two waiting, all others refused; those that were taken are answered."""
    gate = Gate(engine, monkeypatch)
    with serving(engine, most_rows=1, most_waiting=2) as url, ThreadPoolExecutor(12) as pool:

        def ask(number: int) -> int:
            body = {"prompt": f"{number}", "max_tokens": 4, "temperature": 0}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code

        first = pool.submit(ask, 0)
        gate.reached.wait()
        others = [pool.submit(ask, number) for number in range(1, 12)]
        refused = list(itertools.islice(as_completed(others), 9))  # while the gate is shut: nothing else can end
        assert {each.result() for each in refused} == {429}
        gate.open.set()
        assert [each.result() for each in (first, *others) if each not in refused] == [200, 200, 200]


def test_who_leaves_the_queue_makes_room(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(engine, monkeypatch)
    scheduler = Scheduler(engine.decoder(), 1, 1000, most_waiting=2, ended=lambda request: None)

    def ask() -> Ticket:
        return scheduler.submit(Request(engine.encode("a"), Sampling(max_tokens=3, min_tokens=3)))

    async def come_and_go() -> None:
        first = ask()
        await asyncio.to_thread(gate.reached.wait)
        gone = [ask() for _ in range(2)]
        with pytest.raises(QueueFullError):
            ask()
        for ticket in gone:
            scheduler.cancel(ticket)
        assert scheduler.waiting == 0
        others = [ask() for _ in range(2)]
        gate.open.set()
        for ticket in (first, *others):
            assert [piece.finish_reason async for piece in ticket][-1] == "length"
        await asyncio.to_thread(scheduler.close)

    asyncio.run(come_and_go())


def test_a_client_that_hangs_up_leaves_the_batch(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()
    from nemo_cpt.inference.decoding import Decoder

    cancel = Decoder.cancel
    monkeypatch.setattr(Decoder, "cancel", lambda decoder, request: (cancel(decoder, request), cancelled.set()))
    gate = Gate(engine, monkeypatch)
    with serving(engine) as url:
        for number, stream in enumerate((True, False), 1):
            gate.open.clear(), gate.reached.clear(), cancelled.clear()  # type: ignore[func-returns-value]
            body = {"prompt": "a", "max_tokens": 200, "temperature": 0, "min_tokens": 200, "stream": stream}
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
                content = json.dumps(body).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
                raw.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
                gate.reached.wait()
            gate.open.set()
            assert cancelled.wait(60)
            # The next request is answered behind the count of the one that left, in the batch's own thread.
            whole = httpx.post(f"{url}/v1/completions", json={"prompt": "ab", "max_tokens": 2, "min_tokens": 2}).json()
            told = counted(url)
            assert told["reply_seconds_count"] == told["first_token_seconds_count"] == number
            assert told["prompt_tokens_total"] == number * (len(engine.encode("a")) + whole["usage"]["prompt_tokens"])
            assert number * (1 + 2) <= told["reply_tokens_total"] < 200


def test_every_choice_is_counted_once(engine: TransformersEngine) -> None:
    with serving(engine) as url:
        for stream in (True, False):
            body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "min_tokens": 3, "stream": stream}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        told = counted(url)
    assert (told["reply_tokens_total"], told["reply_seconds_count"], told["first_token_seconds_count"]) == (24, 8, 8)


def counted(url: str) -> dict[str, float]:
    """What /metrics says, without the answers by path."""
    lines = (line.rpartition(" ") for line in httpx.get(f"{url}/metrics").text.splitlines())
    return {name.removeprefix("nemo_cpt_"): float(value) for name, _, value in lines if name and "{" not in name
            and name[0] != "#"}  # fmt: skip


def test_a_client_that_left_before_its_stream_began_leaves_the_batch(engine: TransformersEngine) -> None:
    """It hung up while its prompt was encoded: the events are never asked for."""
    app, content = make_app(engine, served_as="tiny"), b'{"prompt": "a", "stream": true, "max_tokens": 200}'
    cancelled, told = threading.Event(), iter([{"type": "http.request", "body": content}])
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "app": app,
        "headers": [(b"host", b"localhost"), (b"content-length", b"%d" % len(content)),
                    (b"content-type", b"application/json")],
    }  # fmt: skip

    async def receive() -> Any:
        return next(told, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "cancel", lambda scheduler, ticket: cancelled.set())
        asyncio.run(app(scope, receive, send))
    assert cancelled.is_set()


def test_a_batch_that_fails_is_told_and_the_next_is_served(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_cpt.inference.decoding import Decoder

    def fail(decoder: Decoder) -> None:
        raise MemoryError("no memory left")

    body = {"prompt": "a", "max_tokens": 4, "min_tokens": 4, "temperature": 0}
    with serving(engine) as url:
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "step", fail)
            whole = httpx.post(f"{url}/v1/completions", json=body)
            streamed = httpx.post(f"{url}/v1/completions", json=body | {"stream": True})
        assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
        assert "no memory left" in whole.json()["error"]["message"]
        assert "no memory left" in streamed.text
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        assert 'status="500"' in httpx.get(f"{url}/metrics").text


def test_a_server_that_is_told_to_stop_finishes_what_it_has_begun(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(engine, monkeypatch)
    body = {"prompt": "a", "max_tokens": 9, "temperature": 0}
    with ThreadPoolExecutor(1) as pool:
        with serving(engine) as url:
            reply = pool.submit(lambda: httpx.post(f"{url}/v1/completions", json=body, timeout=60))
            gate.reached.wait()
            threading.Timer(0, gate.open.set).start()  # opened from elsewhere: leaving the block waits for the server
        assert reply.result().json()["choices"][0]["text"] == replied(engine, "a", max_tokens=9)


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_does_not_end_in_time_is_told_so(
    stream: bool, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    gate, stop = Gate(engine, monkeypatch), Scheduler.stop
    monkeypatch.setattr(server_module, "SECONDS_TO_FINISH", 0)
    monkeypatch.setattr(Scheduler, "stop", lambda scheduler: (stop(scheduler), gate.open.set()))
    body = {"prompt": "a", "max_tokens": 200, "min_tokens": 200, "stream": stream}
    with ThreadPoolExecutor(1) as pool:
        with serving(engine) as url:
            reply = pool.submit(lambda: httpx.post(f"{url}/v1/completions", json=body, timeout=60))
            gate.reached.wait()
        answer = reply.result()
    assert answer.status_code == (200 if stream else 503)
    assert "the server is shutting down" in answer.text
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_request_is_logged_where_that_is_asked_for(
    engine: TransformersEngine, capfd: pytest.CaptureFixture, asked_for: bool
) -> None:
    with serving(engine, log_requests=asked_for) as url:
        httpx.post(f"{url}/v1/completions", json={"prompt": "my diary", "max_tokens": 1}, timeout=60)
    logged = "".join(capfd.readouterr())
    assert ("/v1/completions" in logged and "200" in logged) == asked_for
    assert "diary" not in logged


def test_two_hundred_requests_at_once(url: str, engine: TransformersEngine) -> None:
    prompts = [f"{number} 京都" for number in range(200)]
    endpoint = EndpointEngine(url, concurrency=200)
    replies = dict(endpoint.generate(prompts, Sampling(max_tokens=6)))
    assert len(replies) == 200
    alone = dict(engine.generate(prompts, Sampling(max_tokens=6)))
    assert {index: reply.text for index, reply in replies.items()} == {
        index: reply.text for index, reply in alone.items()
    }


def test_the_endpoint_engine_is_the_engine(url: str, engine: TransformersEngine) -> None:
    endpoint = open_engine(url)
    for prompt in ("The old town", HELLO):
        sampling = Sampling(max_tokens=15, temperature=0.9, top_k=40, seed=3)
        assert "".join(piece.text for piece in endpoint.stream(prompt, sampling)) == "".join(
            piece.text for piece in engine.stream(prompt, sampling)
        )
    for prompt, sampling, says in (
        ("\ud800", Sampling(), "lone surrogate"),
        ("a", Sampling(logprobs=1), "are not read"),
    ):
        with pytest.raises(CptError, match=says):
            list(endpoint.generate([prompt], sampling))
    ((_, reply),) = endpoint.generate(["a"], Sampling(max_tokens=5))
    assert reply.completion_tokens >= 1
    assert 0 < reply.first_token_seconds <= reply.seconds


def test_endpoints_that_do_not_answer(url: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    from nemo_cpt.inference.endpoint import EndpointEngine

    with pytest.raises(CptError, match="does not answer"):
        EndpointEngine(f"http://127.0.0.1:{port}", retries=0)
    with pytest.raises(CptError, match=r"answered 404: .*there is no model 'other' here"):
        list(EndpointEngine(url, "other", retries=0).generate(["a"], Sampling()))
