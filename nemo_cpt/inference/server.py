"""An OpenAI-compatible HTTP server over the in-process engine: one model, many clients, one batch.

The protocol is OpenAI's API reference (chat completions, completions, models, error objects), see `protocol`.
"""

import asyncio
import contextlib
import hmac
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from types import FrameType
from typing import Any

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_cpt.errors import CptError
from nemo_cpt.inference import decoding
from nemo_cpt.inference.engine import BrokenModelError, ContextError, NoMemoryError, Piece
from nemo_cpt.inference.hosts import LOCAL_HOSTS, name_of
from nemo_cpt.inference.protocol import (
    ApiError,
    ChatForm,
    ChatRequest,
    CompletionRequest,
    Form,
    NemoRequest,
    TextForm,
    event,
    usage,
)
from nemo_cpt.inference.scheduler import QueueFullError, Scheduler, StoppedError, Ticket
from nemo_cpt.inference.transformers_engine import BATCH_TOKENS, MOST_ROWS, TransformersEngine

MOST_BYTES = 2**20  # of a request
OPEN_PATHS = ("/health",)  # answered without a key, for probes
SECONDS_TO_FINISH = 30  # replies that have begun when the server is told to stop
SECONDS_TO_HEAR = 5  # clients whose replies have not come to their end by then


