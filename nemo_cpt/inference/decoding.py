"""Token by token, for many requests at once: what the in-process engine and the server are built on.

transformers' `generate` takes one batch with one set of sampling settings from its start to its end. Here requests come
and go between any two steps (continuous batching, Orca, OSDI 2022), each with settings and random numbers of its own.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import DynamicCache

from nemo_cpt.errors import CptError
from nemo_cpt.inference.engine import (
    BrokenModelError,
    ContextError,
    FinishReason,
    NoMemoryError,
    Piece,
    Reply,
    Sampling,
    TokenLogprob,
)
from nemo_cpt.inference.token_bytes import TokenBytes

GREEDY_BELOW = 1e-5  # of temperatures, as vLLM's: logits divided by less overflow
UNIFORM_ABOVE = 1e30  # of temperatures: by more than fp32 holds, the -inf of a token that is left out becomes NaN


@dataclass(eq=False)
class Request:
    """A prompt on its way, and what has been said to it.

    Attributes:
        ids: tokens of the rendered prompt, BOS included.
        sampling: how it is answered.
        started: `time.monotonic` of its turn's start.
    """

    ids: list[int]
    sampling: Sampling
    started: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    text: str = ""
    reply_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    held_back: str = ""  # text that may turn out to be the beginning of a stop string
    detokenizer: Any = None
    generator: torch.Generator | None = None
    stop_ids: Collection[int] = ()  # special tokens that are stop strings of this request
    error: BrokenModelError | NoMemoryError | None = None  # why it was cancelled

    @property
    def longest(self) -> int:
        """The most tokens of prompt and reply together."""
        return len(self.ids) + self.sampling.max_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the reply so far, the end token included."""
        return len(self.reply_ids)

    def reply(self) -> Reply:
        """The reply of a request that has ended."""
        assert self.finish_reason is not None
        begun, end = self.first_token or time.monotonic(), time.monotonic()
        return Reply(
            self.text, self.finish_reason, len(self.ids), self.tokens, begun - self.started, end - self.started,
            tuple(self.logprobs),
        )  # fmt: skip


