"""Held-out sets: documents taken by their own hash, so that more data never moves one from validation to training."""

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from nemo_cpt.arguments import checked
from nemo_cpt.corpus.atomic_files import (
    folder_to_fill,
    locked,
    move_into_place,
    refuse_foreign_files,
    write_whole,
    written_beside,
)
from nemo_cpt.corpus.dataset.manifest import changed_input, check_sizes, describe_inputs, sizes_of
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.processes import in_order
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.chunks import Feed, Task, check_unchanged
from nemo_cpt.corpus.reading.lines import Reading
from nemo_cpt.corpus.reading.records import read_records
from nemo_cpt.corpus.reading.sources import (
    SETS,
    SPLIT_REPORT,
    UNFINISHED,
    Inputs,
    Source,
    check_elsewhere,
    identity,
    list_sources,
)
from nemo_cpt.corpus.reading.tally import Policy, Tally
from nemo_cpt.corpus.splitting.asked import AskedUnder
from nemo_cpt.corpus.splitting.duplicates import HeldOut, check_similarity, fingerprint, plain_codes, sketches
from nemo_cpt.errors import CptError
from nemo_cpt.records import restored

CHUNK = 2 << 20
DROPS = ("none", "exact", "near")
REPORT, LOCK = SPLIT_REPORT, ".split.lock"


@dataclass
class SplitReport:
    """What `split` did.

    Attributes:
        status: `written`, or `unchanged` where the same split was there already.
        files: Path of each set's JSON lines, by `train`, `validation`, `test`.
        documents: Documents of each set.
        exact: Training documents equal to a held-out one up to width, case and spacing.
        near: Further training documents that are near duplicates of a held-out one.
        dropped: Training documents left out for that.
        repeated: Held-out documents that came more than once; one of each is kept.
        skipped: Lines left out, by reason.
        warnings: Sentences for people.
    """

    status: str = "written"
    files: dict[str, str] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    exact: int = 0
    near: int = 0
    dropped: int = 0
    repeated: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@checked
