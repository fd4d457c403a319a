"""The loss of a model on text: nats per token, perplexity, and bits per byte.

Bits per byte, the loss in bits divided by the bytes of the text in UTF-8, is the only one that can be compared across
tokenizers (The Pile, arXiv 2101.00027, section 3.1).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint.tokenizer_ids import END_OF_TEXT
from nemo_cpt.compatibility import check_data, check_largest_id, read_base
from nemo_cpt.conversations.dataset import open_conversations
from nemo_cpt.conversations.mixture import SEED, check_any_fits, sequences_of
from nemo_cpt.corpus import full_prefix, read_index, read_manifest
from nemo_cpt.corpus.dataset.manifest import manifest_path
from nemo_cpt.errors import CptError
from nemo_cpt.inference.decoding import check_ids
from nemo_cpt.inference.engine import check_characters
from nemo_cpt.inference.token_bytes import TokenBytes
from nemo_cpt.inference.transformers_engine import TransformersEngine
from nemo_cpt.training.masks import MASKS

LOGITS_BYTES = 2**29  # of one forward pass, in fp32
LOSS_ROWS = 256  # whose softmax is computed at once: all of them together would take as much memory again
MOST_TOKENS = 16_384  # of one forward pass, however small the vocabulary
SORTED_WINDOWS = 512  # windows that are sorted by length before they are batched: little padding, flat memory
WINDOW = 2048  # tokens
UNCOUNTED = -100  # as a label: cross_entropy's own
Tell = Callable[[int], None]
Window = tuple[int, list[int], list[int]]  # its unit's number, the tokens that are read, a label for each


@dataclass(frozen=True)
class TextLoss:
    """The loss on a set of texts, by unit: a sequence that a run validates on, a document, or a conversation's answers.

    Attributes:
        unit: "sequence", "document" or "conversation"; what is resampled for an interval.
        nats: summed cross-entropy of each unit.
        tokens: tokens predicted in each.
        bytes: bytes in UTF-8 of the text of those tokens; special tokens have none.
        first_token: what the model was given before the first token that it predicts, in words.
    """

    unit: str
    nats: Sequence[float]
    tokens: Sequence[int]
    bytes: Sequence[int]
    first_token: str

    @property
    def loss(self) -> float:
        """Nats per token."""
        return math.fsum(self.nats) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss), of a token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of the text."""
        # Sums before the division: the mean of documents' own values would weigh a short one as much as a long one.
        return math.fsum(self.nats) / math.log(2) / sum(self.bytes)


