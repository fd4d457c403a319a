"""Text files to a Megatron dataset, as fast as the tokenizer allows and resumable at any moment."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.dataset.index import dtype_for
from nemo_cpt.corpus.dataset.manifest import copies_of_inputs, read_manifest
from nemo_cpt.corpus.plan import left_over
from nemo_cpt.corpus.preparing.encode import Layout, TextWork, Work
from nemo_cpt.corpus.preparing.job import first_texts
from nemo_cpt.corpus.preparing.output import HeadStart, Output, Run
from nemo_cpt.corpus.preparing.reference_check import verify_documents
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.reading.sources import PARTS, Inputs, Source, list_sources
from nemo_cpt.corpus.reading.tally import Policy
from nemo_cpt.corpus.tokenization.characters import Lookout
from nemo_cpt.corpus.tokenization.document_end import end_of_document, end_warnings
from nemo_cpt.corpus.tokenization.tokenizer import Encoder, Tokenizer, load_tokenizer
from nemo_cpt.errors import CptError

LONG = 131072  # where tokenizers begin to warn, needlessly: Megatron cuts documents at seq_length itself


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        prefix: Megatron's prefix of the dataset, without .bin or .idx.
        status: `written`, `resumed` (written, the first part by an earlier run) or `unchanged` (it was there already).
        documents: Documents in the dataset.
        tokens: Tokens in it, end-of-document tokens included.
        longest: Tokens of the longest document.
        empty: Texts without tokens.
        skipped: Lines left out, by reason.
        special_tokens: How often the texts hold a special token literally, by its text.
        dtype: `int32` or `uint16`.
        encoder: What encoded, and why that.
        tokenizer: `name`, `sha256`, `vocabulary_size`, `eos` and `bos` as [text, id].
        markers: What stands after (`eod`) and before (`bos`) each document, as [text, id] or None.
        seconds: Time spent reading, encoding and writing, over all runs.
        rates: Of this run, by name: `documents_per_second`, `megabytes_per_second` (10^6 bytes of input),
            `tokens_per_second`.
        compared: Passages that the encoder and the reference tokenizer were compared on while the corpus was encoded.
        verified: Random documents of the finished file compared with transformers' tokenizer.
        kinds: Scripts and categories of Unicode in the corpus of which documents were compared with it too.
        warnings: Sentences for people.
    """

    prefix: str
    status: str
    documents: int
    tokens: int
    longest: int
    empty: int
    skipped: dict[str, int]
    special_tokens: dict[str, int]
    dtype: str
    encoder: str
    tokenizer: dict[str, Any]
    seconds: float
    markers: dict[str, list[Any] | None] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    compared: int = 0
    verified: int = 0
    kinds: int = 0
    warnings: list[str] = field(default_factory=list)


