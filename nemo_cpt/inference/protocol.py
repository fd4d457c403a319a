"""What requests ask and how answers look: OpenAI's chat completions, completions and errors; NeMo's request of 2023.

What a request asks for is done or refused with OpenAI's error object, never ignored. vLLM's additions top_k, min_tokens
and repetition_penalty are taken. A field that is null is one that is not given.
"""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nemo_cpt.errors import CptError
from nemo_cpt.inference.decoding import Request
from nemo_cpt.inference.engine import Message, Piece, Sampling, TokenLogprob

MOST_CHOICES = 16
MOST_SENTENCES = 128  # of a request to NeMo's server
# Of a request that names none, as far as the context has room: OpenAI's 16 of a completion surprise everybody, and its
# chats may fill the context, which here would keep others waiting.
DEFAULT_MAX_TOKENS, DEFAULT_CHAT_TOKENS = 256, 1024
NULL_IN_MESSAGES: tuple[Any, ...] = (None, [], {})  # what clients send back of an answer beside role and content


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}

    def answer(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body(), self.status, {"Retry-After": "1"} if self.status in (429, 503) else {})


class _Body(BaseModel):
    """Unknown fields are refused: an ignored setting is a wrong answer."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if type(fields) is dict else fields

    @model_validator(mode="before")
    @classmethod
    def _of_characters(cls, fields: Any) -> Any:
        if type(fields) is not dict:  # without the Content-Type of JSON they are bytes; pydantic refuses them
            return fields
        try:
            orjson.dumps(fields)
        except orjson.JSONEncodeError as error:  # JSON may hold half of a surrogate pair, a tokenizer's text may not
            if "surrogates" not in str(error):  # a number of more than 64 bits, nesting without an end
                raise ValueError(str(error)) from None
            raise ValueError("the text holds a lone surrogate, which is no character") from None
        return fields


class _StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Completion(_Body):
    """Fields that both kinds of completion share."""

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: str | list[str] = []
    seed: int | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    # OpenAI's labels for its reports, records and caches: there is none to label here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    # Accepted at the values that change nothing, which clients send:
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream is to end with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: Sequence[int], logprobs: int | None) -> list[Sampling]:
        """How each of the `n` replies to each prompt is drawn, by a seed of its own: equal prompts are drawn apart.

        Args:
            max_tokens: the most tokens of a reply, for each prompt.
            logprobs: as in `Sampling`.

        Raises:
            CptError: options of a stream are given for what is none.
        """
        if self.stream_options is not None and not self.stream:
            raise CptError("stream_options is set and stream is not")
        seed = self.seed if self.seed is not None else random_seed()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        top_k = 0 if self.top_k == -1 else self.top_k  # vLLM's two names for all tokens
        return [
            Sampling(
                max_tokens=max_tokens[number // self.n], temperature=self.temperature, top_p=self.top_p, top_k=top_k,
                stop=stop, min_tokens=self.min_tokens, repetition_penalty=self.repetition_penalty, seed=seed + number,
                logprobs=logprobs,
            )
            for number in range(len(max_tokens) * self.n)
        ]  # fmt: skip


class ChatRequest(_Completion):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    # As above, at the values that change nothing:
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    def conversation(self) -> list[Message]:
        """The messages, content in parts of text joined by newlines, as vLLM joins them.

        Raises:
            CptError: a message has more than a role and a text.
        """
        return [_message(number, each) for number, each in enumerate(self.messages)]

    def most_tokens(self, room: int) -> int:
        """The most tokens of a reply, where the context leaves `room`.

        Raises:
            CptError: it is given twice, and not the same.
        """
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise CptError("max_tokens and max_completion_tokens say different things: give one")
        # OpenAI's newer name for it; clients send either, some both.
        wanted = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return _most_tokens(wanted, room, DEFAULT_CHAT_TOKENS)

    def most_probable(self) -> int | None:
        """Most probable tokens to report beside each token; None for no log probabilities.

        Raises:
            CptError: they are asked for without log probabilities.
        """
        if self.top_logprobs and not self.logprobs:
            raise CptError("top_logprobs is set and logprobs is not")
        return self.top_logprobs if self.logprobs else None


def _message(number: int, given: dict[str, Any]) -> Message:
    fields = {name: value for name, value in given.items() if name == "content" or value not in NULL_IN_MESSAGES}
    if fields.get("type") == "text":  # lm-evaluation-harness up to 0.4.9 says so of whole messages
        del fields["type"]
    if others := sorted(fields.keys() - {"role", "content"}):
        raise CptError(f"messages[{number}] has {', '.join(others)}; the chat template is given role and content alone")
    role: Any = fields.get("role", "")
    content: Any = fields.get("content")
    if isinstance(content, list):
        parts = [
            each.get("text") if isinstance(each, dict) and each.get("type") == "text" else None for each in content
        ]
        if not all(isinstance(text, str) for text in parts):
            raise CptError(f"messages[{number}] has a part that is no text; this server reads texts alone")
        content = "\n".join(map(str, parts))
    return Message(role="system" if role == "developer" else role, content=content)  # OpenAI's newer name for it


class CompletionRequest(_Completion):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1)]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, of which one may stand without a list around it."""
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if alone else self.prompt  # type: ignore[return-value, list-item]

    def most_tokens(self, room: int) -> int:
        """The most tokens of a reply to a prompt that leaves `room` tokens of the context."""
        return _most_tokens(self.max_tokens, room, DEFAULT_MAX_TOKENS)