@checked
def sequences_loss(
    engine: TransformersEngine,
    prefix: str | Path,
    *,
    seq_length: int,
    samples: int | None = None,
    seed: int = SEED,
    eod_mask_loss: bool = False,
    reset_attention_mask: bool = False,
    reset_position_ids: bool = False,
    tell: Tell = lambda done: None,
) -> TextLoss:
    """The loss on the very sequences that a run validates on.

    As in the training, sequences are cut from the documents one after another, so that most begin inside of one, and
    the token that ends a document is predicted like any other: it counts in the nats, and has no bytes.

    Args:
        engine: the model, in this process.
        prefix: Megatron prefix of the tokenized text, as `prepare` wrote it.
        seq_length: tokens predicted in each sequence.
        samples: sequences to read, where the text is shorter again from its start; the whole text once when None.
        seed: the run's, which decides which sequences of a longer text are the first.
        eod_mask_loss: do not count what is predicted from a document's end, as in a run with Megatron's setting.
        reset_attention_mask: look at no document before a token's own, as in a run with Megatron's setting.
        reset_position_ids: count positions from each document's beginning; of learnt positions alone, as in Megatron.
        tell: called with the sequences that are done.

    Raises:
        CptError: the text was tokenized for another model, it does not fit the context, or a number is not positive.
    """
    samples = whole_sequences(prefix, seq_length) if samples is None else samples
    if min(seq_length, samples) < 1:
        raise CptError(f"seq_length {seq_length} and samples {samples} have to be 1 or more")
    _check_window(engine, seq_length)
    # Another end of text does not change what the tokens mean, and is the tuned model's right.
    check_data(read_base(engine.name), [str(prefix)], unlike_base=[END_OF_TEXT])
    bytes_of = ByteCounter(engine.tokenizer)
    resets = {"reset_attention_mask": reset_attention_mask, "reset_position_ids": reset_position_ids}
    masks = {"eod_mask_loss": eod_mask_loss, **resets}
    # Through Megatron's own dataset: the very samples, in the order that the training's validation has.
    dataset, rows = _dataset(engine, prefix, seq_length, samples, seed, **masks), _rows(engine)
    size = _batch_rows(engine, seq_length)
    nats: list[float] = []
    counts: list[int] = []
    sizes: list[int] = []
    for start in range(0, samples, size):
        batch = [dataset[index] for index in range(start, min(start + size, samples))]
        tokens, labels = (torch.stack([sample[name] for sample in batch]) for name in ("tokens", "labels"))
        check_largest_id(int(torch.maximum(tokens, labels).max()), rows, str(prefix))
        _refuse_double_bos(engine, tokens, str(prefix))
        counted = torch.stack([sample["loss_mask"] for sample in batch]).bool()
        seen = None
        if any(resets.values()):
            positions = torch.stack([sample["position_ids"] for sample in batch]) if reset_position_ids else None
            seen = _Seen(torch.stack([sample["attention_mask"] for sample in batch]), positions)
        nats += _nats(engine, tokens, labels.masked_fill(~counted, UNCOUNTED), seen).sum(1).tolist()
        counts += counted.sum(1).tolist()
        sizes += bytes_of(tokens, labels, counted)
        tell(len(nats))
    _refuse_nan(engine, nats)
    how = [_first_of_documents(engine, prefix), *(said for name, said in MASKS.items() if masks[name])]
    return TextLoss("sequence", nats, counts, sizes, "; ".join(how))


def whole_sequences(prefix: str | Path, seq_length: int) -> int:
    """How many whole sequences a text has.

    Raises:
        CptError: it has less than one.
    """
    tokens = read_index(prefix).tokens
    if tokens <= seq_length:
        raise CptError(f"{prefix} has {tokens:,} tokens, not enough for one sequence of {seq_length:,} and a label")
    return (tokens - 1) // seq_length


@checked
def documents_loss(
    engine: TransformersEngine,
    texts: Iterable[str],
    *,
    window: int | None = None,
    overlap: int = 1,
    tell: Tell = lambda done: None,
) -> TextLoss:
    """The loss on whole documents, each from its first token on, through a window that slides over the long ones.

    With an overlap of 1 this is lm-evaluation-harness' `loglikelihood_rolling` (lm_eval/utils.py,
    `get_rolling_token_windows`): every token is predicted once; the first one from the BOS token (EOS where a
    tokenizer has no BOS), those of the first window from all before them, those of a later window from that window
    alone. A larger overlap gives more context, and costs more passes.

    Args:
        engine: the model, in this process.
        texts: the documents; gone through once, and never all in memory.
        window: most tokens of a forward pass; `WINDOW`, or the context if that is shorter, when None.
        overlap: tokens of a window that it has in common with the window before.
        tell: called with the documents that were read.

    Raises:
        CptError: a document begins with the BOS token already, or holds what tokenizer or model do not have; none has
            any text; or the window does not fit.
    """
    window = min(WINDOW, engine.context_length) if window is None else window
    _check_window(engine, window)
    if not 1 <= overlap <= window:
        raise CptError(f"overlap is {overlap}; it must be between 1 and the window, {window}")
    first, name = _first_token(engine)
    nats, tokens, sizes = list[float](), list[int](), list[int]()

    def windows() -> Iterator[Window]:
        for number, text in enumerate(texts):
            check_characters(text, f"document {number + 1}")
            ids = engine.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            check_ids(ids, _rows(engine), f"document {number + 1}")
            # Refused and not dropped: the document's bytes would no longer be those that the tokens stand for.
            if ids[:1] == [first]:
                raise CptError(
                    f"document {number + 1} begins with {name!r}, which every document is given: it would be there "
                    "twice. Remove it from the text"
                )
            nats.append(0.0)
            tokens.append(len(ids))
            sizes.append(len(text.encode()))
            for given, predicted in rolling_windows(ids, first, window, overlap):
                yield number, given, [*[UNCOUNTED] * (len(given) - len(predicted)), *predicted]
            tell(number + 1)

    _add_nats(engine, windows(), nats)
    if not sum(tokens):
        raise CptError(f"there is no text to measure: {len(tokens)} documents, none with a token")
    _refuse_nan(engine, nats)
    return TextLoss("document", nats, tokens, sizes, f"{name} ({first}), once before each document")


