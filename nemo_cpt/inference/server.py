"""An OpenAI-compatible HTTP server over the in-process engine: one model, many clients, one batch.

The protocol is OpenAI's API reference (chat completions, completions, models, error objects); vLLM's additions top_k,
min_tokens and repetition_penalty are taken too. What a request asks for is done or refused with OpenAI's error object,
never ignored.
"""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, cast

import prometheus_client as prometheus
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from nemo_cpt.errors import CptError
from nemo_cpt.inference import decoding
from nemo_cpt.inference.engine import Message, Piece, Sampling, TokenLogprob
from nemo_cpt.inference.scheduler import QueueFullError, Scheduler, Ticket
from nemo_cpt.inference.transformers_engine import BATCH_TOKENS, MOST_ROWS, TransformersEngine

MOST_BYTES = 2**20  # of a request
MOST_CHOICES = 16
DEFAULT_MAX_TOKENS = 256  # of a completion; OpenAI's 16 surprises everybody
DEFAULT_CHAT_TOKENS = 1024  # of a chat's reply. OpenAI's may fill the context, which here would keep others waiting
OPEN_PATHS = ("/health",)  # answered without a key, for probes


class _Common(BaseModel):
    """Fields that both kinds of completion share. Unknown ones are refused: an ignored setting is a wrong answer."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    user: str | None = None  # OpenAI's label for abuse reports: there is none to label here
    # Accepted at the value that changes nothing, which clients send:
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = DEFAULT_MAX_TOKENS
    logprobs: int | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class NemoRequest(BaseModel):
    """PUT /generate, NeMo's text generation server of 2023."""

    model_config = ConfigDict(extra="forbid")

    sentences: list[str]
    tokens_to_generate: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    add_BOS: bool = True  # noqa: N815  NeMo's name
    all_probs: Literal[False] = False
    repetition_penalty: float = 1.0
    min_tokens_to_generate: int = 0
    end_strings: list[str] = []


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    def answer(self) -> JSONResponse:
        """The response."""
        error = {"message": str(self), "type": self.kind, "param": None, "code": self.code}
        headers = {"Retry-After": "1"} if self.status == 429 else {}
        return JSONResponse({"error": error}, self.status, headers)