def _most_tokens(wanted: int | None, room: int, default: int) -> int:
    # 1 where there is no room: such a request is refused with its numbers.
    return wanted if wanted is not None else min(max(room, 1), default)


class NemoRequest(_Body):
    """PUT /generate of NeMo's text generation server of 2023, with its defaults."""

    sentences: Annotated[list[str], Field(min_length=1, max_length=MOST_SENTENCES)]
    tokens_to_generate: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    greedy: bool = False
    add_BOS: bool = False  # noqa: N815  NeMo's name
    all_probs: Literal[False] = False
    compute_logprob: Literal[False] = False
    repetition_penalty: float = 1.0
    min_tokens_to_generate: int = 0
    end_strings: list[str] = ["<|endoftext|>"]
    random_seed: int | None = None

    def sampling(self) -> list[Sampling]:
        """How the reply to each sentence is drawn."""
        seed = self.random_seed if self.random_seed is not None else random_seed()
        # NeMo takes top_p 0 for no limit, which is 1 here.
        return [
            Sampling(
                max_tokens=self.tokens_to_generate, temperature=0.0 if self.greedy else self.temperature,
                top_k=self.top_k, top_p=self.top_p or 1.0, repetition_penalty=self.repetition_penalty,
                min_tokens=self.min_tokens_to_generate, stop=tuple(self.end_strings), seed=seed + number,
            )
            for number in range(len(self.sentences))
        ]  # fmt: skip


def random_seed() -> int:
    """A seed for a request that names none."""
    return uuid.uuid4().int % 2**31


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def usage(requests: Sequence[Request], choices_a_prompt: int) -> dict[str, int]:
    """Tokens; a prompt with several choices counts once."""
    # A prompt's choices stand one behind the other.
    prompt = sum(len(each.ids) for each in requests[::choices_a_prompt])
    reply = sum(each.tokens for each in requests)
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


class Form:
    """How one kind of answer looks, whole and in parts."""

    kind, streamed_kind, prefix = "", "", ""

    def __init__(self, served_as: str) -> None:
        self.base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": served_as}

    def envelope(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        """What is around the choices."""
        return self.base | {"object": self.streamed_kind if streamed else self.kind, "choices": choices}

    def opening(self, number: int) -> dict[str, Any] | None:
        """What a stream's choice begins with."""
        return None

    def choice(self, number: int, request: Request) -> dict[str, Any]:
        """A whole reply."""
        raise NotImplementedError

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        """A piece of a reply."""
        raise NotImplementedError


class ChatForm(Form):
    """A chat completion."""

    kind, streamed_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, number: int) -> dict[str, Any] | None:
        """The role."""
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def choice(self, number: int, request: Request) -> dict[str, Any]:
        """A message."""
        message = {"role": "assistant", "content": request.text, "refusal": None}
        return {"index": number, "message": message, "finish_reason": request.finish_reason} | self._logprobs(
            request.logprobs
        )

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        """A delta."""
        delta = {"content": piece.text} if piece.text else {}
        return {"index": number, "delta": delta, "finish_reason": piece.finish_reason} | self._logprobs(piece.logprobs)

    @staticmethod
    def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not tokens:
            return {"logprobs": None}

        def entry(content: bytes, logprob: float) -> dict[str, Any]:
            return {"token": _spelled(content), "logprob": logprob, "bytes": list(content)}

        content = [
            entry(each.content, each.logprob) | {"top_logprobs": [entry(*top) for top in each.top]} for each in tokens
        ]
        return {"logprobs": {"content": content, "refusal": None}}


class TextForm(Form):
    """A completion."""

    kind, streamed_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, number: int, request: Request) -> dict[str, Any]:
        """A text."""
        return self._choice(number, request.text, request.finish_reason, request.logprobs)

    def part(self, number: int, piece: Piece) -> dict[str, Any]:
        """More of it."""
        return self._choice(number, piece.text, piece.finish_reason, piece.logprobs)

    @staticmethod
    def _choice(number: int, text: str, reason: str | None, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        logprobs = {
            "tokens": [_spelled(each.content, "bytes:") for each in tokens],
            "token_logprobs": [each.logprob for each in tokens],
            # With the token itself, as OpenAI's, also where it was drawn from below the most probable ones.
            "top_logprobs": [
                {_spelled(content, "bytes:"): logprob for content, logprob in (*each.top, (each.content, each.logprob))}
                for each in tokens
            ],
        }
        return {"index": number, "text": text, "finish_reason": reason, "logprobs": logprobs if tokens else None}


def _spelled(token: bytes, mark: str = "") -> str:
    r"""A token as OpenAI writes it: what is a part of a character as `\xe3\x83`, in completions behind `bytes:`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return mark + token.decode(errors="backslashreplace")