class Decoder:
    """A model, the requests that it is answering, and their keys and values.

    Rows of the batch are padded on the left, so that every row's newest token is in the last column. A row's positions
    count its own tokens alone; the mask hides its padding. Batches of other sizes round differently: a reply equals
    the one that the request would get alone up to ties within the precision of the weights.

    Args:
        network: a transformers causal language model in evaluation mode.
        tokenizer: its tokenizer.
        end_ids: tokens that end a reply.
        context_length: most tokens of prompt and reply together.
    """

    def __init__(self, network: Any, tokenizer: Any, end_ids: Sequence[int], context_length: int) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.vocabulary: int = network.get_input_embeddings().weight.shape[0]
        # A tokenizer may have grown beyond the model's rows, its end token among what came.
        self.end_ids = frozenset(each for each in end_ids if each < self.vocabulary)
        self.context_length = context_length
        self.rows: list[Request] = []
        self._mask = torch.empty(0, 0, dtype=torch.long, device=network.device)  # [rows, columns], 0 at padding
        self._newest = torch.empty(0, 1, dtype=torch.long, device=network.device)  # [rows, 1], not in the cache yet
        # Without the model's config every layer keeps all keys, also of a sliding window: rows can then be cut and
        # joined alike, and the mask still hides what the window leaves behind.
        self._cache = DynamicCache()

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be answered within the context.

        Raises:
            ContextError: prompt and reply are longer than the model's context.
            CptError: the prompt is empty, or holds a token that the model does not have.
        """
        if not request.ids:
            raise CptError("the prompt is empty: it has no token")
        check_ids(request.ids, self.vocabulary, "the prompt")
        if request.longest > self.context_length:
            raise ContextError(
                f"the prompt has {len(request.ids):,} tokens and the reply up to {request.sampling.max_tokens:,}; the "
                f"model's context is {self.context_length:,}. Shorten the prompt, or ask for fewer tokens (max_tokens)"
            )

    @torch.inference_mode()
    def add(self, requests: Sequence[Request]) -> list[tuple[Request, Piece]]:
        """Take requests into the batch; returns each one's first piece.

        One that there is no memory for gets its error, and the batch goes on without it.
        """
        for request in requests:
            self.check(request)
        try:
            return self._add(requests)
        except Exception as error:
            if not _is_of_memory(error):
                raise
        # Here, where the error no longer holds what it was computing.
        _let_go()
        if len(requests) == 1:
            return [_without_memory(requests[0])]
        return [piece for request in requests for piece in self.add([request])]

    def _add(self, requests: Sequence[Request]) -> list[tuple[Request, Piece]]:
        """`add`; where it fails, the batch is as it was."""
        for request in requests:
            request.logprobs, request.error = [], None  # of an attempt that failed
            request.detokenizer = _Detokenizer(self.tokenizer, request.ids)
            request.generator = torch.Generator().manual_seed(request.sampling.seed)
            request.stop_ids = [self._special[each] for each in request.sampling.stop if each in self._special]
        longest = max(len(request.ids) for request in requests)
        device = self.network.device
        ids = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, longest - len(request.ids) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        # Padding counts as position 0: the mask hides it, and a negative one would index out of the table.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache()
        logits = self._logits(
            requests, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        )
        tokens = [self._draw(request, row) for request, row in zip(requests, logits, strict=True)]
        self._join(list(requests), cache, mask, torch.tensor(tokens, device=device)[:, None])
        return self._take(list(requests), tokens)

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Piece]]:
        """Let every request in the batch have one token more; those that end leave it.

        Where there is no memory for all of them, the newest leave with an error until there is.
        """
        pieces: list[tuple[Request, Piece]] = []
        while self.rows:
            try:
                logits = self._column()
                break
            except Exception as error:
                if not _is_of_memory(error):
                    raise
            pieces.append(_without_memory(self.rows[-1]))
            self._keep(list(range(len(self.rows) - 1)))
            _let_go()
        else:
            return pieces
        rows = list(self.rows)
        tokens = self._draw_all(rows, logits)
        self._newest = torch.tensor(tokens, device=self._newest.device)[:, None]
        return pieces + self._take(rows, tokens)

    def _column(self) -> torch.Tensor:
        """Put every row's newest token into the cache; the logits behind it. Where it fails, the batch is as it was."""
        mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        positions = mask.sum(-1, keepdim=True) - 1
        try:
            logits = self._logits(
                self.rows, input_ids=self._newest, attention_mask=mask, position_ids=positions,
                past_key_values=self._cache,
            )  # fmt: skip
        except BaseException:
            columns = self._mask.shape[1]
            for layer in self._cache.layers:  # of which the first have one column more by now
                layer.keys, layer.values = layer.keys[:, :, :columns], layer.values[:, :, :columns]
            raise
        self._mask = mask
        return logits

    def clear(self) -> None:
        """Take every request out of the batch; copies nothing, as memory may have run out."""
        for request in self.rows:
            request.finish_reason = "cancelled"
        self._keep([])

    def cancel(self, request: Request) -> None:
        """Take a request out of the batch, wherever it is."""
        if request in self.rows:
            request.finish_reason = "cancelled"
            self._keep([row for row, each in enumerate(self.rows) if each is not request])

    def _logits(self, rows: Sequence[Request], **inputs: Any) -> torch.Tensor:
        """Of the last column, [rows, vocabulary]; a request of which they are no numbers gets its error."""
        logits = self.network(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
        broken = ~logits.amax(-1).isfinite()  # by NaN too, of which argmax would take the first, without a word
        if not bool(broken.any()):
            return logits
        for row in broken.nonzero().flatten().tolist():
            rows[row].error = BrokenModelError(
                f"the model computes NaN: its weights hold NaN or infinity, as after a training that diverged, or "
                f"overflow in {logits.dtype}"
            )
        # The others go on; what is drawn for these is not looked at.
        return logits.masked_fill(broken[:, None], 0)

    def _draw_all(self, rows: list[Request], logits: torch.Tensor) -> list[int]:
        if all(_is_plainly_greedy(request.sampling) for request in rows):
            return logits.argmax(-1).tolist()  # one transfer from the GPU instead of one a row
        return [self._draw(request, row) for request, row in zip(rows, logits, strict=True)]

    def _draw(self, request: Request, logits: torch.Tensor) -> int:
        """The next token of one request; `logits` [vocabulary] are the model's."""
        sampling, given = request.sampling, logits.float()
        # Before temperature and in fp32, as in CTRL and transformers.
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted({*request.ids, *request.reply_ids}), device=logits.device)
            chosen, penalty = given[seen], sampling.repetition_penalty
            penalized = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
            given = given.scatter(0, seen, penalized)
        if request.tokens < sampling.min_tokens:
            given = given.index_fill(
                0, torch.tensor(sorted(self.end_ids), device=given.device, dtype=torch.long), -torch.inf
            )
        if sampling.temperature < GREEDY_BELOW:
            token = int(given.argmax())
        else:
            # On the CPU, where a generator's numbers are the same on every machine.
            scaled = given.cpu() / min(sampling.temperature, UNIFORM_ABOVE)
            token = int(torch.multinomial(_truncated(scaled, sampling).softmax(-1), 1, generator=request.generator))
        if sampling.logprobs is not None:
            request.logprobs.append(self._logprob(token, logits.float().log_softmax(-1), sampling.logprobs))
        return token

    def _logprob(self, token: int, logprobs: torch.Tensor, count: int) -> TokenLogprob:
        best = logprobs.topk(count) if count else None
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
        bytes_of = self._token_bytes
        return TokenLogprob(
            bytes_of(token), float(logprobs[token]), tuple((bytes_of(each), value) for each, value in pairs)
        )

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    @cached_property
    def _special(self) -> dict[str, int]:
        """Tokens that are left out of a reply's text."""
        return {each.content: number for number, each in self.tokenizer.added_tokens_decoder.items() if each.special}

    def _take(self, rows: list[Request], tokens: list[int]) -> list[tuple[Request, Piece]]:
        """Give each request its token; drop from the batch those that end with it."""
        pieces = [(request, self._piece(request, token)) for request, token in zip(rows, tokens, strict=True)]
        if any(request.finish_reason for request in rows):
            self._keep([row for row, request in enumerate(self.rows) if request.finish_reason is None])
        return pieces

    def _piece(self, request: Request, token: int) -> Piece:
        if request.error is not None:
            request.finish_reason = "cancelled"
            return Piece("", "cancelled")
        request.first_token = request.first_token or time.monotonic()
        request.reply_ids.append(token)
        new = request.held_back
        # An end token is no text, and is not decoded. Nor is any special one: as a stop string it is known by its id.
        if token in self.end_ids or token in request.stop_ids:
            request.finish_reason = "stop"
        else:
            new += request.detokenizer.step(token)
            if request.tokens == request.sampling.max_tokens:
                request.finish_reason = "length"
        new, request.held_back, stopped = _until_stop(new, request.sampling.stop)
        if stopped:
            request.finish_reason = "stop"
        elif request.finish_reason:  # nothing can complete the stop string any more
            new, request.held_back = new + request.held_back, ""
        request.text += new
        logprobs = tuple(request.logprobs[-1:]) if request.sampling.logprobs is not None else ()
        return Piece(new, request.finish_reason, logprobs)

    def _join(self, requests: list[Request], cache: DynamicCache, mask: torch.Tensor, newest: torch.Tensor) -> None:
        """Put new rows under the old ones, the shorter of both padded on the left."""
        if not self.rows:
            self.rows, self._cache, self._mask, self._newest = requests, cache, mask, newest
            return
        # On the left: the newest position is then the last column of every row.
        rows, before = self._mask.shape
        columns = max(before, mask.shape[1])
        try:
            for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
                ours.keys = torch.cat([_left_padded(ours.keys, columns), _left_padded(theirs.keys, columns)])
                ours.values = torch.cat([_left_padded(ours.values, columns), _left_padded(theirs.values, columns)])
        except BaseException:
            for layer in self._cache.layers:  # of which the first have all rows by now
                layer.keys, layer.values = (
                    each[:rows, :, each.shape[2] - before :] for each in (layer.keys, layer.values)
                )
            raise
        masks = [torch.nn.functional.pad(each, (columns - each.shape[1], 0)) for each in (self._mask, mask)]
        self._mask = torch.cat(masks)
        self._newest = torch.cat([self._newest, newest])
        self.rows = [*self.rows, *requests]

    def _keep(self, rows: list[int]) -> None:
        """Drop every other row, and the columns that are padding in all of those that stay."""
        self.rows = [self.rows[row] for row in rows]
        if not rows:
            self._cache = DynamicCache()
            return
        first_ones = rows == list(range(len(rows)))  # of which nothing need be copied
        kept: Any = slice(len(rows)) if first_ones else torch.tensor(rows, device=self._mask.device)
        self._newest, mask = self._newest[kept], self._mask[kept]
        # The first column that any row uses.
        first = int(mask.any(0).int().argmax())
        self._mask = mask[:, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept][:, :, first:], layer.values[kept][:, :, first:]


