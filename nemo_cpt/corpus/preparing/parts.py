"""A dataset made by several tasks, on one machine or on many that share a file system.

plan.json   what each task reads, and how, in the folder `PREFIX_text_document.parts`
a part      one task's share as a dataset of its own in that folder, made as `prepare` makes one: a task that was
            killed goes on when it is started again, and one that is done does nothing
the join    the parts' tokens one behind the other under the name of the whole: byte for byte a single run's
"""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.corpus.atomic_files import make_folder, write_whole
from nemo_cpt.corpus.dataset.index import full_prefix
from nemo_cpt.corpus.dataset.manifest import manifest_path
from nemo_cpt.corpus.preparing.joining import join_parts
from nemo_cpt.corpus.preparing.journal import Journal
from nemo_cpt.corpus.preparing.output import HeadStart
from nemo_cpt.corpus.preparing.preparation import PrepareReport, Settings, TextOutput, report_of
from nemo_cpt.corpus.reading.shares import cut
from nemo_cpt.corpus.reading.sources import PARTS, PLAN, Inputs, Source, list_sources, listed_again
from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer, load_tokenizer
from nemo_cpt.errors import CptError

ENDS = (".bin", ".idx", ".json", ".skipped.jsonl")  # of a part's files
UNFINISHED = (".bin.part", ".lens.part", ".idx.part", ".json.part", ".skipped.jsonl.part", ".journal")


