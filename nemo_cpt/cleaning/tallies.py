"""What a cleaning counts: documents and bytes by rule, samples, and how the measures were distributed."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_cpt.cleaning.rule import Check

SAMPLES = 5  # of what each measure dropped, in the report
SAMPLE_CHARACTERS = 400
SHARE_BINS, SIZE_BINS = 40, 96  # of a share from 0 to 1; of a size, four to each power of two up to 16 million


@dataclass
class Dropped:
    """What one measure of a rule dropped.

    Attributes:
        documents: How many.
        nbytes: Their bytes, as they came.
        samples: The first of them: `text` (its beginning), `value`, `limit`.
    """

    documents: int = 0
    nbytes: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: "Dropped") -> None:
        """Count in what comes behind."""
        self.documents += other.documents
        self.nbytes += other.nbytes
        # Tasks are added in the inputs' order: the samples are the first, whatever the number of workers.
        self.samples += other.samples[: SAMPLES - len(self.samples)]


@dataclass
class Counts:
    """What was counted of some documents.

    Attributes:
        documents: All of them.
        nbytes: Their bytes, as they came.
        kept: Those that no rule about single documents dropped.
        kept_bytes: Their bytes, as they are written.
        dropped: What was dropped, by rule and measure.
        changes: How often something was done to a text, by name.
        before: By rule and measure, how many documents have a value in each bin: of those that were measured.
        after: The same of those that are kept.
        limits: By rule and measure, a check with its limits.
    """

    documents: int = 0
    nbytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    dropped: dict[tuple[str, str], Dropped] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Check] = field(default_factory=dict)

    def drop(self, rule: str, check: Check, text: str, nbytes: int, of: str = "") -> None:
        """Count a dropped document.

        Args:
            rule: The rule's name.
            check: What failed.
            text: The document's.
            nbytes: Its bytes.
            of: What it repeats.
        """
        sample = {"text": text[:SAMPLE_CHARACTERS], "value": check.value, "limit": check.limit}
        found = Dropped(1, nbytes, [sample | ({"of": of} if of else {})])
        self.dropped.setdefault((rule, check.measure), Dropped()).add(found)

    def measured(self, checks: list[list[tuple[str, Check]]], kept: list[bool]) -> None:
        """Count the values of documents into the histograms.

        Args:
            checks: Of each document, with the rules' names.
            kept: Whether it is kept.
        """
        before, after = dict[str, list[float]](), dict[str, list[float]]()
        for found, is_kept in zip(checks, kept, strict=True):
            for rule, check in found:
                name = f"{rule}.{check.measure}"
                before.setdefault(name, []).append(check.value)
                if is_kept:
                    after.setdefault(name, []).append(check.value)
                self.limits[name] = check  # any of them: the limits are the rule's, and the same for all documents
        for name, values in before.items():
            self.before[name], self.after[name] = histogram(name, values), histogram(name, after.get(name, []))

    def add(self, other: "Counts") -> None:
        """Count in what comes behind."""
        self.documents += other.documents
        self.nbytes += other.nbytes
        self.kept += other.kept
        self.kept_bytes += other.kept_bytes
        self.changes.update(other.changes)
        self.limits.update(other.limits)
        for key, found in other.dropped.items():
            self.dropped.setdefault(key, Dropped()).add(found)
        for mine, theirs in ((self.before, other.before), (self.after, other.after)):
            for name, counted in theirs.items():
                mine[name] = mine[name] + counted if name in mine else counted


@dataclass
class CleaningReport:
    """What `clean` did.

    Attributes:
        status: `written`, or `unchanged` where the same cleaning was there already.
        files: Paths of `kept`, `dropped`, `report` and `cleaning` (the manifest).
        documents: That were read.
        nbytes: Their bytes: of lines as they came.
        kept: Documents that are kept.
        kept_bytes: Their bytes, as they are written.
        dropped: By rule, then by measure: `documents` and `nbytes`.
        changes: How often something was done to a text: repaired, masked, lines removed.
        evaluation_texts: Of evaluation sets, how many are `looked for` and how many `too short` for that.
        skipped: Lines that gave no text, by reason.
        warnings: Sentences for people.
    """

    status: str = "written"
    files: dict[str, str] = field(default_factory=dict)
    documents: int = 0
    nbytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    dropped: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    evaluation_texts: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def is_share(measure: str) -> bool:
    """Say whether a measure lies between 0 and 1."""
    return measure.endswith(("_share", "_score", "similarity"))


def histogram(measure: str, values: list[float]) -> Any:
    """Count values by bin."""
    bins = SHARE_BINS if is_share(measure) else SIZE_BINS
    # A share of 1, and what is larger than the last bin, belong to the last.
    places = np.minimum(position(measure, np.asarray(values, np.float64)), bins - 1)
    return np.bincount(places.astype(np.int64), minlength=bins)


def position(measure: str, value: Any) -> Any:
    """Return in which bin a value lies, and where in it."""
    # Sizes by their logarithm: lengths of documents run over five powers of ten.
    return value * SHARE_BINS if is_share(measure) else 4 * np.log2(np.maximum(value, 1))


def bin_edge(measure: str, number: int) -> float:
    """Return the value at which a bin begins."""
    if is_share(measure):
        return number / SHARE_BINS
    return 2 ** (number / 4) if number else 0.0  # the first holds what is below 1, too