class _Metrics:
    """What /metrics tells Prometheus."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        counter, histogram = prometheus.Counter, prometheus.Histogram
        self.answers = counter("nemo_cpt_answers", "Answers by path and status.", ["path", "status"], registry=registry)
        self.prompt_tokens = counter("nemo_cpt_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.reply_tokens = counter("nemo_cpt_reply_tokens", "Tokens of replies.", registry=registry)
        self.first_token = histogram("nemo_cpt_first_token_seconds", "From request to first token.", registry=registry)
        self.seconds = histogram("nemo_cpt_reply_seconds", "From request to the reply's end.", registry=registry)
        for name, value in (("waiting", lambda: scheduler.waiting), ("running", lambda: scheduler.running)):
            gauge = prometheus.Gauge(f"nemo_cpt_requests_{name}", f"Requests that are {name}.", registry=registry)
            gauge.set_function(value)

    def count(self, request: decoding.Request) -> None:
        """Count a request that has ended."""
        self.prompt_tokens.inc(len(request.ids))
        self.reply_tokens.inc(request.tokens)
        self.first_token.observe((request.first_token or time.monotonic()) - request.started)
        self.seconds.observe(time.monotonic() - request.started)


def make_app(
    engine: TransformersEngine, *, served_as: str, api_key: str | None = None, most_waiting: int = 256,
    most_rows: int = MOST_ROWS, batch_tokens: int = BATCH_TOKENS, nemo_api: bool = False,
) -> FastAPI:  # fmt: skip
    """The server's application.

    Args:
        engine: the model.
        served_as: its name in /v1/models and in requests.
        api_key: what `Authorization: Bearer` must carry; None asks for none.
        most_waiting: requests that may wait; others get 429.
        most_rows: requests in the batch at once.
        batch_tokens: tokens of prompts and replies that the batch may come to hold; sets the memory of keys and values.
        nemo_api: answer `PUT /generate` too.
    """
    scheduler = Scheduler(engine.decoder(), most_rows, batch_tokens, most_waiting)
    metrics = _Metrics(scheduler)
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)

    # No docs pages: they load scripts from another host.
    app = FastAPI(title="nemo-cpt serve", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            if api_key is not None and request.url.path not in OPEN_PATHS:
                _check_key(request.headers.get("authorization", ""), api_key)
            length = request.headers.get("content-length")
            if request.method in ("POST", "PUT") and (
                length is None or not length.isdigit() or int(length) > MOST_BYTES
            ):
                raise ApiError(413, f"a request needs a Content-Length of at most {MOST_BYTES} bytes")
            response = await call_next(request)
        except ApiError as error:
            response = error.answer()
        path = getattr(request.scope.get("route"), "path", "other")  # of strangers' paths only one label
        metrics.answers.labels(path, str(response.status_code)).inc()
        return response

    @app.exception_handler(ApiError)
    async def explain(request: Request, error: ApiError) -> Response:
        return error.answer()

    @app.exception_handler(CptError)
    async def explain_ours(request: Request, error: CptError) -> Response:
        return ApiError(400, str(error), code="context_length_exceeded" if "context" in str(error) else None).answer()

    @app.exception_handler(HTTPException)
    async def explain_path(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").answer()

    @app.exception_handler(RequestValidationError)
    async def explain_fields(request: Request, error: RequestValidationError) -> Response:
        where = ("the body (a JSON object, sent with Content-Type: application/json)",)
        found = [f"{'.'.join(map(str, each['loc'][1:] or where))}: {each['msg']}" for each in error.errors()]
        return ApiError(400, "; ".join(found[:5])).answer()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(prometheus.generate_latest(metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": served_as, "object": "model", "created": created, "owned_by": "nemo-cpt"}
        return {"object": "list", "data": [model | {"max_model_len": engine.context_length}]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        _check_model(body.model, served_as)
        ids = engine.encode(cast(Sequence[Message], body.messages))  # which checks them
        room = max(engine.context_length - len(ids), 1)
        wanted = body.max_completion_tokens or body.max_tokens or min(room, DEFAULT_CHAT_TOKENS)
        logprobs = body.top_logprobs if body.logprobs else None
        tickets = _submit(scheduler, [ids], body, wanted, logprobs)
        form = _ChatForm(served_as, body)
        return await _respond(tickets, form, request, scheduler, metrics, body)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        _check_model(body.model, served_as)
        tickets = _submit(scheduler, _prompts(engine, body.prompt), body, body.max_tokens, body.logprobs)
        return await _respond(tickets, _TextForm(served_as, body), request, scheduler, metrics, body)

    if nemo_api:

        @app.put("/generate")
        async def generate(body: NemoRequest, request: Request) -> dict[str, Any]:
            sampling = Sampling(
                max_tokens=body.tokens_to_generate, temperature=0.0 if body.greedy else body.temperature,
                top_k=body.top_k, top_p=body.top_p or 1.0, repetition_penalty=body.repetition_penalty,
                min_tokens=body.min_tokens_to_generate, stop=tuple(body.end_strings),
            )  # fmt: skip
            encoded = [engine.tokenizer(each, add_special_tokens=body.add_BOS).input_ids for each in body.sentences]
            tickets = _queue(scheduler, [decoding.Request(ids, sampling) for ids in encoded])
            await _until_done(tickets, request, scheduler, metrics)
            texts = [prompt + ticket.request.text for prompt, ticket in zip(body.sentences, tickets, strict=True)]
            return {"sentences": texts}

    return app


def _check_key(header: str, api_key: str) -> None:
    kind, _, given = header.partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
        raise ApiError(401, "the request needs the header Authorization: Bearer KEY", code="invalid_api_key")


def _check_model(asked: str | None, served_as: str) -> None:
    if asked not in (None, served_as):
        raise ApiError(404, f"there is no model {asked!r} here; it is {served_as!r}", code="model_not_found")


def _prompts(engine: TransformersEngine, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    several: Sequence[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    vocabulary = engine.network.config.vocab_size
    for each in several:
        if not isinstance(each, str) and not all(0 <= token < vocabulary for token in each):
            raise ApiError(400, f"the prompt holds a token outside of 0 to {vocabulary - 1}")
    return [engine.encode(each) if isinstance(each, str) else list(each) for each in several]


def _submit(
    scheduler: Scheduler, prompts: list[list[int]], body: _Common, max_tokens: int, logprobs: int | None
) -> list[Ticket]:
    """Queue `n` requests for each prompt."""
    seed = body.seed if body.seed is not None else uuid.uuid4().int % 2**31
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    requests = [
        decoding.Request(
            ids,
            Sampling(
                max_tokens=max_tokens, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=stop,
                min_tokens=body.min_tokens, repetition_penalty=body.repetition_penalty, seed=seed + number,
                logprobs=logprobs,
            ),
        )
        for ids in prompts
        for number in range(body.n)
    ]  # fmt: skip
    return _queue(scheduler, requests)


def _queue(scheduler: Scheduler, requests: list[decoding.Request]) -> list[Ticket]:
    """All of them, or none."""
    tickets: list[Ticket] = []
    try:
        for request in requests:
            tickets.append(scheduler.submit(request))
    except QueueFullError:
        for ticket in tickets:
            scheduler.cancel(ticket)
        raise ApiError(429, "too many requests are waiting; try again later", "rate_limit_error") from None
    except CptError:
        for ticket in tickets:
            scheduler.cancel(ticket)
        raise
    return tickets


async def _respond(
    tickets: list[Ticket], form: "_Form", request: Request, scheduler: Scheduler, metrics: _Metrics, body: _Common
) -> Response:
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.get("include_usage"))
        return StreamingResponse(_events(tickets, form, scheduler, metrics, usage), media_type="text/event-stream")
    await _until_done(tickets, request, scheduler, metrics)
    choices = [form.choice(number, ticket.request) for number, ticket in enumerate(tickets)]
    return JSONResponse(form.envelope(choices, streamed=False) | {"usage": _usage(tickets, body.n)})


async def _until_done(tickets: list[Ticket], request: Request, scheduler: Scheduler, metrics: _Metrics) -> None:
    """Wait for every reply; a client that hangs up takes its requests out of the batch."""

    async def read_all() -> None:
        for ticket in tickets:
            async for _ in ticket:
                pass
            metrics.count(ticket.request)

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.ensure_future(read_all()), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError(499, "the client went away")
        reading.result()
    finally:
        reading.cancel()
        leaving.cancel()
        for ticket in tickets:
            scheduler.cancel(ticket)


async def _events(
    tickets: list[Ticket], form: "_Form", scheduler: Scheduler, metrics: _Metrics, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, the choices' pieces as they come; ends by GeneratorExit when the client goes away."""
    merged: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def forward(number: int, ticket: Ticket) -> None:
        try:
            async for piece in ticket:
                await merged.put((number, piece))
        except Exception as error:
            await merged.put((number, error))

    readers = [asyncio.ensure_future(forward(number, ticket)) for number, ticket in enumerate(tickets)]
    going_on = len(tickets)
    try:
        for number in range(len(tickets)):
            if (opening := form.opening(number)) is not None:
                yield _event(form.envelope([opening], streamed=True))
        while going_on:
            number, piece = await merged.get()
            if isinstance(piece, Exception):
                yield _event({"error": {"message": str(piece), "type": "server_error", "param": None, "code": None}})
                return
            if piece.text or piece.finish_reason or piece.logprobs:
                yield _event(form.envelope([form.part(number, piece)], streamed=True))
            if piece.finish_reason:
                going_on -= 1
                metrics.count(tickets[number].request)
        if usage:
            yield _event(form.envelope([], streamed=True) | {"usage": _usage(tickets, form.choices_a_prompt)})
        yield "data: [DONE]\n\n"
    finally:
        for reader in readers:
            reader.cancel()
        for ticket in tickets:
            scheduler.cancel(ticket)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _usage(tickets: list[Ticket], choices_a_prompt: int) -> dict[str, int]:
    """Tokens; a prompt with several choices counts once."""
    prompt = sum(len(ticket.request.ids) for ticket in tickets[::choices_a_prompt])
    reply = sum(ticket.request.tokens for ticket in tickets)
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


