"""A Hugging Face folder, asked through transformers in this process: on the GPU where there is one, else on the CPU."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import Repr
from typing import Any
from unittest.mock import patch

import torch
from transformers import utils as transformers_utils

# transformers 4.57's generation imports scikit-learn, pandas and scipy, a fifth of the time to the first token, for the
# assisted decoding that nothing here uses. The rest of transformers goes on seeing them.
with patch.object(transformers_utils, "is_sklearn_available", lambda: False):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation import candidate_generator  # noqa: F401

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint.architecture import context_length
from nemo_cpt.checkpoint.folders import has_tokenizer
from nemo_cpt.checkpoint.transformers_config import transformers_config
from nemo_cpt.errors import CptError
from nemo_cpt.inference.arithmetic import Arithmetic, default_device, device_kind, precision_on
from nemo_cpt.inference.asked_as import end_ids as named_ends
from nemo_cpt.inference.decoding import Decoder, Request
from nemo_cpt.inference.engine import Message, Piece, Prompt, Reply, Sampling, check_prompt
from nemo_cpt.quiet import bars_of_transformers

BATCH_TOKENS = 32_768  # of prompt and reply that a batch may take: 4 GiB of keys and values for Llama-3.1-8B in bf16
MOST_ROWS = 64
SHOWN = 40  # characters of a prompt in messages
_SHORT = Repr()


class TransformersEngine:
    """Replies of a model in this process.

    Args:
        folder: Hugging Face folder with config.json, weights and tokenizer.
        device: "cuda", "cpu", ...; the GPU where there is one when None.
        dtype: "auto" for config.json's on a GPU and float32 on a CPU, where bf16 is several times slower.
        chat_template: Jinja text in place of the tokenizer's own.
        name: what messages call the model; the folder's path when None.

    Raises:
        CptError: the folder cannot be loaded, or lacks weights.
    """

    @checked
    def __init__(
        self, folder: str | Path, *, device: str | None = None, dtype: str = "auto", chat_template: str | None = None,
        name: str | None = None,
    ) -> None:  # fmt: skip
        self.name = name or str(folder)
        self.chat_stop: tuple[str, ...] = ()  # ends the reply to messages, beside what a request names
        device = device or default_device()
        kind = _check_device(device)
        wanted = precision_on(kind) or dtype if dtype == "auto" else dtype
        if Path(folder, "config.json").is_file():
            # What transformers takes as it stands, and what fails only in the middle of a reply.
            context_length(folder)
            named_ends(Path(folder))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            config = transformers_config(folder)
            with bars_of_transformers(sys.stderr.isatty()):
                network, report = AutoModelForCausalLM.from_pretrained(
                    folder, config=config, dtype=wanted, output_loading_info=True
                )
            self.network = network.to(device).eval()
        except CptError:
            raise
        except Exception as error:  # safetensors' and tokenizers' are of this class, or of their own
            lacks = "" if has_tokenizer(folder) else ", and holds no tokenizer"
            raise CptError(f"{folder} cannot be loaded by transformers{lacks}: {error}") from error
        if missing := sorted(report["missing_keys"]):  # which transformers draws at random
            named = ", ".join([*missing[:3], *["..."] * (len(missing) > 3)])
            raise CptError(f"{folder} lacks {len(missing)} of its model's tensors ({named}): make or fetch it again")
        self.arithmetic = Arithmetic(kind, str(self.network.dtype).removeprefix("torch."))
        # Llama-3's configuration asks `decode` to take blanks before punctuation away: the model's words would change,
        # and a text that grows token by token would lose others.
        self.tokenizer.clean_up_tokenization_spaces = False
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self.context_length = _context_length(self.network.config, folder)
        self.end_ids = _end_ids(self.network, self.tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self.tokenizer.chat_template)

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens that the model reads: BOS once where the tokenizer has one, a conversation through its template.

        Raises:
            CptError: no prompt, messages without a chat template, or messages that it refuses.
        """
        check_prompt(prompt)
        if isinstance(prompt, str):
            bos = self.tokenizer.bos_token
            # A text that brings its BOS along gets no second one.
            return self.tokenizer(prompt, add_special_tokens=not (bos and prompt.startswith(bos))).input_ids
        return self._render(prompt)

    def _render(self, messages: Sequence[Message]) -> list[int]:
        if not self.has_chat_template:
            raise CptError(
                f"{self.name} has no chat template, so it cannot be given messages: ask it plain text to continue, or "
                "name a template"
            )
        return self._apply_template(messages, tokenize=True, add_generation_prompt=True)

    def _apply_template(self, messages: Sequence[Message], **options: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # jinja2's, and whatever a template raises for roles that it does not take
            raise CptError(f"the chat template of {self.name} refuses these messages: {error}") from error

    def request(self, prompt: Prompt, sampling: Sampling, ids: list[int] | None = None) -> Request:
        """A request to a decoder of this engine's; refuses what `encode` does.

        Args:
            prompt: what is asked.
            sampling: how it is answered.
            ids: the prompt's tokens, where they are known.
        """
        if not isinstance(prompt, str) and self.chat_stop:
            sampling = replace(sampling, stop=(*sampling.stop, *self.chat_stop))
        return Request(self.encode(prompt) if ids is None else ids, sampling)

    def end_at_next_turn(self) -> None:
        """End replies to messages where the model goes on with the next question's heading.

        A base model that is asked in a template of plain text (`### Instruction:`) has not learned to end its answer.
        Headings that are special tokens are none of the text; those end replies where the folder says so.
        """
        question, answer = "Which is it?", "This one."
        turns = [Message(role="user", content=question), Message(role="assistant", content=answer)]
        text = self._apply_template([*turns, turns[0]], tokenize=False, add_generation_prompt=False)
        heading = text.partition(answer)[2].partition(question)[0].removeprefix(self.tokenizer.eos_token or "").strip()
        if heading and not any(each in heading for each in self.tokenizer.all_special_tokens):
            self.chat_stop = (heading,)

    def room(self, prompt: Prompt) -> int:
        """Tokens of the context that a prompt leaves for its reply; 0 or less where there is none."""
        return self.context_length - len(self.encode(prompt))

    def decoder(self) -> Decoder:
        """A new, empty batch."""
        return Decoder(self.network, self.tokenizer, self.end_ids, self.context_length)

    @checked
    def stream(self, prompt: Prompt, sampling: Sampling) -> Iterator[Piece]:
        """Yield one reply's pieces as they come; closing the iterator ends the reply."""
        decoder, request = self.decoder(), self.request(prompt, sampling)
        pieces = decoder.add([request])
        while True:
            if request.error is not None:
                raise request.error
            yield from (piece for _, piece in pieces)
            if request.finish_reason:
                return
            pieces = decoder.step()

    @checked
    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[tuple[int, Reply]]:
        """Yield each prompt's index and reply, in the order in which they end.

        Prompts of like length share a batch, so that little is padded; the room of those that end is given to the next.
        """
        requests, decoder = list[Request](), self.decoder()
        for number, prompt in enumerate(prompts, 1):  # all of them, before the first one costs time
            try:
                requests.append(self.request(prompt, sampling))
                decoder.check(requests[-1])
            except CptError as error:
                raise type(error)(f"prompt {number}, {_beginning(prompt)}: {error}") from None
        # Taken from the end, that is the longest first.
        waiting = sorted(range(len(requests)), key=lambda index: len(requests[index].ids))
        index_of: dict[Request, int] = {}
        while waiting or decoder.rows:
            room = self._room(decoder, requests[waiting[-1]].longest) if waiting else 0
            # Joining copies every key and value: wait until a quarter of the batch is free.
            if room and (not decoder.rows or room >= len(decoder.rows) / 3 or room >= len(waiting)):
                taken = [waiting.pop() for _ in range(min(room, len(waiting)))]
                # Seeds of their own: with one seed all replies would be drawn with the same random numbers.
                added = {_seeded(requests[at], sampling.seed + at): at for at in taken}
                index_of |= added
                pieces = decoder.add(list(added))
            else:
                pieces = decoder.step()
            for request, _ in pieces:
                if request.error is not None:
                    raise request.error
                if request.finish_reason:
                    yield index_of.pop(request), request.reply()

    def _room(self, decoder: Decoder, tokens: int) -> int:
        """How many requests of up to `tokens` tokens may join; every row takes the longest one's room."""
        longest = max([tokens, *(each.longest for each in decoder.rows)])
        return max(min(MOST_ROWS, max(BATCH_TOKENS // longest, 1)) - len(decoder.rows), 0)

    def close(self) -> None:
        """Let go of the weights."""
        del self.network
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _beginning(prompt: Prompt) -> str:
    """By which a prompt among many is found."""
    try:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    except (LookupError, TypeError):  # it is none, which the message goes on to say
        return _SHORT.repr(prompt)


def _check_device(device: str) -> str:
    """The kind of a device that is here.

    Raises:
        CptError: PyTorch does not know it, or sees none.
    """
    kind = device_kind(device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise CptError(f"device is {device!r}, and PyTorch sees no GPU here: leave it away, or give cpu")
    return kind


def _context_length(config: Any, folder: str | Path) -> int:
    if (length := getattr(config, "max_position_embeddings", None)) is None:
        raise CptError(f"config.json of {folder} names no max_position_embeddings, the most tokens of prompt and reply")
    return int(length)


def _seeded(request: Request, seed: int) -> Request:
    """The same request, its turn beginning now."""
    return Request(request.ids, replace(request.sampling, seed=seed))


def _end_ids(network: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a reply: all of generation_config.json's, else config.json's, and the tokenizer's EOS."""
    # All of them: Llama-3 ends turns with one and texts with another, and either may be trained.
    named = [network.generation_config.eos_token_id, network.config.eos_token_id, tokenizer.eos_token_id]
    return sorted(
        {each for value in named for each in (value if isinstance(value, list) else [value]) if each is not None}
    )