def _is_of_memory(error: Exception) -> bool:
    """Whether an error says that there was no memory; PyTorch has a class of it for GPUs alone."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    )


def _let_go() -> None:
    """Give back what was allocated in pieces that nothing fits into."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _without_memory(request: Request) -> tuple[Request, Piece]:
    request.finish_reason = "cancelled"
    request.error = NoMemoryError(
        f"there is no memory for a prompt of {len(request.ids):,} tokens and its reply beside those that are being "
        "answered: shorten it, ask for fewer tokens, or serve with a smaller --batch-tokens"
    )
    return request, Piece("", "cancelled")


def check_ids(ids: Sequence[int], rows: int, name: str) -> None:
    """Refuse tokens that a model has no row for: its whole batch would fail with them, on a GPU the process.

    Args:
        ids: the tokens.
        rows: of the model's embedding.
        name: what a message calls the text.

    Raises:
        CptError: there is such a token.
    """
    if beyond := [each for each in ids if not 0 <= each < rows]:
        raise CptError(f"{name} holds the token {beyond[0]}, outside of 0 to {rows - 1}: the model has no other")


class _Detokenizer:
    """Text from tokens one by one; a character whose bytes are not all there yet gives nothing."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.fast = getattr(tokenizer, "_tokenizer", None)
        if self.fast is not None:
            from tokenizers.decoders import DecodeStream

            # The prompt's last tokens, because some decoders strip the blank of a text's first word.
            self.stream = DecodeStream(ids=prompt[-8:], skip_special_tokens=True)
            self.pending: list[int] = []  # tokens that have given no text yet
        else:
            self.ids: list[int] = []
            self.given = ""

    def step(self, token: int) -> str:
        """The text that this token completes."""
        if self.fast is not None:
            return self._streamed(token)
        self.ids.append(token)
        # All of them each time: a slow tokenizer's text of a token depends on those before it.
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        # Bytes of a character that the next token will complete.
        if text.endswith("\ufffd"):
            return ""
        new, self.given = text[len(self.given) :], text
        return new

    def _streamed(self, token: int) -> str:
        from tokenizers.decoders import DecodeStream

        self.pending.append(token)
        try:
            text = self.stream.step(self.fast, token) or ""
        except Exception:  # bare, of tokenizers: with byte fallback a wrong byte undoes characters that were given
            text = self.tokenizer.decode(self.pending, skip_special_tokens=True)
            self.stream = DecodeStream(ids=self.pending, skip_special_tokens=True)
        if text:
            self.pending = []
        return text


def _is_plainly_greedy(sampling: Sampling) -> bool:
    extras = (sampling.logprobs, sampling.min_tokens or None, None if sampling.repetition_penalty == 1 else 1)
    return sampling.temperature < GREEDY_BELOW and extras == (None, None, None)


def _truncated(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The logits [vocabulary] with -inf where top_k or top_p leave a token out."""
    if sampling.top_k and sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        values, order = logits.sort(descending=True)
        probabilities = values.softmax(-1)
        # A token stays if those before it have not reached top_p: the first always does.
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.scatter(0, order, values.masked_fill(outside, -torch.inf))
    return logits


def _until_stop(text: str, stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """Text that is safe to give, text to hold back since a stop string may begin in it, whether one was complete."""
    found = [place for each in stop if (place := text.find(each)) >= 0]
    if found:
        return text[: min(found)], "", True
    # Only the end of the text can be a stop string's beginning, and the longest such end is held back.
    for start in range(max(0, len(text) - max(map(len, stop), default=1) + 1), len(text)):
        if any(each.startswith(text[start:]) for each in stop):
            return text[:start], text[start:], False
    return text, "", False


def _left_padded(states: torch.Tensor, columns: int) -> torch.Tensor:
    """Keys or values [rows, heads, columns, head size] with zeros on the left, which the mask hides."""
    missing = columns - states.shape[2]
    return torch.nn.functional.pad(states, (0, 0, missing, 0)) if missing else states
