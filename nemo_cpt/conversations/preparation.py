"""Conversations to tokens with a mask, by the machinery that prepares texts: as fast, and resumable at any moment."""

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.conversations.dataset import KIND, check_fit, conversations_prefix, open_conversations
from nemo_cpt.conversations.encode import PieceEncoder, Pieces, choose_piece_encoder, encode_pieces
from nemo_cpt.conversations.forms import AUTO, Conversation, check_form, read_conversation
from nemo_cpt.conversations.inspection import SEQ_LENGTH, Fitting, fit_and_pack, warnings_of
from nemo_cpt.conversations.templates import TRAIN_ON, ChatTemplate, check_there, load_template
from nemo_cpt.corpus.dataset.index import dtype_for
from nemo_cpt.corpus.dataset.manifest import copies_of_inputs
from nemo_cpt.corpus.preparing import preparation
from nemo_cpt.corpus.preparing.encode import BATCH, COMPARED_TASKS, Encoded, Work, choose_passages, count_lengths
from nemo_cpt.corpus.preparing.job import SAMPLE_BYTES, SAMPLE_TEXTS
from nemo_cpt.corpus.preparing.journal import Journal
from nemo_cpt.corpus.preparing.output import HeadStart, Output, Run
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.reading.chunks import Feed, Task, take_from
from nemo_cpt.corpus.reading.lines import UnusableError
from nemo_cpt.corpus.reading.sources import Inputs, Source, list_sources
from nemo_cpt.corpus.reading.tally import Policy
from nemo_cpt.corpus.tokenization.characters import Lookout
from nemo_cpt.corpus.tokenization.encoder_choice import PROBES
from nemo_cpt.corpus.tokenization.tokenizer import Encoder, Tokenizer, load_tokenizer
from nemo_cpt.errors import CptError


@dataclass(frozen=True)
class ConversationReport:
    """What `prepare` did with conversations.

    Attributes:
        prefix: Of the files, `OUTPUT_conversations`.
        status: `written`, `resumed` (written, the first part by an earlier run) or `unchanged` (it was there already).
        conversations: Number of conversations.
        answers: Answers that are trained on.
        tokens: Number of tokens.
        trained: Tokens that are trained on.
        longest: Tokens of the longest conversation.
        forms: Conversations by the form that they had.
        skipped: Lines left out, by reason.
        dtype: `int32` or `uint16`.
        encoder: What encoded, and why that.
        tokenizer: `name`, `sha256`, `vocabulary_size`, `eos` and `bos` as [text, id].
        template: `name`, `sha256`, `text`, and the `stop` token and other special `tokens` that it uses.
        fitting: How the conversations fit into sequences.
        compared: Passages that the encoder and the reference tokenizer were compared on while it worked.
        seconds: Time spent reading, encoding and writing, over all runs.
        rates: Of this run, by name: `conversations_per_second`, `megabytes_per_second` (10^6 bytes of input),
            `tokens_per_second`.
        warnings: Sentences for people.
    """

    prefix: str
    status: str
    conversations: int
    answers: int
    tokens: int
    trained: int
    longest: int
    forms: dict[str, int]
    skipped: dict[str, int]
    dtype: str
    encoder: str
    tokenizer: dict[str, Any]
    template: dict[str, Any]
    fitting: Fitting
    compared: int
    seconds: float
    rates: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@checked
