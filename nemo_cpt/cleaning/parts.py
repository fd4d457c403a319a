"""A cleaning made by several tasks: each takes a share through the rules; duplicates are found over all, in the join.

A part is a folder with the documents that are kept so far, the dropped ones and the sketches of the former, and
`part.json` with what was counted. Laid behind one another they are what one machine's first pass writes.
"""

import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
import yaml

from nemo_cpt.arguments import checked
from nemo_cpt.cleaning.job import (
    DROPPED,
    KEPT,
    LOCK,
    MANIFEST,
    PARTS_FOLDER,
    SKETCHES,
    Cleaning,
    check_options,
    paths_in,
    read_cleaning,
)
from nemo_cpt.cleaning.rule import Check
from nemo_cpt.cleaning.rules import Rules, chosen_rules, rules_of
from nemo_cpt.cleaning.tallies import CleaningReport, Counts, Dropped
from nemo_cpt.corpus.atomic_files import copy_to, locked, sync, write_whole
from nemo_cpt.corpus.dataset.manifest import changed_input, describe_inputs
from nemo_cpt.corpus.plan import Plan, remove_parts
from nemo_cpt.corpus.preparing.joining import inputs_of_parts
from nemo_cpt.corpus.preparing.workers import count_processes
from nemo_cpt.corpus.progress import ProgressBar
from nemo_cpt.corpus.reading.shares import cut
from nemo_cpt.corpus.reading.sources import PLAN, Inputs, Source, list_sources, listed_again
from nemo_cpt.corpus.reading.tally import Policy, Tally
from nemo_cpt.errors import CptError
from nemo_cpt.records import restored

PART = "part.json"
Kind = TypeVar("Kind", bound=Cleaning)


@checked
def make_plan(
    inputs: Inputs,
    output: str | os.PathLike[str],
    rules: Rules | str,
    tasks: int,
    *,
    decontaminate: Inputs | None = (),
    json_key: str = "text",
    on_error: str = "stop",
    max_skipped: float | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    patience: float = 10.0,
) -> Plan:
    """Plan a cleaning that `tasks` tasks do together; nothing is written.

    Args:
        inputs: As for `clean`, and so all the others.
        output: Folder of the four files.
        rules: The rules, a language that has some, or a YAML file of rules.
        tasks: How many; fewer where the inputs have not as many lines, or files that cannot be cut.
        decontaminate: Evaluation sets.
        json_key: The field that holds the text.
        on_error: What to do with a line that gives no text.
        max_skipped: The share of the whole inputs that may be skipped.
        workers: Processes of each task.
        overwrite: Replace an existing cleaning, and parts of another one.
        quiet: Show no progress.
        patience: Seconds to wait for another process that writes the same.

    Raises:
        CptError: An input, a rule or an option is unusable.
    """
    check_options(rules, on_error, max_skipped, workers)
    sets = tuple(source.path for source in list_sources(decontaminate)) if decontaminate else ()
    chosen = chosen_rules(rules).without_contamination_of(sets)
    chosen.load()
    # As text: a task reads them from the plan's file, perhaps on another machine.
    settings = {"rules": chosen.to_yaml(), "json_key": json_key, "on_error": on_error, "max_skipped": max_skipped}
    settings |= {"workers": workers, "quiet": quiet, "patience": patience}
    sources = list_sources(inputs)
    folder = Path(os.path.abspath(output))
    cleaning = _cleaning(Cleaning, settings, sources)
    cleaning.check_targets(folder)
    # As the plan's file gives them back, where the keys by n are text.
    job = orjson.loads(orjson.dumps(cleaning.options, option=orjson.OPT_NON_STR_KEYS))
    return Plan(folder / PARTS_FOLDER, job, settings, sources, cut(sources, tasks), overwrite)


def _cleaning(kind: type[Kind], settings: dict[str, Any], sources: list[Source]) -> Kind:
    rules = rules_of(yaml.safe_load(settings["rules"]))
    return kind(sources, rules, settings["json_key"], Policy.of(settings["on_error"], settings["max_skipped"]))


def existing(plan: Plan) -> CleaningReport | None:
    """Return the report of the cleaning that a plan is for, where it is there.

    Raises:
        CptError: Another one is there, and may not be replaced.
    """
    if plan.overwrite:
        return None
    return _whole(plan).existing(plan.folder.parent)


def missing(plan: Plan) -> list[int]:
    """Return the numbers of the parts that are not done.

    Raises:
        CptError: An input's content is not what a part was made of, and parts may not be replaced.
    """
    shares = plan.shares_now()
    return [number for number in range(len(shares)) if not _is_done(plan, number, shares[number])]


def _is_done(plan: Plan, number: int, share: list[Source]) -> bool:
    made = _read_part(plan, number)
    if made is None or made["plan"] != plan.key:
        return False
    policy = Policy.of(plan.settings["on_error"], plan.settings["max_skipped"])
    change = changed_input(share, made["inputs"]) or policy.against(made["tally"]["skipped"])
    if change is None:
        return True
    if plan.overwrite:
        return False
    raise CptError(
        f"{plan.part(number)} is not what this job would make: {change}. Begin anew with overwrite=True (--overwrite)."
    )


def _read_part(plan: Plan, number: int) -> dict[str, Any] | None:
    try:
        return orjson.loads(Path(plan.part(number), PART).read_bytes())
    except (OSError, ValueError):  # a folder without its last file is a part to be made
        return None