@checked
def conversations_loss(
    engine: TransformersEngine,
    prefix: str | Path,
    *,
    seq_length: int,
    too_long: str = "drop",
    sequences: int | None = None,
    limit: int | None = None,
    tell: Tell = lambda done: None,
) -> TextLoss:
    """The loss on the answers of conversations, each read by itself: what a run that validates on them measures.

    Counted is what `prepare` marked as trained on: an answer's tokens, and the one that ends it, which has no bytes.

    Args:
        engine: the model, in this process.
        prefix: of the set, as `prepare --template` wrote it.
        seq_length: of a training's sequences, in which a conversation has to fit.
        too_long: what becomes of a longer one: `drop` or `cut`, after the last answer that fits.
        sequences: of packed conversations that a run validates on, where these are not all.
        limit: conversations to stop after.
        tell: called with the conversations that were read.

    Raises:
        CptError: the set was tokenized for another model, no conversation fits, or a number is not positive.
    """
    if any(each is not None and each < 1 for each in (seq_length, sequences, limit)):
        raise CptError(f"seq_length {seq_length}, sequences {sequences} and limit {limit} have to be 1 or more")
    _check_window(engine, seq_length)
    chats = open_conversations(prefix)
    check_data(read_base(engine.name), [chats.prefix], unlike_base=[END_OF_TEXT])
    packing, fit = sequences_of(chats, seq_length, too_long)
    check_any_fits(fit, chats.prefix)
    # In their own order, whatever the packing's, so that a limit takes the first of the file.
    end = packing.starts[min(len(packing), sequences or len(packing))]
    numbers = sorted(packing.members[:end].tolist())[:limit]
    bytes_of = ByteCounter(engine.tokenizer)
    nats, tokens, sizes = list[float](), list[int](), list[int]()

    def windows() -> Iterator[Window]:
        for at, number in enumerate(numbers):
            ids, trained = (torch.as_tensor(each[: fit.positions[number] + 1].astype("int64"))
                            for each in chats.read(number))  # fmt: skip
            given, labels, counted = ids[:-1], ids[1:], trained[1:].bool()
            nats.append(0.0)
            tokens.append(int(counted.sum()))
            sizes.extend(bytes_of(given[None], labels[None], counted[None]))
            tell(at + 1)
            yield at, given.tolist(), labels.masked_fill(~counted, UNCOUNTED).tolist()

    _add_nats(engine, windows(), nats)
    _refuse_nan(engine, nats)
    template = Path(chats.manifest["template"]["name"]).name
    return TextLoss("conversation", nats, tokens, sizes, f"an answer's, after its question in the template {template}")


