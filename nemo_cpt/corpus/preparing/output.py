"""A dataset in the making: what is there of it already, what is still to do, and its files' names at the end."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

import nemo_cpt
from nemo_cpt.corpus.atomic_files import folder_to_fill, sync, write_whole
from nemo_cpt.corpus.dataset.index import read_index, write_index
from nemo_cpt.corpus.dataset.manifest import (
    FORMAT,
    changed_input,
    describe_inputs,
    manifest_path,
    read_manifest,
    write_manifest,
)
from nemo_cpt.corpus.preparing.encode import Work
from nemo_cpt.corpus.preparing.job import Job
from nemo_cpt.corpus.preparing.journal import Journal
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.chunks import Feed, Task, hash_source
from nemo_cpt.corpus.reading.sources import InputChangedError, Source
from nemo_cpt.corpus.reading.tally import Policy
from nemo_cpt.corpus.tokenization.characters import Lookout
from nemo_cpt.corpus.tokenization.encoder_choice import Candidates, choose_encoder
from nemo_cpt.corpus.tokenization.probes import probe
from nemo_cpt.corpus.tokenization.tokenizer import Encoder, Tokenizer
from nemo_cpt.corpus.tokenization.tokenizer_files import settings_hash
from nemo_cpt.errors import CptError


class HeadStart:
    """The encoders' loading, begun as soon as the tokenizer's file is known: it takes most of a short run's time."""

    def __init__(self, wanted: bool, split_special_tokens: bool) -> None:
        self._wanted, self._split = wanted, split_special_tokens
        self.candidates: Candidates | None = None

    def begin(self, definition: Path) -> None:
        """Begin to load, where there will be something to encode."""
        if self._wanted:
            self.candidates = Candidates(definition, self._split)

    def __enter__(self) -> "HeadStart":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.candidates is not None:
            self.candidates.close()


@dataclass(frozen=True)
class Run:
    """The options that do not change the output."""

    policy: Policy
    fast: bool
    compare: bool
    workers: int
    chunk_bytes: int
    checkpoint_seconds: float
    patience: float
    quiet: bool
    head_start: HeadStart


