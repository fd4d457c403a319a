"""A dataset made by several tasks: each makes a part, and the parts are joined to the bytes of a single run.

A part is a task's share as a dataset of its own, made as `prepare` makes one: a task that was killed goes on when it is
started again, and one that is done does nothing.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_cpt.corpus.dataset.index import full_prefix
from nemo_cpt.corpus.dataset.manifest import manifest_path
from nemo_cpt.corpus.plan import Plan, remove_parts
from nemo_cpt.corpus.preparing.joining import join_parts
from nemo_cpt.corpus.preparing.journal import Journal
from nemo_cpt.corpus.preparing.output import HeadStart
from nemo_cpt.corpus.preparing.preparation import PrepareReport, Settings, TextOutput, report_of
from nemo_cpt.corpus.reading.shares import cut
from nemo_cpt.corpus.reading.sources import PARTS, PLAN, Inputs, Source, list_sources, listed_again
from nemo_cpt.corpus.reading.tally import Policy
from nemo_cpt.corpus.tokenization.tokenizer import Tokenizer, load_tokenizer
from nemo_cpt.errors import CptError

OF_THE_JOB = ("fast", "compared")  # of a plan's job, what the manifest's options do not have


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
    meant = TextOutput(prefix, sources, loaded, settings).options
    job = meant | {"fast": settings.fast, "compared": settings.verify != 0}
    # A folder by its whole path, since a task may start in another one; a name on the hub as it is.
    where = os.path.abspath(tokenizer) if os.path.exists(tokenizer) else str(tokenizer)
    told = {"tokenizer": where, "tokenizer_name": loaded.name, "options": asdict(settings)}
    return Plan(Path(prefix + PARTS), job, told, sources, shares, overwrite), loaded


def take_up(plan: Plan, tokenizer: Tokenizer) -> list[int]:
    """Write a plan, or go on with the same one that is there; return the numbers of the parts that are to be made.

    Raises:
        CptError: Parts of another job are there, or an input changed since one was made.
    """
    if not plan.overwrite:
        # Before any task begins: the join, behind all of them, would refuse it.
        whole(plan, tokenizer).journal.check()
    return plan.take_up(lambda: missing(plan, tokenizer))


def whole(plan: Plan, tokenizer: Tokenizer) -> TextOutput:
    """Return the dataset that a plan makes, of the inputs as they are on the disk now."""
    sources = [listed_again(source) for source in plan.sources]
    output = TextOutput(_prefix_of(plan.folder), sources, tokenizer, settings_of(plan))
    # Another job than one machine's: what is there of the one cannot be gone on with by the other.
    output.journal = Journal(output.prefix, output.options | {"joined": plan.key})
    return output


def settings_of(plan: Plan) -> Settings:
    """Return the options of `prepare` that a plan has."""
    return Settings(**plan.settings["options"])


def missing(plan: Plan, tokenizer: Tokenizer) -> list[int]:
    """Return the numbers of the parts that are not done.

    Raises:
        CptError: An input's content is not what a part was made of, and parts may not be replaced.
    """
    shares = plan.shares_now()
    return [number for number in range(len(shares)) if not _is_done(plan, number, shares[number], tokenizer)]


def _is_done(plan: Plan, number: int, share: list[Source], tokenizer: Tokenizer) -> bool:
    try:
        return _is_whole(_part(plan, number, share, tokenizer), settings_of(plan).policy, overwrite=False)
    except CptError:
        if plan.overwrite:
            return False
        raise


def _is_whole(part: TextOutput, policy: Policy, overwrite: bool) -> bool:
    # Without its `.idx`, which comes last, a part is one to be made, whatever else of it is there.
    return part.idx.exists() and part.is_there(policy, overwrite)


def _part(plan: Plan, number: int, share: list[Source], tokenizer: Tokenizer) -> TextOutput:
    part_of = {"part": number, "plan": plan.key}
    return TextOutput(part_prefix(plan, number), share, tokenizer, settings_of(plan), part_of)


def part_prefix(plan: Plan, number: int) -> str:
    """Return the full prefix of a part."""
    return f"{plan.part(number)}_{settings_of(plan).json_key}_document"


def prepare_part(folder: str | os.PathLike[str], number: int) -> None:
    """Make one part of a plan, or the rest of it; one that is done is left alone.

    Args:
        folder: The plan's.
        number: The task's, from 0.

    Raises:
        CptError: As `prepare`; or an input changed since the tasks were planned.
    """
    plan = Plan.read(folder)
    share, settings = plan.share(number), settings_of(plan)
    with HeadStart(settings.fast, settings.split_special_tokens) as head_start:
        part = _part(plan, number, share, _load_tokenizer(plan, head_start.begin))
        _check_tokenizer(plan, part)
        if not _is_whole(part, settings.policy, plan.overwrite):
            part.make(settings.run(head_start), plan.overwrite)


def _load_tokenizer(plan: Plan, found: Callable[[Path], object] = lambda definition: None) -> Tokenizer:
    # By the path that every task finds, under the name that a single run's manifest has.
    return replace(load_tokenizer(plan.settings["tokenizer"], found), name=plan.settings["tokenizer_name"])


def _check_tokenizer(plan: Plan, output: TextOutput) -> None:
    planned = {key: value for key, value in plan.job.items() if key not in OF_THE_JOB}
    differing = [key for key, value in planned.items() if output.options[key] != value]
    if differing:
        raise CptError(
            f"{plan.settings['tokenizer']} on {socket.gethostname()} is not the tokenizer that the tasks were planned "
            f"with: {', '.join(differing)} differ. Give a folder on the file system that all machines share."
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
    if not (folder / PLAN).exists() and manifest_path(_prefix_of(folder)).exists():
        return report_of(_prefix_of(folder), "unchanged")
    plan = Plan.read(folder)
    settings, tokenizer = settings_of(plan), _load_tokenizer(plan)
    output, status = whole(plan, tokenizer), "unchanged"
    _check_tokenizer(plan, output)
    if not output.is_there(settings.policy, plan.overwrite):
        plan.check_complete(missing(plan, tokenizer))
        parts = [part_prefix(plan, number) for number in range(len(plan.shares))]
        quiet = settings.quiet if quiet is None else quiet
        status = join_parts(output, parts, settings.policy, plan.overwrite, settings.patience, quiet)
    report = output.report(settings, status, {})
    remove_parts(plan.folder)
    return report


def _prefix_of(folder: Path) -> str:
    return str(folder).removesuffix(PARTS)


def parts_folder(prefix: str | os.PathLike[str]) -> Path:
    """Return the folder of a dataset's parts, by its prefix or by the folder itself."""
    text = str(prefix).rstrip("/")
    return Path(os.path.abspath(text if text.endswith(PARTS) else full_prefix(text) + PARTS))
