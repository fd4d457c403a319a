"""An OpenAI-compatible server (vLLM, SGLang, this project's own, OpenAI's), asked through OpenAI's client."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event
from typing import Any, cast

import httpx
import openai

from nemo_cpt.arguments import checked
from nemo_cpt.errors import CptError
from nemo_cpt.inference.engine import FinishReason, Message, Piece, Prompt, Reply, Sampling, check_prompt
from nemo_cpt.urls import public_url

NO_KEY = "none"  # the client wants one; servers without keys do not look at it
VERSION = re.compile(r"/v\d\w*(/|$)")  # `/v1`, and what gateways have in its place, such as `/v1beta/openai`


class EndpointEngine:
    """Replies of a model behind an address. Safe for several threads.

    Args:
        url: the address, with or without `/v1`, which is added where it names no version.
        model: the model's name there; the only one that the server lists when None.
        api_key: the key; never part of a message or a log.
        concurrency: requests at once in `generate`; the server batches them.
        timeout: seconds to wait for an answer.
        retries: tries after a connection error, a reply that breaks off, a 408, a 409, a 429 or a 5xx, with exponential
            backoff.
        limited: whether a reply ends at `Sampling.max_tokens`; else where the server ends it, which suits models that
            think before they answer.

    Raises:
        CptError: the server does not answer, or lists several models and none was named.
    """

    @checked
    def __init__(
        self, url: str, model: str | None = None, *, api_key: str | None = None, concurrency: int = 16,
        timeout: float = 600, retries: int = 5, limited: bool = True,
    ) -> None:  # fmt: skip
        address = url.rstrip("/")
        address = address if VERSION.search(address) else f"{address}/v1"
        # What is shown and kept, in reports and journals too; the client alone has a password that stands in it.
        self.url, self.concurrency, self.retries, self.limited = public_url(address), concurrency, retries, limited
        self.client = openai.OpenAI(base_url=address, api_key=api_key or NO_KEY, timeout=timeout, max_retries=retries)
        self._has_answered = False
        self.model = model or self._only_model()
        self.name = f"{self.model} at {self.url}"

    def _only_model(self) -> str:
        try:
            models = [each.id for each in self._answer_of(lambda client: client.models.list())]
        except (openai.OpenAIError, httpx.HTTPError, ValueError, TypeError) as error:
            raise _endpoint_error(self.url, error) from error
        if len(models) != 1:
            raise CptError(f"{self.url} serves {', '.join(models) or 'no model'}: name the one to ask")
        return models[0]

    def _answer_of(self, ask: Callable[[openai.OpenAI], Any]) -> Any:
        """What a request returns. Where nobody has answered yet, a connection that is refused is not tried again."""
        if self._has_answered or not self.retries:
            return ask(self.client)
        try:
            found = ask(self.client.with_options(max_retries=0))
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            # Nobody listens there, or the host is unknown: a server that is busy, or restarts, says otherwise.
            if isinstance(error.__cause__, httpx.ConnectError) or not _may_pass(error):
                raise
            found = ask(self.client)
        self._has_answered = True
        return found

    def room(self, prompt: Prompt) -> int | None:
        """None: how a server's tokens count is its own matter; it answers what does not fit with an error."""
        return None

    @checked
    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        """Yield one reply's pieces as they come; closing the iterator closes the connection."""
        for part in self._parts(prompt, sampling):
            if part.text or part.reason:
                yield Piece(part.text, _reason(part.reason) if part.reason else None)

    @checked
    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[int, Reply]]:
        """Yield each prompt's index and reply, in the order in which they end; after an error, those under way too."""
        # One that failed halts those not yet begun: a wrong key or a full quota fails for all of them.
        halted, errors = Event(), list[BaseException]()
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {
                pool.submit(self._reply_unless, halted, each, sampling): index for index, each in enumerate(prompts)
            }
            try:
                for done in as_completed(asked):
                    if (error := done.exception()) is not None:
                        errors.append(error)
                    elif (reply := done.result()) is not None:
                        yield asked[done], reply  # also after an error: what has begun is paid for
            finally:
                halted.set()  # a caller who has had enough
        if errors:
            raise errors[0]

    def _reply_unless(self, halted: Event, prompt: Prompt, sampling: Sampling) -> Reply | None:
        """One whole reply; None where another failed before this one began."""
        if halted.is_set():
            return None
        try:
            return self._reply(prompt, sampling)
        except BaseException:
            halted.set()
            raise

    def _reply(self, prompt: Prompt, sampling: Sampling) -> Reply:
        """One whole reply; one that breaks off is asked for again."""
        for attempt in range(self.retries):
            try:
                return self._streamed_reply(prompt, sampling)
            except BrokenOffError:
                # As OpenAI's client waits, which does not see that a stream broke off.
                time.sleep(min(0.5 * 2**attempt, 8))
        return self._streamed_reply(prompt, sampling)

    def _streamed_reply(self, prompt: Prompt, sampling: Sampling) -> Reply:
        """One whole reply, streamed all the same: the first token's time is to be known."""
        started, first, text, reason = time.monotonic(), 0.0, "", "stop"
        usage: Any = None
        for part in self._parts(prompt, sampling):
            # The first text, not the first chunk, which often holds the role alone.
            first = first or (time.monotonic() if part.text else 0.0)
            text += part.text
            reason, usage = part.reason or reason, part.usage or usage
        end = time.monotonic()
        return Reply(
            # Servers that escape JSON may send the halves of an emoji in two chunks.
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
            _reason(reason),
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            first_token_seconds=(first or end) - started,
            seconds=end - started,
        )

    def _parts(self, prompt: Prompt, sampling: Sampling) -> Iterator["_Part"]:
        begun = ended = False
        try:
            with self._ask(prompt, sampling) as chunks:
                begun = True
                for part in map(_part, chunks):
                    ended = ended or part.reason is not None
                    yield part
            # A proxy in between may end the stream in good order though its server is gone.
            if not ended:
                raise BrokenOffError(f"{self.url} broke a reply off (its last chunk names no finish_reason)")
        except (openai.APIConnectionError, httpx.HTTPError) as error:
            # What broke off may be asked for again; what never began the client has tried often enough.
            if begun:
                raise BrokenOffError(f"{self.url} broke a reply off ({error.__cause__ or error})") from error
            raise _endpoint_error(self.url, error) from error
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a line that is no JSON
            raise _endpoint_error(self.url, error) from error

    def _ask(self, prompt: Prompt, sampling: Sampling) -> Any:
        settings: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens if self.limited else None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        # Not OpenAI's own; vLLM, SGLang and this project's server take them.
        extra = {"top_k": sampling.top_k, "min_tokens": sampling.min_tokens}
        settings["extra_body"] = {name: value for name, value in extra.items() if value}
        if sampling.repetition_penalty != 1:
            settings["extra_body"]["repetition_penalty"] = sampling.repetition_penalty
        check_prompt(prompt)
        if sampling.logprobs is not None:
            raise CptError("logprobs is set, and an endpoint's log probabilities are not read: leave it away")
        if isinstance(prompt, str):
            return self._answer_of(lambda client: client.completions.create(prompt=prompt, **settings))
        messages = cast(Any, list(cast(Sequence[Message], prompt)))
        return self._answer_of(lambda client: client.chat.completions.create(messages=messages, **settings))

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def _may_pass(error: openai.APIError) -> bool:
    """Whether OpenAI's client would ask again."""
    return (
        not isinstance(error, openai.APIStatusError) or error.status_code in (408, 409, 429) or error.status_code > 499
    )


