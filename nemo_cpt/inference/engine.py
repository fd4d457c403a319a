"""What an engine takes and gives: prompts or messages and sampling settings; pieces of text, counts and times."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypedDict, runtime_checkable

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.reading.lines import lone_surrogate
from nemo_cpt.errors import CptError

FinishReason = Literal["stop", "length", "cancelled"]
ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a conversation, in OpenAI's form."""

    role: str
    content: str


Prompt = str | Sequence[Message]  # text to continue, or a conversation that the chat template renders


@checked
@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn.

    Attributes:
        max_tokens: the most tokens of a reply.
        temperature: what logits are divided by; 0, and what is as good as that, takes the most probable token (greedy).
        top_p: draw among the most probable tokens that together have this probability (nucleus sampling,
            arXiv 1904.09751).
        top_k: draw among this many most probable tokens; 0 for all of them.
        min_tokens: tokens before an end token may be drawn.
        repetition_penalty: what divides the positive logits, and multiplies the negative ones, of tokens that stand in
            the prompt or the reply already (CTRL, arXiv 1909.05858); 1 for none.
        stop: strings that end a reply; they are not part of it.
        seed: of the random numbers; replies with equal seeds are equal on one machine, whatever else is in the batch.
        logprobs: most probable tokens to report beside each token, with their log probabilities; None for none.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # All settings in one place, so that each engine may rely on them.
        for name, value, fits, wanted in (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            # Beyond these, logits overflow.
            ("repetition_penalty", self.repetition_penalty, 1e-2 <= self.repetition_penalty <= 1e2, "0.01 to 100"),
            ("stop", self.stop, "" not in self.stop, "strings that are not empty"),
            ("stop", self.stop, not lone_surrogate("".join(self.stop)), "text, without lone surrogates"),
            ("seed", self.seed, -(2**63) <= self.seed < 2**64, "a number of 64 bits"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
        ):
            if not fits:
                raise CptError(f"{name} is {value!r}; it must be {wanted}")


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a reply.

    Attributes:
        content: its bytes in UTF-8, which may be a part of a character.
        logprob: natural logarithm of its probability at temperature 1.
        top: the most probable tokens in its place, and theirs.
    """

    content: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()

    @property
    def text(self) -> str:
        """The token as text; U+FFFD for what is no whole character."""
        return self.content.decode(errors="replace")


@dataclass(frozen=True)
class Piece:
    """A part of a reply, as it comes.

    Attributes:
        text: what is new; may be empty, while a character is not complete or may begin a stop string.
        finish_reason: why the reply ended; None while it goes on.
        logprobs: of the tokens since the piece before, where they were asked for.
    """

    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A whole reply.

    Attributes:
        text: without the stop string and the end-of-turn token.
        finish_reason: "stop" at an end token or a stop string, "length" at `max_tokens`, "cancelled".
        prompt_tokens: tokens of the rendered prompt; 0 where an endpoint does not say.
        completion_tokens: tokens of the reply, the end token included.
        first_token_seconds: from the start of its turn to its first token.
        seconds: from the start of its turn to its end.
        logprobs: of each token, where they were asked for.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    seconds: float
    logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)


class ContextError(CptError):
    """A prompt and the most tokens of its reply are longer than the model's context."""


class BrokenModelError(CptError):
    """A model computes NaN."""


class NoMemoryError(CptError):
    """There is no memory left for a reply."""


@runtime_checkable
class Engine(Protocol):
    """Something that replies. Not safe for several threads at once, unless it says so."""

    name: str

    def room(self, prompt: Prompt) -> int | None:
        """Tokens of the context that a prompt leaves for its reply; None where an endpoint does not say."""
        ...

    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        """Yield one reply's pieces as they come; closing the iterator ends the reply."""
        ...

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[int, Reply]]:
        """Yield each prompt's index and reply, in the order in which they end, not of the prompts."""
        ...

    def close(self) -> None:
        """Let go of what the engine holds."""
        ...


def check_prompt(prompt: object) -> None:
    """Refuse what is neither text nor a conversation, or what no tokenizer could read.

    Raises:
        CptError: it is of another type, it holds a lone surrogate, or it is what `check_messages` refuses.
    """
    if isinstance(prompt, str):
        check_characters(prompt, "the prompt")
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        check_messages(prompt)
    else:
        raise CptError(f"a prompt is of type {type(prompt).__name__}: give text, or a list of messages")


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse a conversation that no chat template could mean.

    Raises:
        CptError: no messages, one that is none, an unknown role, content that is no text, or a last turn that is not
            the user's.
    """
    if not messages:
        raise CptError("messages is empty: give at least one, with role and content")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise CptError(
                f"messages[{number}] is of type {type(message).__name__}; it must be a dict of role and content"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise CptError(f"messages[{number}] has the role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise CptError(f"messages[{number}] has content of type {type(content).__name__}; it must be a string")
        check_characters(content, f"messages[{number}]")
    # Chat templates would put an assistant's header behind an answer, and the model answer itself.
    if messages[-1]["role"] != "user":
        raise CptError(f"the last message is the {messages[-1]['role']}'s; a reply answers the user's")


def check_characters(text: str, name: str) -> None:
    """Refuse a text that no tokenizer takes.

    Args:
        text: the text.
        name: what a message calls it.

    Raises:
        CptError: it holds half of a surrogate pair.
    """
    if said := lone_surrogate(text):
        raise CptError(f"{name} {said}")