class Output(ABC):
    """A dataset to be, and the files that it consists of; what they hold is for its kinds to say.

    Args:
        prefix: Of the files.
        sources: The inputs in order.
        tokenizer: Their tokenizer.
        dtype: Type of the tokens.
        options: What makes two runs the same job, beside the inputs; goes into the manifest.
        json_key: Name of the text's column where inputs have columns; None for all of them.
        split: Whether special tokens' names in a text are encoded as ordinary text.
        files: What workers write, see `journal.SIZES`.
        part: It is a task's part of a dataset: it may be empty, and what was left out is for the whole to judge.
    """

    def __init__(
        self,
        prefix: str,
        sources: list[Source],
        tokenizer: Tokenizer,
        dtype: str,
        options: dict[str, Any],
        json_key: str | None,
        split: bool = False,
        files: Sequence[str] = ("bin",),
        part: bool = False,
    ) -> None:
        self.part = part
        self.prefix, self.sources, self.tokenizer, self.dtype = prefix, sources, tokenizer, dtype
        self.options, self.json_key, self.split = options, json_key, split
        self.bin, self.idx = Path(prefix + ".bin"), Path(prefix + ".idx")
        self.journal = Journal(prefix, options, files)

    @abstractmethod
    def samples(self) -> list[str]:
        """Return texts of the inputs to try tokenizers on."""

    @abstractmethod
    def make_work(self, encoder: Encoder, lookout: Lookout | None) -> tuple[Work, str]:
        """Return what workers do, and what is to be said about it beside which encoder it is.

        Args:
            encoder: The encoder that was chosen.
            lookout: What looks for passages to compare with the reference, None for no comparison.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of this kind alone."""

    def is_there(self, policy: Policy, overwrite: bool) -> bool:
        """Say whether the finished dataset of this very job exists.

        Raises:
            CptError: Something else has its name, and may not be replaced.
        """
        # A finished journal beside the files means that a run was killed while it renamed them: `make` ends that.
        if overwrite or self.journal.is_finished() or not (self.bin.exists() or self.idx.exists()):
            return False
        if not manifest_path(self.prefix).exists():
            raise CptError(self.refusal("it has no manifest, so that nobody knows what it was made of"))
        manifest = read_manifest(self.prefix)
        for key, value in self.options.items():
            if manifest["options"].get(key) != value:
                raise CptError(self.refusal(f"its {key} is {manifest['options'].get(key)!r}, not {value!r}"))
        if (change := changed_input(self.sources, manifest["inputs"])) is not None:
            raise CptError(self.refusal(change))
        if (reason := policy.against(manifest["skipped"], manifest.get("skipped_share", 0.0))) is not None:
            raise CptError(self.refusal(reason))
        # The manifest is written before the `.idx`: it alone does not prove that the dataset is whole.
        read_index(self.prefix)
        return True

    def refusal(self, reason: str) -> str:
        """Return the message that refuses what is there."""
        return (
            f"{self.prefix}.bin or .idx exists and is not what this job would write: {reason}. "
            f"Take another output prefix, or replace it with overwrite=True (--overwrite)."
        )

    def make(self, run: Run, overwrite: bool) -> tuple[str, dict[str, float]]:
        """Write the dataset, or the rest of it; return the status and this run's rates."""
        with folder_to_fill(self.idx.parent):
            return self._make(run, overwrite)

    def _make(self, run: Run, overwrite: bool) -> tuple[str, dict[str, float]]:
        journal, rates = self.journal, dict[str, float]()
        # From here on the output is ours: all that follows relies on the lock.
        resumed = journal.open(overwrite, run.patience)
        try:
            try:
                # Inside the lock, because what is left depends on the journal that was just read.
                tasks = self._tasks_left(run)
            except InputChangedError:
                if not overwrite:
                    raise
                journal.begin_anew()
                resumed, tasks = False, self._tasks_left(run)
            if (reason := run.policy.against(journal.progress.tally.skipped)) is not None:
                raise CptError(
                    f"The unfinished run of {journal.path} is not one to go on with: {reason}. Go on with "
                    "on_error='skip' (--on-error skip), or begin anew with overwrite=True (--overwrite)."
                )
            if not journal.progress.finished:
                rates = self._encode(run, tasks)
            if not self.part:
                journal.progress.tally.check(self.sources, run.policy.max_skipped)
            self.put_in_place()
        except BaseException as error:
            # `saved`, not `progress`: what counts is what the next run will find on the disk.
            if not (journal.saved.source or journal.saved.position):
                journal.remove()  # nothing to resume
            # Not its subclasses: an output that mixes two inputs or two encoders cannot be gone on with.
            elif type(error) is CptError:
                raise CptError(f"{error} The next run goes on after {journal.saved.entries:,} documents.") from error
            raise
        finally:
            journal.close()
        return ("resumed" if resumed else "written"), rates

    def _tasks_left(self, run: Run) -> Iterator[Task]:
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
        tasks = iter(Feed(self.sources, self.json_key, run.chunk_bytes, cursor, progress.before))
        # Drawn here and not in the job: InputChangedError must come while `make` can still begin anew.
        return chain([first] if (first := next(tasks, None)) else [], tasks)  # the first compares what lies before it

    def _encode(self, run: Run, tasks: Iterator[Task]) -> dict[str, float]:
        progress = self.journal.progress
        candidates = run.head_start.candidates
        with closing(choose_encoder(self.tokenizer, self.samples(), self.split, run.fast, candidates)) as choice:
            if not run.compare:
                # Closed early: the reference's process holds tables that nothing will ask for.
                choice.close()
            work, note = self.make_work(choice.encoder, Lookout() if choice.reference else None)
            progress.encoder, progress.probes = "; ".join(filter(None, (choice.why, note))), probe(choice.encoder)
            before = (progress.entries, progress.read, progress.tokens)
            begin = time.monotonic()
            job = Job(tasks, self.sources, self.journal, run.policy, run.checkpoint_seconds)
            with ProgressBar(Path(self.prefix).name, sum(source.nbytes for source in self.sources), run.quiet) as bar:
                job.run(work, run.workers, bar, choice.comparison())
        # This run's own: a resumed one must not be credited with what the first did.
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

    def put_in_place(self) -> None:
        """Give the finished parts their names, the `.idx` last; each step may be repeated after a crash.

        Raises:
            CptError: There is no token, or the disk is full.
        """
        journal = self.journal
        if journal.progress.tokens == 0 and not self.part:
            # An empty dataset cannot be mapped by Megatron, whose reader fails on it with a bare ValueError.
            journal.begin_anew()  # nothing to keep
            raise CptError(f"The inputs hold no document (first input: {self.sources[0].path}); nothing was written.")
        try:
            for name, part in journal.parts.items():
                if part.exists():
                    self.idx.unlink(missing_ok=True)  # an old index beside the new tokens would be wrong
                    sync(self.idx.parent)
                    part.rename(f"{self.prefix}.{name}")
            self._write_skipped()
            # Between the parts and the `.idx`: where an index is, its manifest is, too.
            write_manifest(self.prefix, self._manifest())
            if journal.lens_path.exists():  # else the run was killed after this step
                write_index(self.idx, journal.lens_path, self.dtype)
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
            "options": self.options,
            "encoder": progress.encoder,
            "dtype": self.dtype,
            "documents": progress.entries,
            "tokens": progress.tokens,
            "longest": progress.longest,
            "largest": progress.largest,
            "empty": progress.empty,
            "blank_lines": progress.tally.blank,
            "compared": progress.compared,
            "skipped": progress.tally.skipped,
            "special_tokens": {names[number]: count for number, count in progress.special.items()},
            "seconds": round(progress.seconds, 3),
            "inputs": describe_inputs(self.sources, hashes),
            # Of a part it says nothing: what may be skipped is a share of the whole.
            **(
                {"tally": asdict(progress.tally)}
                if self.part
                else {"skipped_share": progress.tally.skipped_share(self.sources)}
            ),
        } | self.describe()
