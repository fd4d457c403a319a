"""Text files to a Megatron dataset, as fast as the tokenizer allows and resumable at any moment."""

import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

import nemo_cpt
from nemo_cpt.corpus.choice import Rivals, choose_encoder
from nemo_cpt.corpus.encode import Layout
from nemo_cpt.corpus.ending import end_of_document, end_warnings
from nemo_cpt.corpus.feed import Feed, Task, hash_source
from nemo_cpt.corpus.files import make_folder, sync_directory, write_whole
from nemo_cpt.corpus.index import dtype_for, read_index, write_index
from nemo_cpt.corpus.job import Job, first_texts
from nemo_cpt.corpus.journal import Journal
from nemo_cpt.corpus.manifest import (
    FORMAT,
    changed_input,
    describe_inputs,
    manifest_path,
    read_manifest,
    write_manifest,
)
from nemo_cpt.corpus.probes import probe
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.sources import InputChangedError, Inputs, Source, list_sources
from nemo_cpt.corpus.tally import Policy
from nemo_cpt.corpus.tokenizer import Tokenizer, load_tokenizer
from nemo_cpt.corpus.tokenizer_files import settings_hash
from nemo_cpt.corpus.verify import verify_documents
from nemo_cpt.corpus.workers import count_processes
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
    policy = Policy.of(on_error, max_skipped)
    if verify is not None and verify < 0:
        raise CptError(f"verify is {verify}; it is a number of documents, 0 for none.")
    count = count_processes(workers)
    sources = list_sources(inputs)
    prefix = f"{output_prefix}_{json_key}_document"
    head_start = _HeadStart(fast and (overwrite or not Path(prefix + ".idx").exists()), split_special_tokens)
    with head_start:
        loaded = load_tokenizer(tokenizer, head_start.begin)
        eod = end_of_document(loaded, eod_token) if append_eod else None
        layout = _layout(loaded, json_key, eod, prepend_bos, keep_empty_documents)
        output = _Output(prefix, sources, loaded, layout, split_special_tokens)
        status, rates = "unchanged", dict[str, float]()
        if not output.is_there(overwrite):
            compare = verify != 0
            run = _Run(policy, fast, compare, count, chunk_bytes, checkpoint_seconds, patience, quiet, head_start)
            status, rates = output.make(run, overwrite)
    verified, kinds = 0, 0
    if verify:
        verified, kinds = verify_documents(output.prefix, sources, loaded, layout, split_special_tokens, verify)
    warnings = end_warnings(loaded, layout.eod, named=eod_token is not None)
    return _report(output.prefix, status, rates, verified, kinds, warnings)


def _layout(tokenizer: Tokenizer, json_key: str, eod: int | None, prepend_bos: bool, keep_empty: bool) -> Layout:
    if prepend_bos and tokenizer.bos is None:
        raise CptError(f"{tokenizer.name} has no BOS token; use prepend_bos=False.")
    return Layout(
        json_key=json_key,
        dtype=dtype_for(max(tokenizer.vocabulary_size, tokenizer.highest + 1)),
        bos=tokenizer.bos[1] if prepend_bos and tokenizer.bos else None,
        eod=eod,
        keep_empty=keep_empty,
        special=tuple(sorted(tokenizer.special.values())),
    )


class _HeadStart:
    """The encoders' loading, begun as soon as the tokenizer's file is known: it takes most of a short run's time."""

    def __init__(self, wanted: bool, split_special_tokens: bool) -> None:
        self._wanted, self._split = wanted, split_special_tokens
        self.rivals: Rivals | None = None

    def begin(self, definition: Path) -> None:
        """Begin to load, where there will be something to encode."""
        if self._wanted:
            self.rivals = Rivals(definition, self._split)

    def __enter__(self) -> "_HeadStart":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rivals is not None:
            self.rivals.close()


@dataclass(frozen=True)
class _Run:
    """The options that do not change the output."""

    policy: Policy
    fast: bool
    compare: bool
    workers: int
    chunk_bytes: int
    checkpoint_seconds: float
    patience: float
    quiet: bool
    head_start: _HeadStart