@checked
def prepare(
    inputs: Inputs,
    output_prefix: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    *,
    json_key: str = "text",
    append_eod: bool = True,
    eod_token: str | None = None,
    prepend_bos: bool = False,
    workers: int | None = None,
    on_error: str = "stop",
    max_skipped: float | None = None,
    split_special_tokens: bool = False,
    keep_empty_documents: bool = False,
    verify: int | None = None,
    fast: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
    chunk_bytes: int = 2 << 20,
    checkpoint_seconds: float = 15.0,
    patience: float = 10.0,
) -> PrepareReport:
    """Tokenize a corpus into a Megatron dataset, `OUTPUT_PREFIX_text_document.bin` and `.idx`.

    The files are those that NeMo's `preprocess_data_for_megatron.py` and Megatron-LM's `tools/preprocess_data.py`
    write, byte for byte. A run that is killed resumes when it is called again; one that is finished does nothing when
    it is called again.

    Args:
        inputs: A file, folder, glob or list of them: JSON lines (plain, gzip, zstd), Parquet, a dataset saved by
            `datasets`, or `hf:NAME[@CONFIG][:SPLIT]`.
        output_prefix: Where the dataset goes; `_{json_key}_document.bin` and `.idx` are appended.
        tokenizer: Folder or hub name of a Hugging Face tokenizer.
        json_key: The field that holds the text.
        append_eod: Put an end-of-document token after each document.
        eod_token: That token's text; the tokenizer's EOS by default.
        prepend_bos: Put the tokenizer's BOS before each document; the reference scripts do not.
        workers: Processes; all CPUs that this process may use by default.
        on_error: `stop` at a line that gives no text, or `skip` it, count it and list it in
            `..._document.skipped.jsonl`. A file of which no line gives a text is an error all the same.
        max_skipped: The share of the inputs that may be skipped, 0.01 by default: of their lines, of the lines' bytes,
            and of the bytes of files that break off, whichever is the most.
        split_special_tokens: Encode `<|end_of_text|>` and the like in a text as ordinary text; the reference scripts
            make them control tokens.
        keep_empty_documents: Give an empty text a document of no tokens, as Megatron-LM's script does; NeMo's leaves it
            out.
        verify: By default the encoder is compared with the reference tokenizer on passages of the corpus, while it
            works: one document of 8 MB, and two passages for each script and category of Unicode. 0 compares nothing; a
            number also encodes so many documents of the finished file, chosen at random, and two for each script and
            category again, with transformers itself, which reads the inputs once more.
        fast: Use fastokens where it agrees with the reference tokenizer; False takes the reference at once.
        overwrite: Replace an existing dataset, and an unfinished one of another job.
        quiet: Show no progress.
        chunk_bytes: Size of a worker's portion; the output does not depend on it.
        checkpoint_seconds: About so much work is lost when the run is killed.
        patience: Seconds to wait for another process that writes this output, such as the last workers of a killed run.

    Raises:
        CptError: An input, the tokenizer or an option is unusable, the output exists, or the disk is full.
    """
    settings = Settings(
        json_key=json_key,
        append_eod=append_eod,
        eod_token=eod_token,
        prepend_bos=prepend_bos,
        workers=workers,
        on_error=on_error,
        max_skipped=max_skipped,
        split_special_tokens=split_special_tokens,
        keep_empty_documents=keep_empty_documents,
        verify=verify,
        fast=fast,
        quiet=quiet,
        chunk_bytes=chunk_bytes,
        checkpoint_seconds=checkpoint_seconds,
        patience=patience,
    )
    # Everything that can be refused is refused before the tokenizer loads, which takes seconds.
    settings.check()
    sources = list_sources(inputs)
    prefix = f"{output_prefix}_{json_key}_document"
    # Where the dataset is there, nothing is encoded, and nothing needs to be loaded.
    head_start = HeadStart(fast and (overwrite or not Path(prefix + ".idx").exists()), split_special_tokens)
    with head_start:
        output = TextOutput(prefix, sources, load_tokenizer(tokenizer, head_start.begin), settings)
        status, rates = "unchanged", dict[str, float]()
        # A finished dataset of this very job: a rerun of a pipeline costs a few file stats.
        if not output.is_there(settings.policy, overwrite):
            status, rates = output.make(settings.run(head_start), overwrite)
    report = output.report(settings, status, rates)
    return replace(report, warnings=[*report.warnings, *left_over(Path(prefix + PARTS))])


def check_options(
    workers: int | None, on_error: str, max_skipped: float | None, verify: int | None, chunk_bytes: int
) -> None:
    """Check the options of `prepare` that need neither inputs nor tokenizer.

    Raises:
        CptError: One is unusable.
    """
    Policy.of(on_error, max_skipped)
    count_processes(workers)
    if verify is not None and verify < 0:
        raise CptError(f"verify is {verify}; it is a number of documents, 0 for none.")
    if chunk_bytes < 1:
        raise CptError(f"chunk_bytes is {chunk_bytes}; it must be at least 1.")


@checked
@dataclass(frozen=True)
class Settings:
    """The options of `prepare`, which has what each of them means."""

    json_key: str = "text"
    append_eod: bool = True
    eod_token: str | None = None
    prepend_bos: bool = False
    workers: int | None = None
    on_error: str = "stop"
    max_skipped: float | None = None
    split_special_tokens: bool = False
    keep_empty_documents: bool = False
    verify: int | None = None
    fast: bool = True
    quiet: bool = False
    chunk_bytes: int = 2 << 20
    checkpoint_seconds: float = 15.0
    patience: float = 10.0

    @property
    def policy(self) -> Policy:
        """What to do with lines that give no text."""
        return Policy.of(self.on_error, self.max_skipped)

    def check(self) -> None:
        """Check what can be checked without the tokenizer.

        Raises:
            CptError: An option is unusable.
        """
        check_options(self.workers, self.on_error, self.max_skipped, self.verify, self.chunk_bytes)

    def run(self, head_start: HeadStart) -> Run:
        """Return the options that do not change the output."""
        return Run(
            policy=self.policy,
            fast=self.fast,
            compare=self.verify != 0,
            workers=count_processes(self.workers),
            chunk_bytes=self.chunk_bytes,
            checkpoint_seconds=self.checkpoint_seconds,
            patience=self.patience,
            quiet=self.quiet,
            head_start=head_start,
        )

    def layout(self, tokenizer: Tokenizer) -> Layout:
        """Return how documents are laid out with a tokenizer.

        Raises:
            CptError: It lacks the token that is to end or to begin them.
        """
        eod = end_of_document(tokenizer, self.eod_token) if self.append_eod else None
        if self.prepend_bos and tokenizer.bos is None:
            raise CptError(f"{tokenizer.name} has no BOS token; use prepend_bos=False.")
        return Layout(
            json_key=self.json_key,
            # By the vocabulary, not by the ids met: datasets of one tokenizer must have one type.
            dtype=dtype_for(max(tokenizer.vocabulary_size, tokenizer.highest + 1)),
            bos=tokenizer.bos[1] if self.prepend_bos and tokenizer.bos else None,
            eod=eod,
            keep_empty=self.keep_empty_documents,
            special=tuple(sorted(tokenizer.special.values())),
        )