class _Form:
    """How one kind of answer looks, whole and in parts."""

    kind, streamed_kind, prefix = "", "", ""

    def __init__(self, served_as: str, body: _Common) -> None:
        self.base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": served_as}
        self.choices_a_prompt = body.n

    def envelope(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """What is around the choices."""
        return self.base | {"object": self.streamed_kind if streamed else self.kind, "choices": choices}

    def opening(self, number: int) -> dict[str, Any] | None:
        """What a stream's choice begins with."""
        return None

    def choice(self, number: int, request: decoding.Request) -> dict[str, Any]:
        """A whole reply."""
        raise NotImplementedError

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        """A piece of a reply."""
        raise NotImplementedError


class _ChatForm(_Form):
    kind, streamed_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, number: int) -> dict[str, Any] | None:
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def choice(self, number: int, request: decoding.Request) -> dict[str, Any]:
        message = {"role": "assistant", "content": request.text}
        return {"index": number, "message": message, "finish_reason": request.finish_reason} | self._logprobs(
            request.logprobs
        )

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": number, "delta": delta, "finish_reason": piece.finish_reason} | self._logprobs(piece.logprobs)

    @staticmethod
    def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not tokens:
            return {"logprobs": None}

        def entry(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            entry(each.text, each.logprob) | {"top_logprobs": [entry(*top) for top in each.top]} for each in tokens
        ]
        return {"logprobs": {"content": content}}


class _TextForm(_Form):
    kind, streamed_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, number: int, request: decoding.Request) -> dict[str, Any]:
        return self._choice(number, request.text, request.finish_reason, request.logprobs)

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        return self._choice(number, piece.text, piece.finish_reason, piece.logprobs)

    @staticmethod
    def _choice(number: int, text: str, reason: str | None, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        logprobs = {
            "tokens": [each.text for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": [dict(each.top) for each in tokens],
        }
        return {"index": number, "text": text, "finish_reason": reason, "logprobs": logprobs if tokens else None}
