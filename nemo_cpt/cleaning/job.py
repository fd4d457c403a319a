"""Cleaning a corpus: every document through the rules, then duplicates; what is kept and what is dropped, with why."""

import json
import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from nemo_cpt.arguments import checked
from nemo_cpt.cleaning.contamination import Contamination
from nemo_cpt.cleaning.document import Document
from nemo_cpt.cleaning.duplicates import Duplicate, find_duplicates, sketch
from nemo_cpt.cleaning.examination import examine
from nemo_cpt.cleaning.report import page
from nemo_cpt.cleaning.rule import Check
from nemo_cpt.cleaning.rules import Rules, chosen_rules
from nemo_cpt.cleaning.tallies import CleaningReport, Counts
from nemo_cpt.corpus.atomic_files import (
    folder_to_fill,
    locked,
    move_into_place,
    refuse_foreign_files,
    write_whole,
    written_beside,
)
from nemo_cpt.corpus.dataset.manifest import changed_input, check_sizes, describe_inputs, sizes_of
from nemo_cpt.corpus.plan import left_over
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.processes import in_order
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.chunks import Feed, Task, check_unchanged, hash_source
from nemo_cpt.corpus.reading.lines import Reading, TextUnder
from nemo_cpt.corpus.reading.records import Record, read_records, to_json
from nemo_cpt.corpus.reading.sources import PARTS, UNFINISHED, Inputs, Source, check_elsewhere, list_sources
from nemo_cpt.corpus.reading.tally import Policy, Tally
from nemo_cpt.errors import CptError
from nemo_cpt.installed import installed_versions
from nemo_cpt.records import restored

KEPT, DROPPED, REPORT, MANIFEST, LOCK = "kept.jsonl", "dropped.jsonl", "report.html", "cleaning.json", ".cleaning.lock"
PARTS_FOLDER = "cleaning" + PARTS
FILES = (KEPT, DROPPED, REPORT, MANIFEST)
FORMAT = 1  # of the manifest: raised when an older reader would misread what is new
_CHUNK = 1 << 20  # half of what `split` takes: rules are slow, and the last chunks keep few workers busy
SKETCHES = "sketches.bin"
_VERSIONS = ("ftfy", "lingua-language-detector", "rensa", "numpy", "xxhash")


@checked
def clean(
    inputs: Inputs,
    output: str | os.PathLike[str],
    rules: Rules | str,
    *,
    decontaminate: Inputs | None = (),
    json_key: str = "text",
    on_error: str = "stop",
    max_skipped: float | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    patience: float = 10.0,
) -> CleaningReport:
    """Write what is worth learning from to `kept.jsonl` of a folder, and the rest to `dropped.jsonl`, with the reason.

    Beside them `cleaning.json` says what was done to what and with what, and `report.html` shows it. A kept document
    has all its fields, and its text as the rules left it; a dropped one is as it came, with the field `dropped_by`:
    `rule`, `measure`, `value` and its limits. A duplicate is as the rules left it; `kept_line` is its twin's line of
    `kept.jsonl`. Documents stay in order, whatever the number of workers; in `dropped.jsonl` duplicates come last.

    Args:
        inputs: As for `prepare`.
        output: Folder of the four files.
        rules: The rules, a language that has some (`ja`, `en`, `zh`, `ko`), or a YAML file of rules.
        decontaminate: Evaluation sets, as inputs: documents that share an n-gram with one are dropped.
        json_key: The field that holds the text.
        on_error: As for `prepare`.
        max_skipped: As for `prepare`.
        workers: Processes; all CPUs that this process may use by default.
        overwrite: Replace an existing cleaning, and any files of these names.
        quiet: Show no progress.
        patience: Seconds to wait for another process that cleans into the folder.

    Raises:
        CptError: An input, a rule or an option is unusable, the rules drop every document, an input lies where an
            output would go, the folder holds another cleaning or files of another origin, another process cleans into
            it, or it cannot be written.
    """
    check_options(rules, on_error, max_skipped, workers)
    chosen = chosen_rules(rules).without_contamination_of(tuple(source.path for source in _sources_of(decontaminate)))
    job = Cleaning(list_sources(inputs), chosen, json_key, Policy.of(on_error, max_skipped))
    folder = Path(output)
    job.check_targets(folder)
    # With the lock file there, somebody is at work: what the manifest says may be about to change.
    if not (overwrite or (folder / LOCK).exists()) and (report := job.existing(folder)) is not None:
        # Without the lock, which a folder that is only to be read does not allow.
        return _with_left_over(report, folder)
    chosen.load()  # before anything is written: what the rules need may be missing
    try:
        with folder_to_fill(folder), locked(folder / LOCK, patience):
            return _with_left_over(job.make(folder, count_processes(workers), overwrite, quiet), folder)
    except OSError as error:
        raise CptError(f"Cannot clean into {folder}: {error}. Mend that and run the same command again.") from error