def make_app(
    engine: TransformersEngine, *, served_as: str, api_key: str | None = None, most_waiting: int = 256,
    most_rows: int = MOST_ROWS, batch_tokens: int = BATCH_TOKENS, nemo_api: bool = False,
    hosts: frozenset[str] | None = frozenset(LOCAL_HOSTS),
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
        hosts: the names that requests may go by (`hosts.names_to_answer`); None for every name.
    """
    metrics = _Metrics()
    scheduler = Scheduler(engine.decoder(), most_rows, batch_tokens, most_waiting, metrics.count)
    metrics.watch(scheduler)
    service = _Service(engine, served_as, scheduler, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # In a thread: it waits for the batch's step, and this loop tells the clients meanwhile.
        await asyncio.to_thread(scheduler.close)

    # No docs pages: they load scripts from another host.
    app = FastAPI(title="nemo-cpt serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.stop = scheduler.stop
    app.add_middleware(_Guard, api_key=api_key, hosts=hosts, answers=metrics.answers)
    for kind, explain in _EXPLANATIONS.items():
        app.exception_handler(kind)(explain)
    app.get("/health")(service.health)
    app.get("/metrics")(service.show_metrics)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.complete)
    if nemo_api:
        app.put("/generate")(service.generate)
    return app


def serve(
    app: FastAPI, listener: socket.socket, *, log_requests: bool = False, ready: Callable[[], None] = lambda: None
) -> None:
    """Answer on a listening socket until SIGINT or SIGTERM; replies that have begun are given time to end.

    Args:
        app: the application.
        listener: the socket.
        log_requests: print each request's address, path and status.
        ready: called once requests and signals are waited for.
    """
    server = Server(configuration(app, log_requests))

    def stop(number: int, frame: Any) -> None:
        # Until uvicorn heeds signals itself. When it is done it raises them once more, with this: to be told to stop is
        # no failure.
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    ready()
    server.run([listener])


class Server(uvicorn.Server):
    """uvicorn, which would break off without a word what does not end in time, or on a second Ctrl-C."""

    _hurried = False
    _loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let the replies end; on a second Ctrl-C end them with an error at once, on a third wait for nobody."""
        if not self.should_exit or sig != signal.SIGINT:
            super().handle_exit(sig, frame)
        elif not self._hurried:
            app: Any = self.config.app
            self._hurried = True
            # By the loop: a signal may come while this thread holds what it takes to stop.
            if self._loop is not None:
                self._loop.call_soon_threadsafe(app.state.stop)
        else:
            logging.getLogger("uvicorn.error").disabled = True  # it would show where each request stood
            self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the replies that have begun; those that take too long end with an error that says so."""
        app: Any = self.config.app
        late = asyncio.get_running_loop().call_later(SECONDS_TO_FINISH, app.state.stop)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()


def configuration(app: FastAPI, log_requests: bool = False) -> uvicorn.Config:
    """How uvicorn runs the application.

    Args:
        app: the application.
        log_requests: print each request's address, path and status.
    """
    config = uvicorn.Config(
        app, log_level="warning", access_log=log_requests,
        timeout_graceful_shutdown=SECONDS_TO_FINISH + SECONDS_TO_HEAR,
    )  # fmt: skip
    if log_requests:  # `log_level` holds for this logger too, and it speaks below it
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    return config


class _Metrics:
    """What /metrics tells Prometheus."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        counter, histogram = prometheus.Counter, prometheus.Histogram
        self.answers = counter("nemo_cpt_answers", "Answers by path and status.", ["path", "status"], registry=registry)
        self.prompt_tokens = counter("nemo_cpt_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.reply_tokens = counter("nemo_cpt_reply_tokens", "Tokens of replies.", registry=registry)
        self.first_token = histogram("nemo_cpt_first_token_seconds", "From request to first token.", registry=registry)
        self.seconds = histogram("nemo_cpt_reply_seconds", "From request to the reply's end.", registry=registry)

    def watch(self, scheduler: Scheduler) -> None:
        """Tell of a queue and its batch as they are when they are asked for."""
        for name, value in (("waiting", lambda: scheduler.waiting), ("running", lambda: scheduler.running)):
            gauge = prometheus.Gauge(f"nemo_cpt_requests_{name}", f"Requests that are {name}.", registry=self.registry)
            gauge.set_function(value)

    def count(self, request: decoding.Request) -> None:
        """Count a request that leaves the batch: the tokens in any case, the times of a reply that came to its end."""
        if not request.tokens:  # it failed with its prompt
            return
        self.prompt_tokens.inc(len(request.ids))
        self.reply_tokens.inc(request.tokens)
        if request.finish_reason in ("stop", "length"):
            self.first_token.observe(request.first_token - request.started)
            self.seconds.observe(time.monotonic() - request.started)


class _Guard:
    """Before each request: its host, its key, its size. After it: a count, and an answer where the server failed."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, hosts: frozenset[str] | None, answers: prometheus.Counter
    ) -> None:
        self.app, self.api_key, self.hosts, self.answers = app, api_key, hosts, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "HEAD":  # of load balancers; uvicorn, whose own scope stays as it is, sends no body
            scope = {**scope, "method": "GET"}
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                path = getattr(scope.get("route"), "path", "other")  # of strangers' paths only one label
                self.answers.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check(Request(scope))
            await self.app(scope, receive, counted)
        except ApiError as error:
            await error.answer()(scope, receive, counted)
        except Exception as error:
            if begun:
                raise
            logging.getLogger("uvicorn.error").exception("a request failed")
            await ApiError(500, f"the server failed: {type(error).__name__}", "server_error").answer()(
                scope, receive, counted
            )

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if self.hosts is not None and name_of(host) not in self.hosts:
            raise ApiError(
                403, f"this server is not asked as {host!r}: serve --allowed-host NAME adds a name",
                code="host_not_allowed",
            )  # fmt: skip
        if self.api_key is not None and request.url.path not in OPEN_PATHS:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            # In constant time: how long a comparison takes must not tell how much of a key was right.
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.api_key.encode()):
                raise ApiError(401, "the request needs the header Authorization: Bearer KEY", code="invalid_api_key")
        length = request.headers.get("content-length", "")
        if request.method in ("POST", "PUT") and (not length.isdigit() or int(length) > MOST_BYTES):
            raise ApiError(413, f"a request needs a Content-Length of at most {MOST_BYTES} bytes")


async def _explain(request: Request, error: Exception) -> Response:
    return _as_api_error(error).answer()


async def _explain_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").answer()
    answer.headers.update(error.headers or {})  # Allow, of 405
    return answer


async def _explain_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    where = ("the body (a JSON object, sent with Content-Type: application/json)",)
    # Without pydantic's names of the kinds that a list may be of.
    places = [[str(part) for part in each["loc"][1:] if "[" not in str(part)] for each in error.errors()]
    found = [f"{'.'.join(place or where)}: {each['msg']}" for place, each in zip(places, error.errors(), strict=True)]
    return ApiError(400, "; ".join(found[:5])).answer()


_EXPLANATIONS = {
    ApiError: _explain,
    CptError: _explain,
    HTTPException: _explain_path,
    RequestValidationError: _explain_fields,
}


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CptError) and not isinstance(error, BrokenModelError | NoMemoryError):
        return ApiError(400, str(error), code="context_length_exceeded" if isinstance(error, ContextError) else None)
    if isinstance(error, StoppedError):
        return ApiError(503, str(error), "server_error")
    return ApiError(500, f"the reply failed: {error}", "server_error")  # out of memory, say


class _Stream(StreamingResponse):
    """Server-sent events; `ended` is called however they end, also where the client left before the first one."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Not in the generator: one that was never begun runs no `finally`.
            self.ended()


class _Service:
    """The endpoints of one model.

    Args:
        engine: the model.
        served_as: its name in requests.
        scheduler: the queue and the batch.
        metrics: what /metrics shows.
    """

    def __init__(self, engine: TransformersEngine, served_as: str, scheduler: Scheduler, metrics: _Metrics) -> None:
        self.engine, self.served_as, self.scheduler, self.metrics = engine, served_as, scheduler, metrics
        self.created = int(time.time())

    async def health(self) -> dict[str, str]:
        """GET /health."""
        return {"status": "ok"}

    async def show_metrics(self) -> Response:
        """GET /metrics."""
        return Response(prometheus.generate_latest(self.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [await self.model(self.served_as)]}

    async def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        self._check(name, replies=1)
        model = {"id": name, "object": "model", "created": self.created, "owned_by": "nemo-cpt"}
        return model | {"max_model_len": self.engine.context_length}

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._check(body.model, body.n)
        conversation = body.conversation()

        def requests() -> list[decoding.Request]:
            ids = self.engine.encode(conversation)
            most = body.most_tokens(self.engine.context_length - len(ids))
            samplings = body.sampling([most], body.most_probable())
            return [self.engine.request(conversation, each, ids) for each in samplings]

        return await self._respond(await asyncio.to_thread(requests), ChatForm(self.served_as), body, request)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """POST /v1/completions."""
        self._check(body.model, body.n * len(body.prompts()))

        def requests() -> list[decoding.Request]:
            encoded = [self.engine.encode(each) if isinstance(each, str) else each for each in body.prompts()]
            most = [body.most_tokens(self.engine.context_length - len(ids)) for ids in encoded]
            samplings = body.sampling(most, body.logprobs)
            return list(map(decoding.Request, [ids for ids in encoded for _ in range(body.n)], samplings))

        return await self._respond(await asyncio.to_thread(requests), TextForm(self.served_as), body, request)

    async def generate(self, body: NemoRequest, request: Request) -> dict[str, Any]:
        """PUT /generate: the keys of NeMo's own answer; log probabilities are null there too unless asked for."""
        self._check(None, len(body.sentences))
        tokenizer = self.engine.tokenizer
        encoded = [tokenizer(each, add_special_tokens=body.add_BOS).input_ids for each in body.sentences]
        requests = [decoding.Request(*each) for each in zip(encoded, body.sampling(), strict=True)]
        tickets = self._queue(requests)
        await self._until_done(tickets, request)
        ids = [[*each.ids, *each.reply_ids] for each in requests]
        tokens = [[tokenizer.decode([number]) for number in each] for each in ids]
        return {
            "sentences": [prompt + each.text for prompt, each in zip(body.sentences, requests, strict=True)],
            "tokens": tokens,
            "logprob": None,
            "token_ids": ids,
            "offsets": [_offsets(each) for each in tokens],
        }

    def _check(self, asked: str | None, replies: int) -> None:
        """Refuse what is for another model, or could never be queued."""
        if asked not in (None, self.served_as):
            raise ApiError(404, f"there is no model {asked!r} here; it is {self.served_as!r}", code="model_not_found")
        if replies > self.scheduler.most_waiting:
            raise ApiError(400, f"a request may ask for {self.scheduler.most_waiting} replies, and not {replies}")

    async def _respond(
        self, requests: list[decoding.Request], form: Form, body: ChatRequest | CompletionRequest, request: Request
    ) -> Response:
        tickets = self._queue(requests)
        if body.stream:
            return _Stream(self._events(tickets, form, body), lambda: self._cancel(tickets))
        await self._until_done(tickets, request)
        choices = [form.choice(number, each) for number, each in enumerate(requests)]
        return JSONResponse(form.envelope(choices, streamed=False) | {"usage": usage(requests, body.n)})

    def _queue(self, requests: Iterable[decoding.Request]) -> list[Ticket]:
        """All of them, or none."""
        tickets: list[Ticket] = []
        try:
            for each in requests:
                tickets.append(self.scheduler.submit(each))
        except (QueueFullError, CptError) as error:
            self._cancel(tickets)
            if isinstance(error, CptError):
                raise
            raise ApiError(429, "too many requests are waiting; try again later", "rate_limit_error") from None
        return tickets

    def _cancel(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            self.scheduler.cancel(ticket)

    async def _until_done(self, tickets: list[Ticket], request: Request) -> None:
        """Wait for every reply; a client that hangs up takes its requests out of the batch."""

        async def read_all() -> None:
            for ticket in tickets:
                async for _ in ticket:
                    pass

        # Starlette tells of a client that has gone only to who asks; else its replies would fill the batch to their
        # end.
        async def hang_up() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        reading, leaving = asyncio.ensure_future(read_all()), asyncio.ensure_future(hang_up())
        try:
            await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ApiError(499, "the client went away")
            if (error := reading.exception()) is not None:
                raise _as_api_error(error) if isinstance(error, Exception) else error
        finally:
            reading.cancel()
            leaving.cancel()
            self._cancel(tickets)

    async def _events(
        self, tickets: list[Ticket], form: Form, body: ChatRequest | CompletionRequest
    ) -> AsyncIterator[str]:
        """Server-sent events, the choices' pieces as they come."""
        # One stream of several choices: their pieces go out in the order in which they are drawn.
        merged: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

        async def forward(number: int, ticket: Ticket) -> None:
            try:
                async for piece in ticket:
                    await merged.put((number, piece))
            except Exception as error:
                await merged.put((number, error))

        readers = [asyncio.ensure_future(forward(number, ticket)) for number, ticket in enumerate(tickets)]
        going_on = len(tickets)
        without = {"usage": None} if body.usage_at_end else {}  # as OpenAI's: of the chunks before the last one
        try:
            for number in range(len(tickets)):
                if (opening := form.opening(number)) is not None:
                    yield event(form.envelope([opening], streamed=True) | without)
            while going_on:
                number, piece = await merged.get()
                if isinstance(piece, Exception):
                    # The status 200 is sent already: in a stream an error is an event.
                    yield event(_as_api_error(piece).body())
                    return
                if piece.text or piece.finish_reason or piece.logprobs:
                    yield event(form.envelope([form.part(number, piece)], streamed=True) | without)
                going_on -= bool(piece.finish_reason)
            if body.usage_at_end:
                counts = usage([each.request for each in tickets], body.n)
                yield event(form.envelope([], streamed=True) | {"usage": counts})
            yield "data: [DONE]\n\n"
        finally:
            for reader in readers:
                reader.cancel()


def _offsets(tokens: list[str]) -> list[int]:
    """Where each token begins in the text of all of them, as NeMo counts it."""
    offsets = [0]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return offsets