@dataclass(frozen=True)
class Plan:
    """What the tasks do.

    Attributes:
        prefix: Full prefix of the dataset, absolute.
        tokenizer: Its folder, absolute, or its hub name.
        settings: The options of `prepare`.
        options: What the options and the tokenizer mean for the output, as the manifest has it.
        sources: The inputs in order.
        shares: What each task reads of them.
        overwrite: Replace what is there.
    """

    prefix: str
    tokenizer: str
    settings: Settings
    options: dict[str, Any]
    sources: list[Source]
    shares: list[list[Source]]
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where plan and parts are."""
        return Path(self.prefix + PARTS)

    @cached_property
    def key(self) -> str:
        """A digest of what makes two plans the same job."""
        return hashlib.sha256(orjson.dumps(self._job())).hexdigest()[:16]

    def _job(self) -> dict[str, Any]:
        # Neither times nor workers: a file that was touched is the same input, and its content is compared with hashes.
        return {
            **self.options,
            "fast": self.settings.fast,
            "compared": self.settings.verify != 0,
            "inputs": [[source.path, source.kind, source.size] for source in self.sources],
            "tasks": len(self.shares),
            "ranges": [[[source.path, source.start, source.stop] for source in share] for share in self.shares],
        }

    def part_prefix(self, number: int) -> str:
        """Return the full prefix of a part."""
        return str(self.folder / f"part-{number:05}_{self.settings.json_key}_document")

    def part(self, number: int, tokenizer: Tokenizer) -> TextOutput:
        """Return a part as the dataset that it is."""
        part_of = {"part": number, "plan": self.key}
        return TextOutput(self.part_prefix(number), self.shares[number], tokenizer, self.settings, part_of)

    def whole(self, tokenizer: Tokenizer) -> TextOutput:
        """Return the dataset, of the inputs as they are on the disk now."""
        sources = [listed_again(source) for source in self.sources]
        output = TextOutput(self.prefix, sources, tokenizer, self.settings)
        # Another job than one machine's: what is there of the one cannot be gone on with by the other.
        output.journal = Journal(self.prefix, output.options | {"joined": self.key})
        return output

    def missing(self, tokenizer: Tokenizer) -> list[int]:
        """Return the numbers of the parts that are not done.

        Raises:
            CptError: An input's content is not what a part was made of, and parts may not be replaced.
        """
        now = {source.path: listed_again(source) for source in self.sources}
        return [number for number in range(len(self.shares)) if not self._is_done(number, tokenizer, now)]

    def _is_done(self, number: int, tokenizer: Tokenizer, now: dict[str, Source]) -> bool:
        part = self.part(number, tokenizer)
        part.sources = [_range_of(now[source.path], source.start, source.stop) for source in self.shares[number]]
        try:
            return _is_whole(part, False)
        except CptError:
            if self.overwrite:
                return False
            raise

    def write(self) -> None:
        """Write it where the tasks find it."""
        make_folder(self.folder)
        numbers = {source.path: number for number, source in enumerate(self.sources)}
        shares = [[[numbers[source.path], source.start, source.stop] for source in share] for share in self.shares]
        content = {
            "prefix": self.prefix,
            "tokenizer": self.tokenizer,
            "settings": asdict(self.settings),
            "options": self.options,
            "sources": [asdict(source) for source in self.sources],
            "shares": shares,
            "overwrite": self.overwrite,
        }
        write_whole(self.folder / PLAN, orjson.dumps(content))

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Read the plan of a folder.

        Raises:
            CptError: It is not there, as where the file system is not the one that it was written to; or not a plan.
        """
        path = folder / PLAN
        try:
            content = orjson.loads(path.read_bytes())
            sources = [Source(**entry) for entry in content.pop("sources")]
            shares = [
                [_range_of(sources[number], start, stop) for number, start, stop in share]
                for share in content.pop("shares")
            ]
            return cls(**content | {"settings": Settings(**content["settings"])}, sources=sources, shares=shares)
        except OSError as error:
            raise CptError(
                f"{path} cannot be read on {socket.gethostname()}: {error.strerror}. `nemo-cpt prepare --tasks` makes "
                "it; the output must be on a file system that every task's machine sees under the same path."
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise CptError(f"{path} is damaged: {error}. Begin anew with overwrite=True (--overwrite).") from error


def _range_of(source: Source, start: int, stop: int | None) -> Source:
    return replace(source, start=start, stop=stop)


def make_plan(
    inputs: Inputs,
    output_prefix: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    tasks: int,
    overwrite: bool = False,
    **options: Any,
) -> tuple[Plan, Tokenizer]:
    """Plan a dataset that `tasks` tasks make together; nothing is written.

    Args:
        inputs: As for `prepare`.
        output_prefix: As for `prepare`.
        tokenizer: As for `prepare`.
        tasks: How many; fewer where the inputs have not as many lines, or files that cannot be cut.
        overwrite: Replace what is there.
        options: Further options of `prepare`, by name.

    Returns:
        The plan, and the tokenizer as it was loaded for it.

    Raises:
        CptError: An input, the tokenizer or an option is unusable.
    """
    settings = Settings(**options)
    settings.check()
    sources = list_sources(inputs)
    shares = cut(sources, tasks)
    prefix = os.path.abspath(f"{output_prefix}_{settings.json_key}_document")
    loaded = load_tokenizer(tokenizer)
    name = os.path.abspath(tokenizer) if os.path.exists(tokenizer) else str(tokenizer)
    output = TextOutput(prefix, sources, loaded, settings)
    return Plan(prefix, name, settings, output.options, sources, shares, overwrite), loaded


def take_up(plan: Plan, tokenizer: Tokenizer) -> list[int]:
    """Write a plan, or go on with the same one that is there; return the numbers of the parts that are to be made.

    Raises:
        CptError: Parts of another job are there, or an input changed since one was made.
    """
    if not plan.overwrite:
        # Before any task begins: the join, behind all of them, would refuse it.
        plan.whole(tokenizer).journal.check()
    if (plan.folder / PLAN).exists():
        there = Plan.read(plan.folder) if not plan.overwrite else _read_if_sound(plan.folder)
        if there is None or there.key != plan.key:
            if not plan.overwrite:
                assert there is not None
                raise CptError(_other_job(plan, there))
            remove_parts(plan.folder)
    missing = plan.missing(tokenizer)
    plan.write()
    return missing


def _read_if_sound(folder: Path) -> Plan | None:
    with suppress(CptError):
        return Plan.read(folder)
    return None


def _other_job(plan: Plan, there: Plan) -> str:
    ours, theirs = plan._job(), there._job()
    differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    shown = [key for key in differing if key not in ("inputs", "ranges")]
    words = [f"{key} is {theirs.get(key)!r}, not {ours.get(key)!r}" for key in shown]
    if "inputs" in differing or not shown:
        words.append("their inputs are others")
    return (
        f"{plan.folder} holds parts of another job: {'; '.join(words)}. Run that job's command again to finish it, "
        "take another output prefix, or discard the parts with overwrite=True (--overwrite)."
    )


def prepare_part(folder: str | os.PathLike[str], number: int) -> None:
    """Make one part of a plan, or the rest of it; one that is done is left alone.

    Args:
        folder: The plan's.
        number: The task's, from 0.

    Raises:
        CptError: As `prepare`; or an input changed since the tasks were planned.
    """
    plan = Plan.read(Path(folder))
    if not 0 <= number < len(plan.shares):
        raise CptError(f"{plan.folder} has the tasks 0 to {len(plan.shares) - 1}, not {number}.")
    for source in plan.shares[number]:
        _check_as_planned(source)
    settings = plan.settings
    with HeadStart(settings.fast, settings.split_special_tokens) as head_start:
        tokenizer = load_tokenizer(plan.tokenizer, head_start.begin)
        part = plan.part(number, tokenizer)
        _check_tokenizer(plan, part)
        if not _is_whole(part, plan.overwrite):
            part.make(settings.run(head_start), plan.overwrite)


def _is_whole(part: TextOutput, overwrite: bool) -> bool:
    # Without its `.idx`, which comes last, a part is one to be made, whatever else of it is there.
    return part.idx.exists() and part.is_there(overwrite)


def _check_as_planned(source: Source) -> None:
    now = listed_again(source)
    if (now.size, now.mtime_ns) != (source.size, source.mtime_ns):
        raise CptError(
            f"{source.path} changed since the tasks were planned: it had {source.size:,} bytes, now it has "
            f"{now.size:,}. Run the same command again once nothing writes to it."
        )


def _check_tokenizer(plan: Plan, part: TextOutput) -> None:
    differing = [key for key, value in plan.options.items() if part.options[key] != value]
    if differing:
        raise CptError(
            f"{plan.tokenizer} is not the tokenizer that the tasks were planned with: {', '.join(differing)} differ. "
            "It must be the same for every task: give a folder on the shared file system."
        )


def join(folder: str | os.PathLike[str], quiet: bool | None = None) -> PrepareReport:
    """Join the parts of a plan into its dataset, and remove them; of one that is joined already, report.

    Args:
        folder: The plan's.
        quiet: Show no progress; by default as the plan says.

    Raises:
        CptError: Parts are missing, an input changed since its part was made, or the disk is full.
    """
    folder = Path(folder)
    prefix = str(folder).removesuffix(PARTS)
    if not (folder / PLAN).exists() and manifest_path(prefix).exists():
        return report_of(prefix, "unchanged")
    plan = Plan.read(folder)
    tokenizer, settings = load_tokenizer(plan.tokenizer), plan.settings
    output, status = plan.whole(tokenizer), "unchanged"
    _check_tokenizer(plan, output)
    if not output.is_there(plan.overwrite):
        if missing := plan.missing(tokenizer):
            raise CptError(_missing(plan, missing))
        parts = [plan.part_prefix(number) for number in range(len(plan.shares))]
        quiet = settings.quiet if quiet is None else quiet
        status = join_parts(output, parts, settings.policy, plan.overwrite, settings.patience, quiet)
    report = output.report(settings, status, {})
    remove_parts(plan.folder)
    return report


def _missing(plan: Plan, missing: list[int]) -> str:
    numbers = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    return (
        f"{len(missing)} of the {len(plan.shares)} parts in {plan.folder} are not there, or not done, as "
        f"{socket.gethostname()} sees it: {numbers}. Run the command that made the others again: it makes these alone. "
        "If their tasks have ended well, the folder is not on a file system that all machines share."
    )


def remove_parts(folder: Path) -> None:
    """Remove parts and plan, the plan last; the folder too, unless somebody else put something into it."""
    for path in _files_of_parts(folder):
        path.unlink(missing_ok=True)
    for name in (PLAN + ".part", PLAN):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _files_of_parts(folder: Path) -> Iterator[Path]:
    for path in folder.glob("part-?????_*_document.*"):
        prefix = path.name.partition(".")[0]
        if path.name.removeprefix(prefix) in (*ENDS, *UNFINISHED):
            yield path


def parts_folder(prefix: str | os.PathLike[str]) -> Path:
    """Return the folder of a dataset's parts, by its prefix or by the folder itself."""
    text = str(prefix).rstrip("/")
    return Path(os.path.abspath(text if text.endswith(PARTS) else full_prefix(text) + PARTS))
