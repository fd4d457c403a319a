"""What the inputs held besides texts: where to stop, and how much may be left out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_cpt.corpus.reading.chunks import Task, count_lines
from nemo_cpt.corpus.reading.formats import first_bytes, resemblance
from nemo_cpt.corpus.reading.lines import Problem, Reading
from nemo_cpt.corpus.reading.sources import Source
from nemo_cpt.errors import CptError

MAX_SKIPPED = 0.01


@dataclass(frozen=True)
class Policy:
    """What to do with lines that give no text.

    Attributes:
        skip: Leave them out instead of stopping at the first.
        max_skipped: The share of them that may be left out.
        chosen: Whether the user has a choice, and an option for it.
    """

    skip: bool
    max_skipped: float
    chosen: bool = True

    @classmethod
    def of(cls, on_error: str, max_skipped: float | None) -> "Policy":
        """Return the policy that the options `on_error` and `max_skipped` ask for.

        Raises:
            CptError: One is unusable.
        """
        if on_error not in ("stop", "skip"):
            raise CptError(f"on_error is {on_error!r}; it can be 'stop' or 'skip'.")
        if max_skipped is not None and on_error == "stop":
            raise CptError(
                f"max_skipped is {max_skipped}, and nothing is skipped: add on_error='skip' (--on-error skip)."
            )
        if max_skipped is not None and not 0 <= max_skipped <= 1:
            raise CptError(f"max_skipped is {max_skipped}; it must lie between 0 and 1.")
        return cls(on_error == "skip", MAX_SKIPPED if max_skipped is None else max_skipped)

    def against(self, skipped: Mapping[str, int], share: float = 0.0) -> str | None:
        """Return what speaks against an output that is there, or begun; None where it may be taken.

        Args:
            skipped: What it left out, by reason.
            share: That is of its inputs, see `Tally.skipped_share`; 0 for one that is only begun.
        """
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in skipped.items())
        if skipped and not self.skip:
            return f"it left out what gives no text ({reasons}), and on_error='stop' leaves out nothing"
        if share > self.max_skipped:
            return (
                f"it left out what gives no text ({reasons}), {100 * share:.3g} % of its inputs, and "
                f"{100 * self.max_skipped:g} % may be skipped (max_skipped, --max-skipped)"
            )
        return None


NO_SKIPPING = Policy(skip=False, max_skipped=0.0, chosen=False)


@dataclass
class Tally:
    """Counts of what was read: of all inputs, and (`file_...`) of the one that is being read.

    Attributes:
        texts: Lines (rows) that gave a text.
        blank: Lines with nothing on them.
        nbytes: Bytes of all lines; rows have none.
        skipped: Lines left out, by reason.
        skipped_bytes: Their bytes.
        damaged_bytes: Size on disk of the inputs that break off: nobody knows how much of them is missing.
        first: The first line left out, with its place and its reason.
        ranges: What was counted of each range of a file: `path`, `lines`, `blank`, `texts`, `first`. Whether the file
            may pass is for `check_ranges` to say, once all of its ranges are counted.
    """

    texts: int = 0
    blank: int = 0
    nbytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_bytes: int = 0
    damaged_bytes: int = 0
    first: str = ""
    file_lines: int = 0
    file_blank: int = 0
    file_texts: int = 0
    file_first: str = ""
    ranges: list[dict[str, Any]] = field(default_factory=list)

    def add(self, task: Task, reading: Reading, source: Source, policy: Policy) -> list[dict[str, Any]]:
        """Count a task in; tasks must come in the inputs' order, so that the first problem is the one reported.

        Returns:
            The lines that it left out: `path`, `line`, `offset`, `reason`, `detail`.

        Raises:
            CptError: A line gives no text and is not to be skipped, or hardly one of the input's lines gives one.
        """
        problems = self._problems(task, reading, source)
        sentences = [self._sentence(task, problem, source) for problem in problems]
        texts = self.file_texts + reading.texts
        # With "stop" the first one ends it; with "skip" nothing is decided before the file's end.
        if problems and not policy.skip:
            # Only of a file's first line: what begins well is of the right format; and what is empty is of none.
            first = self.file_lines + problems[0].line + source.start == 0 and problems[0].reason != "empty_file"
            hint = _hint(source) if first else ""
            skip = ", or leave such lines out with on_error='skip' (--on-error skip)" if policy.chosen else ""
            line = f"line {self._line(problems[0]) + count_lines(source.path, source.start)}, "
            raise CptError(f"{task.path}, {line if source.is_range else ''}{sentences[0]}. {hint}Mend it{skip}.")
        file_first = self.file_first or next(iter(sentences), "")
        # Nothing is counted before the checks: a refused task must not be in the next checkpoint.
        lines, blank = self.file_lines + reading.lines, self.file_blank + reading.blank
        if task.last and source.is_range:
            counted = {"lines": lines, "blank": blank, "texts": texts, "first": file_first}
            self.ranges.append({"path": source.path} | counted)
        elif task.last:
            _check_file(source, lines - blank, texts, task.damage, file_first, policy)
        found = [
            {"path": task.path, "line": self._line(problem)}
            | {key: getattr(problem, key) for key in ("offset", "reason", "detail")}
            for problem in problems
        ]
        self.texts += reading.texts
        self.blank += reading.blank
        self.nbytes += reading.nbytes
        for problem in problems:
            self.skipped[problem.reason] = self.skipped.get(problem.reason, 0) + 1
            self.skipped_bytes += problem.nbytes
        self.damaged_bytes += source.size if task.damage else 0
        self.first = self.first or (f"{task.path}, {file_first}" if file_first else "")
        self.file_lines, self.file_blank, self.file_texts, self.file_first = (
            (0, 0, 0, "") if task.last else (lines, blank, texts, file_first)
        )
        return found

    def include(self, other: "Tally") -> None:
        """Count in what another task read, of the inputs that follow."""
        self.texts += other.texts
        self.blank += other.blank
        self.nbytes += other.nbytes
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
        self.skipped_bytes += other.skipped_bytes
        self.damaged_bytes += other.damaged_bytes
        self.first = self.first or other.first
        self.ranges += other.ranges

    def check_ranges(self, sources: Sequence[Source], policy: Policy) -> None:
        """Check each input of which ranges were counted as `add` checks one that is read whole.

        Raises:
            CptError: It is empty, or hardly one of its lines gives a text.
        """
        by_path = {source.path: source for source in sources}
        for path in dict.fromkeys(each["path"] for each in self.ranges):
            own = [each for each in self.ranges if each["path"] == path]
            lines, blank, texts = (sum(each[name] for each in own) for name in ("lines", "blank", "texts"))
            if lines == blank:
                raise CptError(f"{path} is empty: it holds blank lines alone. Take it out of the inputs.")
            first = next((each["first"] for each in own if each["first"]), "")
            _check_file(by_path[path], lines - blank, texts, "", first, policy)

    def skipped_share(self, sources: Sequence[Source]) -> float:
        """Return the share of the inputs that was left out."""
        lost, size = self._lost(), sum(source.size for source in sources)
        # The worst of three: one line may hold most of the bytes, and a file that breaks off has lines that nobody
        # counted.
        of_lines, of_bytes = lost / max(self.texts + lost, 1), self.skipped_bytes / max(self.nbytes, 1)
        return max(of_lines, of_bytes, self.damaged_bytes / max(size, 1))

    def _lost(self) -> int:
        # An empty file has no line that was lost.
        return sum(count for reason, count in self.skipped.items() if reason != "empty_file")

    def _line(self, problem: Problem) -> int:
        return self.file_lines + problem.line + 1

    def _problems(self, task: Task, reading: Reading, source: Source) -> list[Problem]:
        problems = list(reading.problems)
        if task.damage:
            problems.append(Problem("damaged", task.damage, reading.lines, task.stop))
        elif source.is_range:
            pass  # blank lines alone may be all that is in it
        elif task.last and self.file_lines + reading.lines == self.file_blank + reading.blank:
            problems.append(Problem("empty_file", "the file is empty", 0, 0))
        return problems

    def _sentence(self, task: Task, problem: Problem, source: Source) -> str:
        unit = "row" if isinstance(task.data, list) else "byte offset"
        # Of a range nobody has counted the lines before it.
        line = "" if source.is_range else f"line {self._line(problem)}, "
        return f"{line}{unit} {problem.offset}: {problem.detail}"

    def check(self, sources: Sequence[Source], max_skipped: float) -> None:
        """Check the share of what was left out: of the lines, of their bytes, and of the files that break off.

        Raises:
            CptError: It is larger than `max_skipped`.
        """
        if (share := self.skipped_share(sources)) <= max_skipped:
            return
        lost, lines = self._lost(), max(self.texts + self._lost(), 1)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.items())
        damaged = (
            f", and {self.damaged_bytes:,} bytes are in files that break off, of which an unknown part is missing"
            if self.damaged_bytes
            else ""
        )
        # Rounded up, so that the same run passes with it.
        enough = min(math.ceil(share * 100) / 100, 1)
        raise CptError(
            f"{lost:,} of {lines:,} lines give no text ({reasons}){damaged}: {100 * share:.3g} % of the inputs, and "
            f"{100 * max_skipped:g} % may be skipped. The first is {self.first}. Mend them, or allow it with "
            f"max_skipped={enough:g} (--max-skipped {enough:g})."
        )


def _check_file(source: Source, lines: int, texts: int, damage: str, first: str, policy: Policy) -> None:
    """Check an input that was read to its end: one that hardly gives a text is of another format than it seems.

    Args:
        source: The input.
        lines: Its lines that are not blank.
        texts: Those that gave a text.
        damage: Why it is not complete.
        first: Its first problem.
        policy: What may be skipped.

    Raises:
        CptError: None of its lines gives a text, or less than half of them and than is allowed.
    """
    # Of each file: one of another format among a thousand good ones would stay below the share of the whole.
    lost = lines - texts
    if (not texts and (lines or damage)) or lost > max(policy.max_skipped, 0.5) * lines:
        share = "none" if not texts else f"only {texts:,}"
        raise CptError(
            f"{source.path}: {share} of its {lines:,} lines gives a text ({first}). {_hint(source)}"
            "Mend it, or take it out of the inputs: on_error='skip' leaves out lines, not files."
        )


def _hint(source: Source) -> str:
    """Return what an input seems to be that does not begin with a text."""
    if source.array or source.kind not in ("plain", "gzip", "zstd"):
        return ""
    return resemblance(first_bytes(source.path, source.kind))