def rolling_windows(
    ids: Sequence[int], first: int, window: int, overlap: int = 1
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each window of a document: the tokens that are read, and the last of their successors, predicted.

    Args:
        ids: the document's tokens.
        first: the token before it.
        window: most tokens of a window.
        overlap: tokens of a window that belong to the one before.
    """
    whole, done = [first, *ids], 0
    while done < len(ids):
        # A later window spends `overlap` of its tokens on what was predicted before, but its last token predicts, too.
        end = min(len(ids), done + window - overlap + 1 if done else window)
        yield whole[max(0, end - window) : end], list(ids[done:end])
        done = end


@dataclass(frozen=True)
class _Seen:
    """What positions see, where that is not all before them.

    Attributes:
        hidden: what each must not look at, bool of [rows, 1, columns, columns].
        positions: their numbers, [rows, columns]; counted from the sequence's beginning when None.
    """

    hidden: torch.Tensor
    positions: torch.Tensor | None

    def given(self, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The network's arguments."""
        # A sum that every attention takes, eager and fused. With positions too: by these alone transformers would take
        # the documents for sequences of their own.
        mask = torch.zeros(self.hidden.shape, dtype=dtype, device=device)
        mask.masked_fill_(self.hidden.to(device), torch.finfo(dtype).min)
        positions = {} if self.positions is None else {"position_ids": self.positions.to(device)}
        return {"attention_mask": mask, **positions}


@torch.inference_mode()
def _nats(
    engine: TransformersEngine, tokens: torch.Tensor, labels: torch.Tensor, seen: _Seen | None = None
) -> torch.Tensor:
    """Cross-entropy of each label [rows, columns] after its token [rows, columns]; labels of `UNCOUNTED` give 0."""
    device = engine.network.device
    given = seen.given(device, engine.network.dtype) if seen else {}
    logits = engine.network(input_ids=tokens.to(device), use_cache=False, **given).logits.flatten(0, 1)
    parts = zip(logits.split(LOSS_ROWS), labels.to(device).flatten().split(LOSS_ROWS), strict=True)
    # fp32 for the softmax, whatever the weights' type: in bf16 sums of 100,000 terms lose digits.
    losses = [cross_entropy(part.float(), wanted, reduction="none") for part, wanted in parts]
    return torch.cat(losses).view(labels.shape).double()


def _add_nats(engine: TransformersEngine, windows: Iterator[Window], nats: list[float]) -> None:
    """Add the nats of each window to those of its unit, which has its place once the window is drawn."""
    # A window of windows: sorting all would hold the corpus in memory.
    while taken := sorted(islice(windows, SORTED_WINDOWS), key=lambda each: len(each[1])):
        while taken:
            # From the longest on: a batch that does not fit shows at once, not in the end.
            batch = [taken.pop() for _ in range(min(len(taken), _batch_rows(engine, len(taken[-1][1]))))]
            for (unit, *_), value in zip(batch, _window_nats(engine, batch), strict=True):
                nats[unit] += value


def _window_nats(engine: TransformersEngine, batch: Sequence[Window]) -> list[float]:
    """The nats of each window's labels. Padding stands on the right, where causal attention never looks."""
    width = max(len(given) for _, given, _ in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full_like(tokens, UNCOUNTED)
    for row, (_, given, wanted) in enumerate(batch):
        tokens[row, : len(given)] = torch.tensor(given)
        labels[row, : len(given)] = torch.tensor(wanted)
    return _nats(engine, tokens, labels).sum(1).tolist()


def _batch_rows(engine: TransformersEngine, width: int) -> int:
    # By the logits, tokens x vocabulary in fp32: with small models they are the largest of all.
    return max(1, min(MOST_TOKENS, LOGITS_BYTES // 4 // _rows(engine)) // width)


def _rows(engine: TransformersEngine) -> int:
    return engine.network.get_input_embeddings().num_embeddings


def _check_window(engine: TransformersEngine, window: int) -> None:
    if not 1 <= window <= engine.context_length:
        raise CptError(
            f"{window:,} tokens of a sequence do not fit {engine.name}, whose context is {engine.context_length:,}: "
            "give a shorter one"
        )


def _first_token(engine: TransformersEngine) -> tuple[int, str]:
    """The id and the name of what stands before every document."""
    tokenizer = engine.tokenizer
    for number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if number is not None:
            return number, tokenizer.convert_ids_to_tokens(number)
    raise CptError(f"the tokenizer of {engine.name} has neither BOS nor EOS: nothing can stand before a first token")


def _refuse_nan(engine: TransformersEngine, nats: Sequence[float]) -> None:
    if not all(map(math.isfinite, nats)):
        raise CptError(
            f"the loss of {engine.name} is not finite: its weights hold NaN or infinity, as after a training that "
            f"diverged, or overflow in {engine.network.dtype}"
        )


def _refuse_double_bos(engine: TransformersEngine, tokens: torch.Tensor, prefix: str) -> None:
    bos = engine.tokenizer.bos_token_id
    if bos is None or bos == engine.tokenizer.eos_token_id:  # where they are one token, an empty document has two
        return
    if bool(((tokens[:, :-1] == bos) & (tokens[:, 1:] == bos)).any()):
        raise CptError(
            f"{prefix} has documents that begin with {engine.tokenizer.bos_token!r} ({bos}) twice: the model never saw "
            "that. Prepare it again without the one that stands in the text"
        )


def _first_of_documents(engine: TransformersEngine, prefix: str | Path) -> str:
    from nemo_cpt.corpus.dataset.index import read_tokens

    index = read_index(prefix)
    first = next((int(ids[0]) for at in range(index.documents) if len(ids := read_tokens(index, at))), None)
    begun = first is not None and first == engine.tokenizer.bos_token_id
    begins = f"{engine.tokenizer.bos_token} ({first}), once" if begun else "no BOS token"
    return f"as in the training: sequences begin anywhere; the documents' own first token is {begins}"


def _dataset(
    engine: TransformersEngine, prefix: str | Path, seq_length: int, samples: int, seed: int, *,
    eod_mask_loss: bool, reset_attention_mask: bool, reset_position_ids: bool,
) -> Any:  # fmt: skip
    from nemo_cpt.training.datasets import VALIDATION, gpt_dataset  # imports NeMo

    return gpt_dataset(
        {full_prefix(prefix): 1.0},
        samples,
        VALIDATION,
        random_seed=seed,
        sequence_length=seq_length,
        # No index is kept: the text may be somebody else's, in a folder that is not ours to write to.
        path_to_cache="",
        tokenizer=SimpleNamespace(eod=_end_of_documents(engine, prefix), unique_identifiers={"class": "evaluation"}),
        reset_position_ids=reset_position_ids,
        create_attention_mask=reset_attention_mask or reset_position_ids,
        reset_attention_mask=reset_attention_mask,
        eod_mask_loss=eod_mask_loss,
    )


def _end_of_documents(engine: TransformersEngine, prefix: str | Path) -> int | None:
    """The token behind each document, as the data have it: a tuned model's own end of text may be another."""
    stated = read_manifest(prefix).get("markers", {}).get("eod") if manifest_path(prefix).is_file() else None
    return stated[1] if stated else engine.tokenizer.eos_token_id


class ByteCounter:
    """The bytes of text that the labels of sequences stand for, also where a character falls apart into tokens.

    Raises:
        CptError: the tokenizer's tokens do not say their bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        bytes_of, size = TokenBytes(tokenizer), len(tokenizer)
        special = {number for number, each in tokenizer.added_tokens_decoder.items() if each.special}
        self.special = torch.tensor([number in special for number in range(size)])
        self.sizes = torch.tensor([0 if number in special else len(bytes_of(number)) for number in range(size)])
        # A single letter: what its tokens hold beyond it is what the tokenizer puts before every text.
        ids = tokenizer("a", add_special_tokens=False).input_ids
        self.dummy = int(self.sizes[ids].sum()) - 1  # the blank that sentencepiece puts before a text
        self._check(tokenizer)

    def _check(self, tokenizer: Any) -> None:
        from nemo_cpt.corpus.tokenization.probes import TEXTS

        for text in TEXTS:
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            special = int(self.special[ids].sum())
            decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if not special and int(self.sizes[ids].sum()) - self.dummy != len(decoded.encode()):
                raise CptError(
                    f"the bytes that the tokens of {type(tokenizer).__name__} stand for are not known (those of "
                    f"{text!r} are counted wrong): give the text itself, as JSONL"
                )

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor, counted: torch.Tensor) -> list[int]:
        """Bytes of each row's labels that are counted; tokens, labels and counted (bool) are [rows, columns]."""
        # Where a document begins, sentencepiece's blank is no character of it.
        begins = self.special[tokens] & ~self.special[labels]
        return ((self.sizes[labels] - self.dummy * begins) * counted).sum(1).tolist()
