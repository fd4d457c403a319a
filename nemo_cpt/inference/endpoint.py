"""An OpenAI-compatible server (vLLM, SGLang, this project's own, OpenAI's), asked through OpenAI's client."""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, cast

import openai

from nemo_cpt.errors import CptError
from nemo_cpt.inference.engine import FinishReason, Message, Piece, Prompt, Reply, Sampling, check_messages

NO_KEY = "none"  # the client wants one; servers without keys do not look at it


class EndpointEngine:
    """Replies of a model behind an address. Safe for several threads.

    Args:
        url: the address, with or without `/v1`.
        model: the model's name there; the only one that the server lists when None.
        api_key: the key; never part of a message or a log.
        concurrency: requests at once in `generate`; the server batches them.
        timeout: seconds to wait for an answer.
        retries: tries after a connection error, a 408, a 409, a 429 or a 5xx, with exponential backoff.

    Raises:
        CptError: the server does not answer, or lists several models and none was named.
    """

    def __init__(
        self, url: str, model: str | None = None, *, api_key: str | None = None, concurrency: int = 16,
        timeout: float = 600, retries: int = 5,
    ) -> None:  # fmt: skip
        address = url.rstrip("/")
        address = address if address.endswith("/v1") else f"{address}/v1"
        self.url, self.concurrency = address, concurrency
        self.client = openai.OpenAI(base_url=address, api_key=api_key or NO_KEY, timeout=timeout, max_retries=retries)
        self.model = model or self._only_model()
        self.name = f"{self.model} at {address}"

    def _only_model(self) -> str:
        models = [each.id for each in _explained(self.url, lambda: list(self.client.models.list()))]
        if len(models) != 1:
            raise CptError(f"{self.url} serves {', '.join(models) or 'no model'}: name the one to ask")
        return models[0]

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        """Yield one reply's pieces as they come; closing the iterator closes the connection."""
        answer = _explained(self.url, lambda: self._ask(prompt, sampling, stream=True))
        with answer as chunks:
            for chunk in _explained_while_read(self.url, chunks):
                for choice in chunk.choices:
                    text = choice.text if isinstance(prompt, str) else choice.delta.content
                    if text or choice.finish_reason:
                        yield Piece(text or "", _reason(choice.finish_reason) if choice.finish_reason else None)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[int, Reply]]:
        """Yield each prompt's index and reply, in the order in which they end."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._reply, prompt, sampling): index for index, prompt in enumerate(prompts)}
            try:
                for done in as_completed(asked):
                    yield asked[done], done.result()
            finally:  # an error, or a caller who has had enough: what has not begun is not asked
                for each in asked:
                    each.cancel()

    def _reply(self, prompt: Prompt, sampling: Sampling) -> Reply:
        """One whole reply, streamed all the same: the first token's time is to be known."""
        started, first, text, reason = time.monotonic(), 0.0, "", "stop"
        usage: Any = None
        answer = _explained(self.url, lambda: self._ask(prompt, sampling, stream=True))
        with answer as chunks:
            for chunk in _explained_while_read(self.url, chunks):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    new = choice.text if isinstance(prompt, str) else choice.delta.content
                    first = first or (time.monotonic() if new else 0.0)
                    text += new or ""
                    reason = choice.finish_reason or reason
        end = time.monotonic()
        return Reply(
            text,
            _reason(reason),
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            first_token_seconds=(first or end) - started,
            seconds=end - started,
        )

    def _ask(self, prompt: Prompt, sampling: Sampling, stream: bool) -> Any:
        settings: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "stop": list(sampling.stop) or None,
            "stream": stream,
            "stream_options": {"include_usage": True},
        }
        # Not OpenAI's own; vLLM, SGLang and this project's server take them.
        extra = {"top_k": sampling.top_k, "min_tokens": sampling.min_tokens}
        settings["extra_body"] = {name: value for name, value in extra.items() if value}
        if sampling.repetition_penalty != 1:
            settings["extra_body"]["repetition_penalty"] = sampling.repetition_penalty
        if isinstance(prompt, str):
            return self.client.completions.create(prompt=prompt, **settings)
        check_messages(prompt)
        return self.client.chat.completions.create(
            messages=cast(Any, list(cast(Sequence[Message], prompt))), **settings
        )

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def _explained(url: str, ask: Any) -> Any:
    try:
        return ask()
    except openai.OpenAIError as error:
        raise _as_cpt_error(url, error) from error


def _explained_while_read(url: str, chunks: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from chunks
    except (openai.OpenAIError, ValueError) as error:  # ValueError: a line that is no JSON
        raise _as_cpt_error(url, error) from error


def _as_cpt_error(url: str, error: Exception) -> CptError:
    if isinstance(error, openai.APIConnectionError):
        return CptError(f"{url} does not answer ({error.__cause__ or error}): is the server running there?")
    if isinstance(error, openai.APIStatusError):
        return CptError(f"{url} answered {error.status_code}: {error.message}")
    return CptError(f"{url} sent what is no answer of an OpenAI-compatible server: {error}")


def _reason(word: str) -> FinishReason:
    return "length" if word == "length" else "stop"