def check_options(rules: Rules | str, on_error: str, max_skipped: float | None, workers: int | None) -> None:
    """Check the options of `clean` that need no input.

    Raises:
        CptError: One is unusable, or the rules are none.
    """
    chosen_rules(rules)
    Policy.of(on_error, max_skipped)
    count_processes(workers)


def _with_left_over(report: CleaningReport, folder: Path) -> CleaningReport:
    return replace(report, warnings=[*report.warnings, *left_over(folder / PARTS_FOLDER)])


def _absolute(source: Source) -> str:
    return source.path if source.kind == "hub" else os.path.abspath(source.path)


def _sources_of(inputs: Inputs | None) -> list[Source]:
    return list_sources(inputs) if inputs else []


@dataclass
class _Portion:
    """What a worker made of a task.

    Attributes:
        kept: Lines of documents that are kept so far.
        dropped: Lines of those that are not.
        sketches: Rows of those that are kept.
        counts: What was counted of all of them.
        reading: How the task's lines were read.
    """

    kept: bytes = b""
    dropped: bytes = b""
    sketches: Any = None
    counts: Counts = field(default_factory=Counts)
    reading: Reading = field(default_factory=Reading)


class Cleaning:
    """One cleaning: its options, and the rules that forked workers share.

    Two passes: `examine` takes each document through the rules, in parallel, and writes a sketch of those that are
    kept; then duplicates are found among the sketches, and left out of the file of kept documents.
    """

    def __init__(self, sources: list[Source], rules: Rules, json_key: str, policy: Policy) -> None:
        self.sources, self.rules, self.json_key, self.policy = sources, rules, json_key, policy
        self.counts, self.tally, self.hashes = Counts(), Tally(), dict[str, str]()
        # What makes a cleaning another one; neither the inputs, which are compared by content, nor the workers.
        self.options = rules.as_dict() | {"json_key": json_key, "evaluation_sets": self._evaluation_sets()}
        for rule in self.options["rules"]:
            rule.pop("files", None)  # the evaluation sets, which are compared by what they hold
        self.seconds = 0.0

    def _evaluation_sets(self) -> list[dict[str, Any]]:
        files = [file for rule in self.rules.rules for file in getattr(rule, "files", ())]
        return [{"path": _absolute(each), "hash": hash_source(each)} for each in _sources_of(files)]

    def check_targets(self, folder: Path) -> None:
        """Check that no input lies where this cleaning writes or deletes.

        Raises:
            CptError: One does.
        """
        check_elsewhere(self.sources, folder, FILES, "cleaning")

    def existing(self, folder: Path) -> CleaningReport | None:
        """Return the report of this very cleaning if it is there.

        Raises:
            CptError: Another cleaning is there.
        """
        if not (folder / MANIFEST).exists():
            return None
        recorded = read_cleaning(folder)
        reason = changed_input(self.sources, recorded["inputs"]) or self._other_options(recorded["options"])
        left_out = recorded["report"]["skipped"], recorded.get("skipped_share", 0.0)
        if reason := reason or self.policy.against(*left_out):
            raise CptError(
                f"{folder} holds another cleaning: {reason}. Take another folder, or overwrite=True (--overwrite)."
            )
        check_sizes(folder, recorded.get("sizes", {}))
        return restored(CleaningReport, recorded["report"], files=paths_in(folder), status="unchanged")

    def _other_options(self, recorded: dict[str, Any]) -> str | None:
        """Return what differs between the options and those of a manifest; of evaluation sets the content counts."""
        # As JSON gives them back, which the recorded ones are: lists for tuples.
        ours = orjson.loads(_dumps(self.options))
        sets, before = (
            {each.get("hash", ""): each["path"] for each in options["evaluation_sets"]} for options in (ours, recorded)
        )
        if ours | {"evaluation_sets": []} != recorded | {"evaluation_sets": []}:
            return "its rules or options are others, as its cleaning.json says"
        if new := [path for content, path in sets.items() if content not in before]:
            return f"it was not made with the evaluation set {', '.join(new)} as it is now"
        gone = [path for content, path in before.items() if content not in sets]
        return f"it was made with the evaluation set {', '.join(gone)} as well" if gone else None

    def make(self, folder: Path, workers: int, overwrite: bool, quiet: bool) -> CleaningReport:
        """Write the files beside, then move them into their folder; the folder must be locked.

        Raises:
            CptError: As `clean`.
        """
        work = folder / UNFINISHED
        return written_beside(
            work,
            MANIFEST,
            lambda: move_into_place(work, folder, (KEPT, DROPPED, REPORT), MANIFEST),
            lambda: self._write(work, folder, workers, quiet),
            existing=lambda: self.existing(folder),
            refuse_foreign=lambda: refuse_foreign_files(folder, FILES, MANIFEST, "cleaning", "replace"),
            overwrite=overwrite,
        )

    def _write(self, work: Path, folder: Path, workers: int, quiet: bool) -> CleaningReport:
        begin = time.monotonic()
        self.examine(work, workers, quiet)
        self.tally.check(self.sources, self.policy.max_skipped)
        if not self.counts.kept:
            raise CptError(self._why_all_are_dropped())
        # After all rules: a document that a rule drops makes no other one a duplicate.
        self._leave_out(find_duplicates(work / SKETCHES, self.rules.duplicates), work)
        (work / SKETCHES).unlink()
        self.seconds = time.monotonic() - begin
        report = self._report(folder)
        shown = page(report, self.counts, self.rules, self.seconds)
        write_whole(work / REPORT, shown.encode())
        hashes = {str(number): self.hashes[source.path] for number, source in enumerate(self.sources)}
        manifest = {
            "format": FORMAT,
            "options": self.options,
            "inputs": describe_inputs(self.sources, hashes),
            "report": asdict(report),
            "skipped_share": self.tally.skipped_share(self.sources),
            "sizes": sizes_of(work, (KEPT, DROPPED)),
            "seconds": round(self.seconds, 1),
            "versions": installed_versions(_VERSIONS),
        }
        write_whole(work / MANIFEST, _dumps(manifest))
        return report

    def examine(self, work: Path, workers: int, quiet: bool) -> None:
        """Go through the inputs and write what the workers made of them, in order.

        Raises:
            CptError: A line gives no text and is not to be skipped, too many give none, or an input changes.
        """
        total = sum(source.nbytes for source in self.sources)
        before = np.cumsum([0, *(source.nbytes for source in self.sources)]).tolist()
        with ExitStack() as stack:
            kept, dropped, sketches = (
                stack.enter_context((work / name).open("wb")) for name in (KEPT, DROPPED, SKETCHES)
            )
            bar = stack.enter_context(ProgressBar("cleaning", total, quiet))
            for task, portion in in_order(self._take, Feed(self.sources, None, _CHUNK), workers):
                source = self.sources[task.source]
                # With its last piece an input has been read whole: only now is its hash known.
                if task.last:
                    check_unchanged(source, task)
                    self.hashes[task.path] = task.hash
                self.tally.add(task, portion.reading, source, self.policy)
                kept.write(portion.kept)
                dropped.write(portion.dropped)
                sketches.write(portion.sketches.tobytes())
                self.counts.add(portion.counts)
                bar.update(before[task.source] + task.done, self.counts.documents)
            for file in (kept, dropped, sketches):
                _sync(file)

    def _take(self, task: Task) -> _Portion:
        """Take a task's documents through the rules; called in a worker."""
        portion = _Portion()
        counts, kept, dropped = portion.counts, list[bytes](), list[bytes]()
        plains, sizes = list[Any](), list[int]()
        checks, is_kept = list[list[tuple[str, Check]]](), list[bool]()
        for record in read_records(task, TextUnder(self.json_key), portion.reading):
            found = examine(record.text, self.rules)
            counts.documents += 1
            counts.nbytes += len(record.line)
            # Also of those that are dropped: the report shows where a limit cuts through the values.
            checks.append(found.checks)
            is_kept.append(found.failed is None)
            if found.failed is not None:
                rule, check = found.failed
                counts.drop(rule, check, record.text, len(record.line))
                dropped.append(_with_reason(record.line, rule, check))
                continue
            line = self._line(record, found.document)
            kept.append(line)
            plains.append(found.document.plain)
            sizes.append(len(line))
            counts.changes.update(found.document.changes)
        counts.kept, counts.kept_bytes = len(kept), sum(sizes)
        counts.measured(checks, is_kept)
        portion.kept, portion.dropped = b"".join(kept), b"".join(dropped)
        portion.sketches = sketch(plains, sizes)
        return portion

    def _line(self, record: Record, document: Document) -> bytes:
        # As it came, to the byte: to write it anew could change numbers and escapes.
        if document.text == record.text:
            return record.line + b"\n"
        # Read anew, by Python's json: orjson has made floats of integers beyond 64 bits.
        return to_json(json.loads(record.line) | {self.json_key: document.text}) + b"\n"

    def _leave_out(self, duplicates: list[Duplicate], work: Path) -> None:
        """Move duplicates from the kept documents to the dropped ones."""
        if not duplicates:
            return
        # Documents are lines of the file: a duplicate's number is that of its line.
        every = np.ones(self.counts.kept, bool)
        every[[each.document for each in duplicates]] = False
        lines = np.cumsum(every)  # of each kept document in the file to come
        waiting = iter(duplicates)
        following = next(waiting, None)
        with (
            (work / KEPT).open("rb") as source,
            (work / "unique.jsonl").open("wb") as kept,
            (work / DROPPED).open("ab") as dropped,
        ):
            for number, line in enumerate(source):
                if following is None or number != following.document:
                    kept.write(line)
                    continue
                self._drop_duplicate(following, line, int(lines[following.of]), dropped)
                following = next(waiting, None)
            for file in (kept, dropped):
                _sync(file)
        (work / "unique.jsonl").replace(work / KEPT)

    def _drop_duplicate(self, found: Duplicate, line: bytes, kept_line: int, dropped: BinaryIO) -> None:
        wanted = self.rules.duplicates
        check = Check("exact" if found.exact else "similarity", found.similarity, at_most=wanted.near)
        self.counts.kept -= 1
        self.counts.kept_bytes -= len(line)
        text = json.loads(line)[self.json_key]  # as it was read: orjson takes no NaN
        self.counts.drop("duplicates", check, text, len(line), f"line {kept_line:,} of {KEPT}")
        dropped.write(_with_reason(line.rstrip(b"\n"), "duplicates", check, {"kept_line": kept_line}))

    def _why_all_are_dropped(self) -> str:
        if not self.counts.documents:
            return f"The inputs hold no document (first input: {self.sources[0].path})."
        most = sorted(self.counts.dropped.items(), key=lambda each: -each[1].documents)[:3]
        reasons = "; ".join(
            f"{rule}: {measure} ({found.documents:,}; the first has {found.samples[0]['value']:g}, "
            f"{found.samples[0]['limit']})"
            for (rule, measure), found in most
        )
        return (
            f"The rules drop all {self.counts.documents:,} documents: {reasons}. Are they in the language "
            f"{self.rules.language}, and is {self.json_key!r} their text? --explain FILE:LINE shows one; "
            "--config changes limits."
        )

    def _report(self, folder: Path) -> CleaningReport:
        counts = self.counts
        dropped = dict[str, dict[str, dict[str, int]]]()
        for (rule, measure), found in counts.dropped.items():
            dropped.setdefault(rule, {})[measure] = {"documents": found.documents, "nbytes": found.nbytes}
        order = [rule.name for rule in self.rules.rules] + ["duplicates"]
        report = CleaningReport(
            files=paths_in(folder),
            documents=counts.documents,
            nbytes=counts.nbytes,
            kept=counts.kept,
            kept_bytes=counts.kept_bytes,
            dropped={rule: dict(sorted(dropped[rule].items())) for rule in order if rule in dropped},
            changes={name: count for name, count in sorted(counts.changes.items()) if count},
            evaluation_texts=next((each.searched for each in self.rules.rules if isinstance(each, Contamination)), {}),
            skipped=self.tally.skipped,
        )
        if counts.kept * 5 < counts.documents:
            report.warnings.append(
                f"only {counts.kept / counts.documents:.0%} of the documents are kept: look at {REPORT} before you "
                "train on them."
            )
        return report