class EndpointError(CptError):
    """An endpoint cannot be reached, refuses, or is none."""


class BrokenOffError(EndpointError):
    """A reply began and did not come to its end."""


@dataclass(frozen=True)
class _Part:
    text: str
    reason: str | None
    usage: Any


def _part(chunk: Any) -> _Part:
    """Read a chunk of a stream, of a chat or a completion.

    Raises:
        ValueError: it is none.
    """
    try:
        choice = chunk.choices[0] if len(chunk.choices) else None  # an empty list comes with the usage
        text = (choice.delta.content if hasattr(choice, "delta") else choice.text) if choice else ""
        return _Part(text or "", choice.finish_reason if choice else None, chunk.usage)
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"a chunk without choices: {str(chunk)[:80]}") from error


def _endpoint_error(url: str, error: Exception) -> EndpointError:
    if isinstance(error, openai.APIConnectionError):
        return EndpointError(f"{url} does not answer ({error.__cause__ or error}): is the server running there?")
    if isinstance(error, openai.APIStatusError):
        return EndpointError(f"{url} answered {error.status_code}: {error.message}")
    return EndpointError(f"{url} sent what is no answer of an OpenAI-compatible server: {error}")


def _reason(word: str) -> FinishReason:
    return "length" if word == "length" else "stop"