def clean_part(folder: str | os.PathLike[str], number: int) -> None:
    """Take one share of a plan through the rules; one that is done is left alone.

    Args:
        folder: The plan's.
        number: The task's, from 0.

    Raises:
        CptError: As `clean`; or an input changed since the tasks were planned.
    """
    plan = Plan.read(folder)
    share, settings = plan.share(number), plan.settings
    with locked(Path(plan.part(number) + ".lock"), settings["patience"]):
        if _is_done(plan, number, share):
            return
        # Unlike a part of a dataset, one that was killed begins anew: its rules have no state that could be kept.
        begin, cleaning = time.monotonic(), _cleaning(Cleaning, settings, share)
        cleaning.rules.load()
        part, work = Path(plan.part(number)), Path(plan.part(number) + ".unfinished")
        # The part, too: what is there is not this job's, or `_is_done` would have said so.
        for leftover in (work, part):
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir()
        try:
            cleaning.examine(work, count_processes(settings["workers"]), settings["quiet"])
            hashes = {str(place): cleaning.hashes[source.path] for place, source in enumerate(share)}
            made = {
                "plan": plan.key,
                "inputs": describe_inputs(share, hashes),
                "counts": _as_plain(cleaning.counts),
                "tally": asdict(cleaning.tally),
                "seconds": time.monotonic() - begin,
            }
            write_whole(work / PART, orjson.dumps(made, option=orjson.OPT_SERIALIZE_NUMPY))
            work.rename(part)
            sync(plan.folder)
        except OSError as error:
            raise CptError(f"Cannot write {work}: {error}. Mend that and run the same command again.") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _as_plain(counts: Counts) -> dict[str, Any]:
    # Not by `asdict`, which makes something else of a Counter.
    plain = {entry.name: getattr(counts, entry.name) for entry in fields(counts)}
    plain["dropped"] = [[*key, asdict(found)] for key, found in counts.dropped.items()]
    return plain | {"limits": {name: list(check) for name, check in counts.limits.items()}}


def _counts_of(plain: dict[str, Any]) -> Counts:
    made: dict[str, Any] = {
        name: {measure: np.array(bins, np.int64) for measure, bins in plain[name].items()}
        for name in ("before", "after")
    }
    made["limits"] = {name: Check(*values) for name, values in plain["limits"].items()}
    made["dropped"] = {(rule, measure): Dropped(**found) for rule, measure, found in plain["dropped"]}
    return Counts(**plain | made | {"changes": Counter(plain["changes"])})


class _Joined(Cleaning):
    """A cleaning whose documents have been through the rules, in the parts of a plan."""

    parts: list[tuple[Path, dict[str, Any]]]

    def examine(self, work: Path, workers: int, quiet: bool) -> None:
        """Lay the parts behind one another, which is what the first pass over all inputs writes."""
        total = sum(each.stat().st_size for part, _ in self.parts for each in part.iterdir())
        with ProgressBar("joining", total, quiet) as bar:
            for name in (KEPT, DROPPED, SKETCHES):
                with (work / name).open("wb") as file:
                    for part, _ in self.parts:
                        # The end anew each time: `copy_to` writes at an offset, and moves no position.
                        copy_to(part / name, file.fileno(), file.seek(0, os.SEEK_END))
                        bar.update(sum(each.stat().st_size for each in work.iterdir()))
                    os.fsync(file.fileno())
        for _, made in self.parts:
            self.counts.add(_counts_of(made["counts"]))
            self.tally.include(Tally(**made["tally"]))
        self.tally.check_ranges(self.sources, self.policy)
        read = inputs_of_parts(self.sources, (made["inputs"] for _, made in self.parts))
        self.hashes = {source.path: each.hash for source, each in zip(self.sources, read, strict=True)}


def _whole(plan: Plan) -> _Joined:
    return _cleaning(_Joined, plan.settings, [listed_again(source) for source in plan.sources])


def join(folder: str | os.PathLike[str]) -> CleaningReport:
    """Join the parts of a plan into its cleaning, and remove them; of one that is joined already, report.

    Args:
        folder: The plan's.

    Raises:
        CptError: Parts are missing, an input changed since its part was made, the rules drop every document, or the
            disk is full.
    """
    folder = Path(folder)
    # The plan goes last: without it a cleaning that is there was joined.
    if not (folder / PLAN).exists() and (folder.parent / MANIFEST).exists():
        recorded = read_cleaning(folder.parent)["report"]
        return restored(CleaningReport, recorded, files=paths_in(folder.parent), status="unchanged")
    plan = Plan.read(folder)
    output, settings = plan.folder.parent, plan.settings
    if (report := existing(plan)) is None:
        plan.check_complete(missing(plan))
        cleaning = _whole(plan)
        numbers = range(len(plan.shares))
        cleaning.parts = [(Path(plan.part(number)), _read_part(plan, number) or {}) for number in numbers]
        try:
            with locked(output / LOCK, settings["patience"]):
                report = cleaning.make(output, 1, plan.overwrite, settings["quiet"])
        except OSError as error:
            raise CptError(f"Cannot clean into {output}: {error}. Mend that and run the same command again.") from error
    remove_parts(plan.folder)
    return report


def parts_folder(output: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a cleaning's parts, by the output or by the folder itself; None for another output."""
    path = Path(os.path.abspath(output))
    folder = path if path.name == PARTS_FOLDER else path / PARTS_FOLDER
    return folder if (folder / PLAN).exists() or (folder.parent / MANIFEST).exists() else None