class _Output:
    """A dataset to be, and the files that it consists of."""

    def __init__(self, prefix: str, sources: list[Source], tokenizer: Tokenizer, layout: Layout, split: bool) -> None:
        self.prefix, self.sources, self.tokenizer, self.layout, self.split = prefix, sources, tokenizer, layout, split
        self.bin, self.idx = Path(prefix + ".bin"), Path(prefix + ".idx")
        self.options = {
            "tokenizer_sha256": tokenizer.sha256,
            "json_key": layout.json_key,
            "tokenizer_reading": tokenizer.reading,
            "eod": layout.eod,
            "bos": layout.bos,
            "split_special_tokens": split,
            "keep_empty_documents": layout.keep_empty,
        }
        self.journal = Journal(prefix, self.options)

    def is_there(self, overwrite: bool) -> bool:
        """Say whether the finished dataset of this very job exists.

        Raises:
            CptError: Something else has its name, and may not be replaced.
        """
        if overwrite or self.journal.is_finished() or not (self.bin.exists() or self.idx.exists()):
            return False
        if not manifest_path(self.prefix).exists():
            raise CptError(self._refusal("it has no manifest, so that nobody knows what it was made of"))
        manifest = read_manifest(self.prefix)
        for key, value in self.options.items():
            if manifest["options"].get(key) != value:
                raise CptError(self._refusal(f"its {key} is {manifest['options'].get(key)!r}, not {value!r}"))
        if (change := changed_input(self.sources, manifest["inputs"])) is not None:
            raise CptError(self._refusal(change))
        read_index(self.prefix)
        return True

    def _refusal(self, reason: str) -> str:
        return (
            f"{self.prefix}.bin or .idx exists and is not what this job would write: {reason}. "
            f"Take another output prefix, or replace it with overwrite=True (--overwrite)."
        )

    def make(self, run: _Run, overwrite: bool) -> tuple[str, dict[str, float]]:
        """Write the dataset, or the rest of it; return the status and this run's rates."""
        make_folder(self.idx.parent)
        journal, rates = self.journal, dict[str, float]()
        resumed = journal.open(overwrite, run.patience)
        try:
            try:
                tasks = self._tasks_left(run)
            except InputChangedError:
                if not overwrite:
                    raise
                journal.begin_anew()
                resumed, tasks = False, self._tasks_left(run)
            if not journal.progress.finished:
                rates = self._encode(run, tasks)
            journal.progress.tally.check(self.sources, run.policy.max_skipped)
            self._put_in_place()
        except BaseException as error:
            if not (journal.saved.source or journal.saved.position):
                journal.remove()  # nothing to resume
            elif type(error) is CptError:
                raise CptError(f"{error} The next run goes on after {journal.saved.entries:,} documents.") from error
            raise
        finally:
            journal.close()
        return ("resumed" if resumed else "written"), rates

    def _tasks_left(self, run: _Run) -> Iterator[Task]:
        """Return the tasks that are left; what an earlier run read must still be there.

        Raises:
            InputChangedError: It is not.
        """
        read, progress = self.journal.inputs, self.journal.progress
        begun = len(read) + bool(progress.position)
        if begun > len(self.sources) or (progress.finished and begun < len(self.sources)):
            raise InputChangedError(
                f"The unfinished run of {self.journal.path} had begun {begun} inputs, now there are {len(self.sources)}"
            )
        for source, before in zip(self.sources, read, strict=False):
            as_read = source.kind != "hub" and source.stamp == before.stamp
            if not as_read and hash_source(source) != before.hash:
                raise InputChangedError(f"{source.path} is not what the unfinished run of {self.journal.path} read")
        cursor = (progress.source, progress.position)
        tasks = iter(Feed(self.sources, self.layout.json_key, run.chunk_bytes, cursor, progress.before))
        return chain([first] if (first := next(tasks, None)) else [], tasks)  # the first compares what lies before it

    def _encode(self, run: _Run, tasks: Iterator[Task]) -> dict[str, float]:
        progress = self.journal.progress
        samples = first_texts(self.sources, self.layout.json_key)
        rivals = run.head_start.rivals
        with closing(choose_encoder(self.tokenizer, samples, self.split, run.fast, rivals)) as choice:
            if not run.compare:
                choice.close()
            progress.encoder, progress.probes = choice.why, probe(choice.encoder)
            before = (progress.entries, progress.read, progress.tokens)
            begin = time.monotonic()
            job = Job(tasks, self.sources, self.layout, self.journal, run.policy, run.checkpoint_seconds)
            with ProgressBar(Path(self.prefix).name, sum(source.size for source in self.sources), run.quiet) as bar:
                job.run(choice.encoder, run.workers, bar, choice.comparison())
        seconds = max(time.monotonic() - begin, 1e-9)
        documents, size, tokens = (now - was for now, was in zip(self._totals(), before, strict=True))
        return {
            "documents_per_second": documents / seconds,
            "megabytes_per_second": size / 1e6 / seconds,
            "tokens_per_second": tokens / seconds,
        }

    def _totals(self) -> tuple[int, int, int]:
        progress = self.journal.progress
        return progress.entries, progress.read, progress.tokens

    def _put_in_place(self) -> None:
        """Give the finished parts their names, the `.idx` last; each step may be repeated after a crash.

        Raises:
            CptError: There is no token, or the disk is full.
        """
        journal = self.journal
        if journal.progress.tokens == 0:
            journal.begin_anew()  # nothing to keep
            raise CptError(f"The inputs hold no document (first input: {self.sources[0].path}); nothing was written.")
        try:
            if journal.bin_path.exists():
                self.idx.unlink(missing_ok=True)  # an old index beside the new tokens would be wrong
                sync_directory(self.idx.parent)
                journal.bin_path.rename(self.bin)
            self._write_skipped()
            write_manifest(self.prefix, self._manifest())
            if journal.lens_path.exists():  # else the run was killed after this step
                write_index(self.idx, journal.lens_path, self.layout.dtype)
            journal.remove()
        except OSError as error:
            raise CptError(
                f"Cannot write {self.prefix}: {error.strerror}. Make room and run the same command again."
            ) from error

    def _write_skipped(self) -> None:
        path = Path(self.prefix + ".skipped.jsonl")
        problems = self.journal.problems()
        path.unlink(missing_ok=True)
        if problems:
            write_whole(path, b"".join(orjson.dumps(problem) + b"\n" for problem in problems))

    def _marker(self, number: int | None) -> list[Any] | None:
        return None if number is None else [self.tokenizer.text_of(number), number]

    def _manifest(self) -> dict[str, Any]:
        progress, tokenizer = self.journal.progress, self.tokenizer
        names = {str(number): text for text, number in tokenizer.special.items()}
        hashes = {str(number): read.hash for number, read in enumerate(self.journal.inputs)}
        return {
            "format": FORMAT,
            "made_by": f"nemo_cpt {nemo_cpt.__version__}",
            "tokenizer": {
                "name": tokenizer.name,
                "sha256": tokenizer.sha256,
                "settings_sha256": settings_hash(Path(tokenizer.folder)),
                "vocabulary_size": tokenizer.vocabulary_size,
                "eos": tokenizer.eos,
                "bos": tokenizer.bos,
                "pad": tokenizer.pad,
            },
            "probes": progress.probes,
            "markers": {"eod": self._marker(self.layout.eod), "bos": self._marker(self.layout.bos)},
            "options": self.options,
            "encoder": progress.encoder,
            "dtype": self.layout.dtype,
            "documents": progress.entries,
            "tokens": progress.tokens,
            "longest": progress.longest,
            "largest": max(progress.largest, self.layout.bos or -1, self.layout.eod or -1),
            "empty": progress.empty,
            "blank_lines": progress.tally.blank,
            "compared": progress.compared,
            "skipped": progress.tally.skipped,
            "special_tokens": {names[number]: count for number, count in progress.special.items()},
            "seconds": round(progress.seconds, 3),
            "inputs": describe_inputs(self.sources, hashes),
        }


def _report(
    prefix: str, status: str, rates: dict[str, float], verified: int, kinds: int, warnings: list[str]
) -> PrepareReport:
    manifest = read_manifest(prefix)
    same = {entry.name for entry in fields(PrepareReport)} & manifest.keys()
    values = {name: manifest[name] for name in same}
    return PrepareReport(
        prefix=prefix,
        status=status,
        rates=rates,
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
    if special := manifest["special_tokens"]:
        found = ", ".join(f"{text} {count} times" for text, count in special.items())
        warnings.append(
            f"The texts hold special tokens literally ({found}); they became control tokens, as with NeMo's and "
            "Megatron's "
            f"scripts. split_special_tokens=True (--split-special-tokens) makes them ordinary text."
        )
    if manifest["longest"] > LONG:
        warnings.append(
            f"The longest document has {manifest['longest']:,} tokens. It stays whole: Megatron cuts at seq_length "
            "itself, "
            f"and the tokenizer's warnings about {LONG:,} tokens do not matter here."
        )
    return warnings