def paths_in(folder: Path) -> dict[str, str]:
    """Return the paths of a cleaning's files, by name."""
    return {file.partition(".")[0]: str(folder / file) for file in FILES}


@checked
def read_cleaning(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of a cleaning, `cleaning.json`.

    Raises:
        CptError: There is none, or it is damaged.
    """
    path = Path(folder, MANIFEST)
    try:
        recorded = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise CptError(f"There is no {path}: nothing was cleaned into that folder.") from None
    except ValueError as error:
        raise CptError(
            f"{path} is damaged: {error}. Replace the cleaning with overwrite=True (--overwrite)."
        ) from error
    if not isinstance(recorded, dict) or recorded.get("format") != FORMAT:
        raise CptError(
            f"{path} is not the manifest of a cleaning. Take another folder, or overwrite=True (--overwrite)."
        )
    return recorded


def _with_reason(line: bytes, rule: str, check: Check, more: dict[str, Any] | None = None) -> bytes:
    """Return a document's line with why it was dropped as its last field; nothing else of it is touched."""
    limits = {"at_least": check.at_least, "at_most": check.at_most}
    reason = {"rule": rule, "measure": check.measure, "value": check.value}
    reason |= {name: limit for name, limit in limits.items() if limit is not None} | (more or {})
    return line[: line.rindex(b"}")] + b', "dropped_by": ' + orjson.dumps(reason) + b"}\n"


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS) + b"\n"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