class TextOutput(Output):
    """A dataset of texts.

    Args:
        prefix: Of the files.
        sources: The inputs in order.
        tokenizer: Their tokenizer.
        settings: The options.
        part_of: Of a task's part, what tells it from other parts and from parts of other jobs; goes into its options.
    """

    def __init__(
        self,
        prefix: str,
        sources: list[Source],
        tokenizer: Tokenizer,
        settings: Settings,
        part_of: dict[str, Any] | None = None,
    ) -> None:
        layout, split = settings.layout(tokenizer), settings.split_special_tokens
        options = {
            "tokenizer_sha256": tokenizer.sha256,
            "json_key": layout.json_key,
            "tokenizer_reading": tokenizer.reading,
            "eod": layout.eod,
            "bos": layout.bos,
            "split_special_tokens": split,
            "keep_empty_documents": layout.keep_empty,
        } | (part_of or {})
        is_part = part_of is not None
        super().__init__(prefix, sources, tokenizer, layout.dtype, options, layout.json_key, split, part=is_part)
        self.layout = layout

    def samples(self) -> list[str]:
        """Return the first documents; see `Output`."""
        return first_texts(self.sources, self.layout.json_key)

    def make_work(self, encoder: Encoder, lookout: Lookout | None) -> tuple[Work, str]:
        """Return the encoding of texts; see `Output`."""
        return TextWork(encoder, self.layout, lookout), ""

    def describe(self) -> dict[str, Any]:
        """Return what stands around documents; see `Output`."""
        return {
            "markers": {"eod": self._marker(self.layout.eod), "bos": self._marker(self.layout.bos)},
            "largest": max(self.journal.progress.largest, self.layout.bos or -1, self.layout.eod or -1),
        }

    def _marker(self, number: int | None) -> list[Any] | None:
        return None if number is None else [self.tokenizer.text_of(number), number]

    def report(self, settings: Settings, status: str, rates: dict[str, float]) -> PrepareReport:
        """Return the report of the finished dataset, after the comparison of documents that `verify` asks for.

        Raises:
            CptError: A document is not what transformers gives.
        """
        verified, kinds = 0, 0
        if settings.verify:
            split = settings.split_special_tokens
            verified, kinds = verify_documents(
                self.prefix, self.sources, self.tokenizer, self.layout, split, settings.verify
            )
        warnings = end_warnings(self.tokenizer, self.layout.eod, named=settings.eod_token is not None)
        return report_of(self.prefix, status, rates, verified, kinds, warnings)


def report_of(
    prefix: str,
    status: str,
    rates: dict[str, float] | None = None,
    verified: int = 0,
    kinds: int = 0,
    warnings: Sequence[str] = (),
) -> PrepareReport:
    """Return the report of a finished dataset, out of its manifest and what this run adds.

    Raises:
        CptError: It has no manifest.
    """
    manifest = read_manifest(prefix)
    same = {entry.name for entry in fields(PrepareReport)} & manifest.keys()
    values = {name: manifest[name] for name in same}
    return PrepareReport(
        prefix=prefix,
        status=status,
        rates=rates or {},
        verified=verified,
        kinds=kinds,
        warnings=[*warnings, *_warnings(prefix, manifest)],
        **values,
    )


def _warnings(prefix: str, manifest: dict[str, Any]) -> list[str]:
    """Return what the user should know about a finished dataset."""
    warnings = []
    if skipped := sum(manifest["skipped"].values()):
        warnings.append(f"{skipped} lines were left out; {prefix}.skipped.jsonl lists them.")
    warnings += copies_of_inputs(manifest["inputs"])
    if special := manifest["special_tokens"]:
        found = ", ".join(f"{text} {count} times" for text, count in special.items())
        warnings.append(
            f"The texts hold special tokens literally ({found}); they became control tokens, as with NeMo's and "
            "Megatron's scripts. split_special_tokens=True (--split-special-tokens) makes them ordinary text."
        )
    if manifest["longest"] > LONG:
        of_text = any(each["kind"] == "text" for each in manifest["inputs"])
        warnings.append(
            f"The longest document has {manifest['longest']:,} tokens. It stays whole: Megatron cuts at seq_length "
            f"itself, and the tokenizer's warnings about {LONG:,} tokens do not matter here."
            + (" A file of plain text is one document." if of_text else "")
        )
    return warnings