def prepare(
    inputs: Inputs,
    output_prefix: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    *,
    template: str,
    form: str = AUTO,
    system: str | None = None,
    train_on: str = "assistant",
    seq_length: int = SEQ_LENGTH,
    too_long: str = "drop",
    workers: int | None = None,
    on_error: str = "stop",
    max_skipped: float | None = None,
    fast: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
    chunk_bytes: int = 1 << 20,
    checkpoint_seconds: float = 15.0,
    patience: float = 10.0,
) -> ConversationReport:
    """Tokenize conversations into `OUTPUT_PREFIX_conversations.bin`, `.idx`, `.mask` and `.json`.

    The tokens of an answer, up to and with the one that ends it, are marked as trained on; those of questions, system
    messages and the template are not. Conversations are kept whole, whatever their length: a training packs them into
    its own sequences. A run that is killed resumes when it is called again; one that is finished does nothing when it
    is called again.

    Args:
        inputs: A file, folder, glob or list of them: JSON lines (plain, gzip, zstd), Parquet, a dataset saved by
            `datasets`, or `hf:NAME[@CONFIG][:SPLIT]`.
        output_prefix: Where the set goes.
        tokenizer: Folder or hub name of a Hugging Face tokenizer that has a tokenizer.json.
        template: `llama3`, `chatml`, `mistral`, `alpaca-ja`, `-en`, `-zh`, `tokenizer` for the one that comes with the
            tokenizer, or the path of a Jinja file.
        form: `messages`, `sharegpt`, `alpaca`, a pair of fields such as `query/answer`; by default each conversation's
            keys tell it.
        system: A system message for conversations that have none.
        train_on: `assistant`: answers, but for those with `"train": false` or `"weight": 0`; `last`: the last answer of
            each conversation; `all`: every token.
        seq_length: Of a training's sequences. The set does not depend on it, the report does.
        too_long: What that training does with longer conversations: `drop` or `cut`. Again for the report.
        workers: Processes; all CPUs that this process may use by default.
        on_error: `stop` at a conversation that cannot be used, or `skip` it, count it and list it in
            `..._conversations.skipped.jsonl`.
        max_skipped: The share of the inputs that may be skipped, 0.01 by default.
        fast: Use fastokens where it agrees with the reference tokenizer; False takes the reference at once.
        overwrite: Replace an existing set, and an unfinished one of another job.
        quiet: Show no progress.
        chunk_bytes: Size of a worker's portion; the output does not depend on it.
        checkpoint_seconds: About so much work is lost when the run is killed.
        patience: Seconds to wait for another process that writes this output.

    Raises:
        CptError: An input, the tokenizer, the template or an option is unusable, the output exists, or the disk is
            full.
    """
    check_options(template, form, train_on, seq_length, too_long, workers, on_error, max_skipped, chunk_bytes)
    policy, count = Policy.of(on_error, max_skipped), count_processes(workers)
    sources = list_sources(inputs)
    prefix = conversations_prefix(output_prefix)
    # As for texts: where the set is there, nothing is loaded.
    head_start = HeadStart(fast and (overwrite or not Path(prefix + ".idx").exists()), False)
    with head_start:
        loaded = load_tokenizer(tokenizer, head_start.begin)
        reader = Reader(load_template(template, loaded), form, system, train_on)
        output = _ConversationOutput(prefix, sources, loaded, reader)
        status, rates = "unchanged", dict[str, float]()
        if not output.is_there(policy, overwrite):
            run = Run(policy, fast, True, count, chunk_bytes, checkpoint_seconds, patience, quiet, head_start)
            status, rates = output.make(run, overwrite)
    return _report(prefix, status, rates, seq_length, too_long)


def check_options(
    template: str,
    form: str,
    train_on: str,
    seq_length: int,
    too_long: str,
    workers: int | None,
    on_error: str,
    max_skipped: float | None,
    chunk_bytes: int,
) -> None:
    """Check the options of `prepare` that need neither inputs nor tokenizer.

    Raises:
        CptError: One is unusable.
    """
    preparation.check_options(workers, on_error, max_skipped, None, chunk_bytes)
    check_there(template)
    check_form(form)
    check_fit(seq_length, too_long)
    if train_on not in TRAIN_ON:
        raise CptError(f"train_on is {train_on!r}; it can be {', '.join(TRAIN_ON)}.")


@dataclass(frozen=True)
class Reading:
    """A conversation as it was read: its pieces, the form that it had, and what was not read of it."""

    pieces: Pieces
    form: str
    unread: tuple[str, ...]