def split(
    inputs: Inputs,
    output_folder: str | os.PathLike[str],
    *,
    validation: float | Inputs = 0.01,
    test: float | Inputs = 0.0,
    json_key: str = "text",
    similarity: float = 0.8,
    drop: str = "none",
    on_error: str = "stop",
    max_skipped: float | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    patience: float = 10.0,
) -> SplitReport:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl` into a folder, and count duplicates between them.

    Documents keep all their fields, rows of tables too. A document goes where a hash of its text says, which ignores
    width, case and spacing: equal documents stay together, and a document that was held out once stays held out however
    the corpus grows.

    Args:
        inputs: As for `prepare`.
        output_folder: Where the files go.
        validation: Share of the documents, or the inputs that already are the validation set.
        test: The same for the test set; 0 for none.
        json_key: The field that holds the text; of conversations, that of the messages: what was asked in them tells
            one from another.
        similarity: Jaccard similarity of character 5-grams from which two documents are near duplicates; estimated by
            MinHash, which finds nearly all above it.
        drop: Training documents to leave out: `none`, `exact` duplicates of held-out ones, or `near` ones as well.
        on_error: As for `prepare`.
        max_skipped: As for `prepare`; of the held-out inputs and of the others, each by itself.
        workers: Processes; all CPUs that this process may use by default.
        overwrite: Replace an existing split, and any `train.jsonl`, `validation.jsonl` and `test.jsonl` of the folder.
        quiet: Show no progress.
        patience: Seconds to wait for another process that splits into the folder.

    Raises:
        CptError: An input or an option is unusable, an input lies where a set would go, the folder holds another split
            or files of another origin, another process splits into it, or it cannot be written.
    """
    check_options(validation, test, similarity, drop, on_error, max_skipped, workers)
    job = _Split(inputs, validation, test, json_key, similarity, drop, Policy.of(on_error, max_skipped))
    folder = Path(output_folder)
    job.check_targets(folder)
    # With the lock file there, somebody is at work: what the report says may be about to change.
    if not (overwrite or (folder / LOCK).exists()) and (report := job.existing(folder)) is not None:
        return report  # without the lock, which a folder that is only to be read does not allow
    try:
        with folder_to_fill(folder), locked(folder / LOCK, patience):
            return job.make(folder, count_processes(workers), overwrite, quiet)
    except OSError as error:
        raise CptError(f"Cannot split into {folder}: {error}. Mend that and run the same command again.") from error


def check_options(
    validation: float | Inputs,
    test: float | Inputs,
    similarity: float,
    drop: str,
    on_error: str,
    max_skipped: float | None,
    workers: int | None,
) -> None:
    """Check the options of `split` that need no input.

    Raises:
        CptError: One is unusable.
    """
    Policy.of(on_error, max_skipped)
    count_processes(workers)
    shares = [share for share in (validation, test) if isinstance(share, int | float)]
    if any(not 0 <= share < 1 for share in shares) or sum(shares) >= 1:
        raise CptError(f"validation is {validation} and test {test}; shares lie between 0 and 1, together below 1.")
    if validation == 0 and test == 0:
        raise CptError("Nothing is held out: give validation or test a share above 0, such as validation=0.01.")
    check_similarity("similarity", similarity)
    if drop not in DROPS:
        raise CptError(f"drop is {drop!r}; it can be {', '.join(DROPS)}.")


class _HeldOutDocument(NamedTuple):
    """A document that is kept out of the training set.

    Attributes:
        name: Its set.
        text_print: Its fingerprint.
        minhash: Its sketch.
        line: Its line; empty for one of a set that was given, of which no file is written.
    """

    name: str
    text_print: int
    minhash: Any
    line: bytes


@dataclass
class _Portion:
    """What a worker made of a task.

    Attributes:
        lines: Lines for the training set, under "train".
        held_out: Documents for other sets; the parent decides, because only it knows all that are held out so far.
        duplicates: Training documents that duplicate a held-out one, by "exact" and "near".
        dropped: How many of those are left out.
        reading: How the task's lines were read.
    """

    lines: dict[str, list[bytes]] = field(default_factory=dict)
    held_out: list[_HeldOutDocument] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    reading: Reading = field(default_factory=Reading)


class _Split:
    """One split: its options, and the state that forked workers share.

    Up to three passes over inputs, in this order, because the last compares with what the others found:
        `take_all`: every document of the sets that were given.
        `take_held_out`: of the inputs, the documents whose hash puts them into a set that is drawn.
        `take_training`: the rest of the inputs. Its workers are forked after `held_out` is complete, and share it.
    A worker only finds (`take_...`, which return a `_Portion`); the parent notes and writes (`_note`), task by task in
    the inputs' order, so that the files do not depend on the number of workers.
    """

    def __init__(
        self,
        inputs: Inputs,
        validation: float | Inputs,
        test: float | Inputs,
        json_key: str,
        similarity: float,
        drop: str,
        policy: Policy,
    ) -> None:
        self.text_of, self.drop, self.policy = AskedUnder(json_key), drop, policy
        self.shares, self.given = dict[str, float](), dict[str, list[Source]]()
        for name, value in (("validation", validation), ("test", test)):
            if isinstance(value, int | float):
                self.shares[name] = float(value)
            else:
                self.given[name] = list_sources(value)
        named = {(identity(source), name) for name, sources in self.given.items() for source in sources}
        held = {file for file, _ in named}
        if len(held) < len(named):
            raise CptError("The validation and the test set have a file in common; each needs its own.")
        # `split data/ --validation data/dev.jsonl` is how people say it: what is held out is not trained on, without a
        # word.
        self.sources = [source for source in list_sources(inputs) if identity(source) not in held]
        if not self.sources:
            raise CptError("All inputs are held out; there is nothing to train on.")
        self.held_out = HeldOut(similarity)
        self.report, self.skipped_share = SplitReport(), 0.0
        self.hashes = dict[str, str]()  # of each input, by its path
        self.options = {"shares": self.shares, "json_key": json_key, "similarity": similarity, "drop": drop}

    @property
    def all_sources(self) -> list[Source]:
        """All inputs, the held-out ones last."""
        return self.sources + [source for sources in self.given.values() for source in sources]

    @property
    def given_inputs(self) -> dict[str, int]:
        """How many of all inputs are each set that was given; the last ones, in this order."""
        return {name: len(sources) for name, sources in self.given.items()}

    def check_targets(self, folder: Path) -> None:
        """Check that no input lies where this split writes or deletes.

        Raises:
            CptError: One does.
        """
        check_elsewhere(self.all_sources, folder, (*(f"{name}.jsonl" for name in SETS), REPORT), "split")

    def existing(self, folder: Path) -> SplitReport | None:
        """Return the report of this very split if it is there.

        Raises:
            CptError: Another split is there.
        """
        path = folder / REPORT
        if not path.exists():
            return None
        recorded = _read_report(path)
        change = changed_input(self.all_sources, recorded["inputs"])
        # The same files, of which others were held out; splits of before this was noted are taken at their word.
        if not change and recorded.get("given", self.given_inputs) != self.given_inputs:
            change = f"of these inputs it held out {recorded['given']}, not {self.given_inputs}"
        change = change or self.policy.against(recorded["report"]["skipped"], recorded.get("skipped_share", 0.0))
        if recorded["options"] != self.options or change:
            reason = change or f"its options are {recorded['options']}, not {self.options}"
            raise CptError(
                f"{folder} holds another split: {reason}. Take another folder, or overwrite=True (--overwrite)."
            )
        check_sizes(folder, recorded.get("sizes", {}))
        # Where they are now: the folder may have been moved, or named from another one.
        files = {name: str(folder / f"{name}.jsonl") for name in recorded["report"]["files"]}
        return restored(SplitReport, recorded["report"], files=files, status="unchanged")

    def make(self, folder: Path, workers: int, overwrite: bool, quiet: bool) -> SplitReport:
        """Write the sets beside, then move them into their folder; the folder must be locked.

        Raises:
            CptError: As `split`.
        """
        work = folder / UNFINISHED

        def write() -> SplitReport:
            self.write(work, workers, quiet)
            self.write_report(work, folder)
            return self.report

        names = [f"{name}.jsonl" for name in SETS]
        return written_beside(
            work,
            REPORT,
            lambda: _move_into_place(work, folder),
            write,
            existing=lambda: self.existing(folder),
            refuse_foreign=lambda: refuse_foreign_files(folder, names, REPORT, "split", "replace or delete"),
            overwrite=overwrite,
        )

    def write(self, work: Path, workers: int, quiet: bool) -> None:
        """Write the sets into a folder: first the held-out ones, then the training set, compared with them.

        Raises:
            CptError: A set has no document, a line gives no text and is not to be skipped, or an input changes.
        """
        drawn = [name for name, share in self.shares.items() if share > 0]
        with ExitStack() as stack:
            files = {name: stack.enter_context((work / f"{name}.jsonl").open("wb")) for name in [*drawn, "train"]}
            bar = stack.enter_context(ProgressBar("holding out", _size(self.sources) * bool(drawn), quiet))
            tallies = [self._pass(sources, self.take_all, workers, files, None) for sources in self.given.values()]
            if drawn:
                self._pass(self.sources, self.take_held_out, workers, files, bar)
            self.held_out.complete()
            bar = stack.enter_context(ProgressBar("splitting", _size(self.sources), quiet))
            tallies.append(self._pass(self.sources, self.take_training, workers, files, bar))
            for tally in tallies:
                for reason, count in tally.skipped.items():
                    self.report.skipped[reason] = self.report.skipped.get(reason, 0) + count
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        if not any(tally.texts for tally in tallies):
            raise CptError(f"The inputs hold no document (first input: {self.sources[0].path}).")
        for name in drawn:
            if not self.report.documents.get(name):
                raise CptError(
                    f"The {name} set is empty: a share of {self.shares[name]} of so few documents. Raise it."
                )
        if not self.report.documents.get("train"):
            raise CptError("The training set is empty: every document was held out or dropped.")

    def _pass(
        self,
        sources: list[Source],
        take: Callable[[Task], _Portion],
        workers: int,
        files: dict[str, Any],
        bar: ProgressBar | None,
    ) -> Tally:
        """Go through inputs once and collect what the workers found, in order.

        Raises:
            CptError: A line gives no text and is not to be skipped, too many give none, or an input changes.
        """
        tally, passed = Tally(), sum(self.report.documents.values())
        before = list(accumulate((source.size for source in sources), initial=0))  # bytes of the inputs before each
        for task, portion in in_order(take, Feed(sources, None, CHUNK), workers):  # documents keep all their fields
            source = sources[task.source]
            if task.last:
                check_unchanged(source, task)
                # Each pass reads the inputs anew: a document that changed in between could be in two sets, or in none.
                if self.hashes.setdefault(task.path, task.hash) != task.hash:
                    raise CptError(f"{task.path} changed between two passes. Run again once nothing writes to it.")
            tally.add(task, portion.reading, source, self.policy)
            self._note(portion, files)
            if bar is not None:
                bar.update(before[task.source] + task.done, sum(self.report.documents.values()) - passed)
        tally.check(sources, self.policy.max_skipped)
        self.skipped_share = max(self.skipped_share, tally.skipped_share(sources))
        return tally

    def _note(self, portion: _Portion, files: dict[str, Any]) -> None:
        report = self.report
        for document in portion.held_out:
            # Here and not in the worker, each of which sees only its own tasks.
            if not self.held_out.add(document.text_print, document.minhash):
                report.repeated += 1
                continue
            report.documents[document.name] = report.documents.get(document.name, 0) + 1
            if document.name in files:  # no file is written for a set that was given
                files[document.name].write(document.line)
        for name, found in portion.lines.items():
            files[name].write(b"".join(found))
            report.documents[name] = report.documents.get(name, 0) + len(found)
        report.exact += portion.duplicates.get("exact", 0)
        report.near += portion.duplicates.get("near", 0)
        report.dropped += portion.dropped

    def side(self, text: str) -> tuple[str, int]:
        """Return the set that a text belongs to, and its fingerprint."""
        text_print = fingerprint(text)
        # The fingerprint's place in [0, 1) decides: the document's own, so that it stays in its set whatever is added.
        place, limit = text_print / 2**64, 0.0
        for name, share in self.shares.items():
            limit += share
            if place < limit:
                # Shares are laid end to end from 0: raising `test` alone never moves a validation document.
                return name, text_print
        return "train", text_print

    def take_all(self, task: Task) -> _Portion:
        """Take all documents of a given held-out set."""
        # By path: the same worker serves all the sets that were given.
        name = next(n for n, sources in self.given.items() if any(source.path == task.path for source in sources))
        portion = _Portion()
        texts = [text for _, text, _ in read_records(task, self.text_of, portion.reading)]
        for text, row in zip(texts, sketches([plain_codes(text) for text in texts]), strict=True):
            portion.held_out.append(_HeldOutDocument(name, fingerprint(text), row, b""))
        return portion

    def take_held_out(self, task: Task) -> _Portion:
        """Take the documents that the hash holds out."""
        portion, plains = _Portion(), list[Any]()
        found = list[tuple[str, int, bytes]]()
        for line, text, _ in read_records(task, self.text_of, portion.reading):
            name, text_print = self.side(text)
            if name != "train":
                plains.append(plain_codes(text))
                found.append((name, text_print, line + b"\n"))
        for (name, text_print, line), row in zip(found, sketches(plains), strict=True):
            portion.held_out.append(_HeldOutDocument(name, text_print, row, line))
        return portion

    def take_training(self, task: Task) -> _Portion:
        """Take the other documents and compare them with those held out."""
        portion = _Portion(lines={"train": []})
        lines, prints, texts = list[bytes](), list[int](), list[str]()
        for line, text, _ in read_records(task, self.text_of, portion.reading):
            # Computed again rather than remembered: a fingerprint is cheaper than a set of all documents held out.
            name, text_print = self.side(text)
            if name == "train":
                lines.append(line + b"\n")
                prints.append(text_print)
                texts.append(text)
        for line, duplicate in zip(lines, self.held_out.duplicates(prints, texts), strict=True):
            if duplicate:
                portion.duplicates[duplicate] = portion.duplicates.get(duplicate, 0) + 1
            if duplicate and (self.drop == "near" or self.drop == duplicate):  # "near" drops the exact ones, too
                portion.dropped += 1
            else:
                portion.lines["train"].append(line)
        return portion

    def write_report(self, work: Path, folder: Path) -> None:
        """Write the report of the finished sets beside them; from here on they only have to be moved."""
        report = self.report
        report.files = {name: str(folder / f"{name}.jsonl") for name in SETS if (work / f"{name}.jsonl").exists()}
        left = report.exact + report.near - report.dropped
        if left:
            report.warnings.append(
                f"{left} of the training documents kept are duplicates of held-out ones: the validation loss will look "
                f"too good. drop='near' (--drop near) leaves them out."
            )
        hashes = {str(number): self.hashes[source.path] for number, source in enumerate(self.all_sources)}
        inputs = describe_inputs(self.all_sources, hashes)
        sizes = sizes_of(work, (f"{name}.jsonl" for name in SETS))
        record = {
            "options": self.options,
            "inputs": inputs,
            "given": self.given_inputs,
            "report": asdict(report),
            "skipped_share": self.skipped_share,  # of the given sets and of the others, the larger one
            "sizes": sizes,
        }
        write_whole(work / REPORT, orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")


def _read_report(path: Path) -> dict[str, Any]:
    try:
        recorded = orjson.loads(path.read_bytes())
    except ValueError as error:
        raise CptError(f"{path} is damaged: {error}. Replace the split with overwrite=True (--overwrite).") from error
    if not isinstance(recorded, dict) or not {"options", "inputs", "report"} <= recorded.keys():
        raise CptError(f"{path} is not the report of a split. Take another folder, or overwrite=True (--overwrite).")
    return recorded


def _move_into_place(work: Path, folder: Path) -> None:
    files = _read_report(work / REPORT)["report"]["files"]
    names, gone = ([f"{name}.jsonl" for name in SETS if (name in files) is there] for there in (True, False))
    move_into_place(work, folder, names, REPORT, gone)


def _size(sources: Iterable[Source]) -> int:
    return sum(source.size for source in sources)