class Reader:
    """Turns the object of a line into the pieces of a conversation."""

    def __init__(self, template: ChatTemplate, form: str, system: str | None, train_on: str) -> None:
        self.template, self.form, self.system, self.train_on = template, form, system, train_on

    def __call__(self, value: Any) -> Reading:
        """Return the pieces.

        Raises:
            UnusableError: The object cannot be used.
        """
        conversation = read_conversation(value, self.form, self.system)
        return Reading(self.template.pieces(conversation, self.train_on), conversation.form, conversation.unread)


class ConversationWork:
    """Encodes conversations; each worker's copy has a lookout of its own."""

    def __init__(
        self, encoder: Encoder, pieces: PieceEncoder, reader: Reader, dtype: str, lookout: Lookout | None
    ) -> None:
        self.encoder, self._pieces, self._reader = encoder, pieces, reader
        self._dtype, self._lookout = dtype, lookout

    def __call__(self, task: Task) -> tuple[Encoded, list[list[bytes]]]:
        """Encode a task; see `Work`."""
        import numpy as np

        found = take_from(task, self._reader)
        encoded, counts = Encoded(found.reading), Counter[str]()
        tokens, masks, lengths = [], [], []
        for i in range(0, len(found.texts), BATCH):
            batch: list[Reading] = found.texts[i : i + BATCH]
            result = encode_pieces([reading.pieces for reading in batch], self._pieces)
            tokens.append(result.tokens.astype(self._dtype, copy=False).tobytes())
            # A byte a token, beside the tokens: `files` of the output has their order.
            masks.append(result.mask.tobytes())
            lengths.append(result.lengths)
            encoded.largest = max(encoded.largest, int(result.tokens.max(initial=0)))
            if self._lookout is not None:
                texts = [text for reading in batch for text, _ in reading.pieces]
                offsets, first = np.cumsum([0, *result.counts]), i == 0 and task.index % COMPARED_TASKS == 0
                encoded.passages += choose_passages(texts, result.tokens, offsets, self.encoder, self._lookout, first)
            # Under a word of their own, since all counts share one mapping in the journal.
            counts.update(f"form {reading.form}" for reading in batch)
            counts.update(f"unread {key}" for reading in batch for key in reading.unread)
            counts["trained"] += int(result.mask.sum())
            # Each second piece is an answer; of train_on="all" those between them are trained on, too.
            counts["answers"] += sum(trained for reading in batch for _, trained in reading.pieces[1::2])
        count_lengths(encoded, lengths)
        encoded.nbytes, encoded.counts = sum(map(len, tokens)), dict(counts)
        return encoded, [tokens, masks]


class _ConversationOutput(Output):
    """A set of conversations."""

    def __init__(self, prefix: str, sources: list[Source], tokenizer: Tokenizer, reader: Reader) -> None:
        options = {
            "tokenizer_sha256": tokenizer.sha256,
            "tokenizer_reading": tokenizer.reading,
            "template_sha256": reader.template.sha256,
            "form": reader.form,
            # All that decides tokens or mask, and nothing else: a rerun with other workers is the same job.
            "system": reader.system,
            "train_on": reader.train_on,
        }
        dtype = dtype_for(max(tokenizer.vocabulary_size, tokenizer.highest + 1))
        files = ("bin", "mask")
        super().__init__(prefix, sources, tokenizer, dtype, options, json_key=None, files=files)
        self.reader = reader
        # Neither the template's text nor the vocabulary tells which of its tokens the settings call eos_token.
        template = reader.template
        self.tokens = {"stop": list(template.stop), "tokens": template.tokens}
        self.journal = Journal(prefix, options | self.tokens, files)

    def is_there(self, policy: Policy, overwrite: bool) -> bool:
        """Say whether the finished set of this very job exists, whole; see `Output`."""
        if not super().is_there(policy, overwrite):
            return False
        # The parent looks at `.bin` and `.idx`; the mask is ours to look at.
        template = open_conversations(self.prefix).manifest["template"]
        for key, value in self.tokens.items():
            if template[key] != value:
                raise CptError(self.refusal(f"its template's {key} is {template[key]!r}, not {value!r}"))
        return True

    def samples(self) -> list[str]:
        """Return the pieces of the first conversations, and of such of awkward texts; see `Output`."""
        return [text for pieces in self._tried for text, _ in pieces]

    @cached_property
    def _tried(self) -> list[Pieces]:
        # What the corpus has, and what would show a border that the encoder makes otherwise.
        return [*self._first(), *self._probes()]

    def make_work(self, encoder: Encoder, lookout: Lookout | None) -> tuple[Work, str]:
        """Return the encoding of conversations; see `Output`."""
        pieces, other = choose_piece_encoder(encoder, self.tokenizer, self._tried)
        apart = lookout if not other else None  # the other one is the reference
        note = f"conversations are encoded whole by {pieces.name}: {other}" if other else ""
        return ConversationWork(encoder, pieces, self.reader, self.dtype, apart), note

    def _first(self) -> list[Pieces]:
        """Return the pieces of the first conversations."""
        found, size = list[Pieces](), 0
        # None: whole objects, of which a conversation needs several fields.
        for task in Feed(self.sources, None, 1 << 18):
            for reading in take_from(task, self.reader).texts:
                found.append(reading.pieces)
                size += sum(len(text.encode()) for text, _ in reading.pieces)
                if size > SAMPLE_BYTES or len(found) == SAMPLE_TEXTS:
                    return found
        return found

    def _probes(self) -> list[Pieces]:
        """Return the pieces of conversations of awkward texts."""
        found = []
        for text in PROBES:
            messages = [{"role": role, "content": text} for role in ("user", "assistant")]
            try:
                found.append(self.reader.template.pieces(Conversation(messages, [False, True], "")))
            except UnusableError:  # an empty text, or one with this tokenizer's special tokens
                continue
        return found

    def describe(self) -> dict[str, Any]:
        """Return the template and the counts of answers; see `Output`."""
        counts, template = self.journal.progress.counts, self.reader.template
        return {
            "kind": KIND,
            "template": {
                "name": template.name,
                "sha256": template.sha256,
                "stop": template.stop,
                "tokens": template.tokens,
                "text": template.text,
            },
            "answers": counts["answers"],
            "trained": counts["trained"],
            "forms": {name.removeprefix("form "): n for name, n in counts.items() if name.startswith("form ")},
            "unread": {name.removeprefix("unread "): n for name, n in counts.items() if name.startswith("unread ")},
        }


def _report(prefix: str, status: str, rates: dict[str, float], seq_length: int, too_long: str) -> ConversationReport:
    chats = open_conversations(prefix)
    manifest = chats.manifest
    fitting = fit_and_pack(chats, seq_length, too_long)
    # Made anew each time: they depend on the sequence length asked for, which the set does not.
    warnings = copies_of_inputs(manifest["inputs"])
    warnings += [
        f"{count:,} conversations have {key!r} beside the content of an answer, which is not read: where it is to be "
        "trained on, write it into the content."
        for key, count in manifest.get("unread", {}).items()  # sets that older versions made have none
    ]
    warnings += warnings_of(manifest["trained"], manifest["tokens"], fitting, too_long)
    if skipped := sum(manifest["skipped"].values()):
        warnings.insert(0, f"{skipped} lines were left out; {prefix}.skipped.jsonl lists them.")
    same = ("answers", "tokens", "trained", "longest", "forms", "skipped", "dtype", "encoder", "compared")
    return ConversationReport(
        prefix=prefix,
        status=status,
        conversations=len(chats),
        fitting=fitting,
        seconds=manifest["seconds"],
        rates={name.replace("documents", "conversations"): rate for name, rate in rates.items()},
        warnings=warnings,
        tokenizer=manifest["tokenizer"],
        template=manifest["template"],
        **{name: manifest[name] for name in same},
    )
