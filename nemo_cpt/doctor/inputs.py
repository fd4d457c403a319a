"""What a run reads and what it writes: base checkpoint, datasets and their vocabulary, room for its checkpoints."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from nemo_cpt import compatibility, corpus
from nemo_cpt.checkpoint.architecture import Architecture, read_carried
from nemo_cpt.checkpoint.base import carried_places, carried_tokenizer
from nemo_cpt.checkpoint.context import UNFINISHED
from nemo_cpt.doctor.examination import Examination, Finding, from_error
from nemo_cpt.doctor.job import BESIDE_THE_BEST, Job
from nemo_cpt.errors import CptError
from nemo_cpt.planning import checkpoint_size
from nemo_cpt.planning.from_scratch import size_warning
from nemo_cpt.training.changes import check_started_again
from nemo_cpt.training.preconditions import check_base
from nemo_cpt.training.run_folder import Checkpoint, finished, newest_whole, to_resume
from nemo_cpt.training.run_lock import check_free
from nemo_cpt.training.settings import check

_LONG = 4096  # a length to look at conversations with, where the recipe's source does not say its own


def settings(examination: Examination) -> Finding:
    """Whether a job could run with these numbers: schedule, batches, parallel sizes against the model and processes."""
    job = examination.job
    if job is None:
        return Finding("settings", "skipped", "no recipe was named")
    numbers = replace(job.settings, num_nodes=job.nodes)
    try:
        _check_counts(job)
        check(numbers)
    except CptError as error:
        return from_error("settings", error)
    return Finding(
        "settings", "ok", f"{numbers.max_steps or 'unknown'} steps, {numbers.processes or 'unknown'} processes"
    )


def _check_counts(job: Job) -> None:
    """Refuse a recipe for another number of processes, or machines, than its executor starts."""
    counts = [
        ("processes on each machine (gpus_per_node or processes)", job.settings.gpus_per_node, job.place.processes)
    ]
    if not job.place.tells_nodes:
        counts.append(("machines (num_nodes)", job.num_nodes, job.place.nodes))
    for what, wanted, started in counts:
        if wanted and started and wanted != started:
            cure = "give both the same number"
            if job.place.executor == "this process":
                cure = f"launch it with executor=local(processes={wanted}), or start the script with torchrun"
            raise CptError(f"the recipe is for {wanted} {what}, and {job.place.executor} starts {started}: {cure}")


def base(examination: Examination) -> Finding:
    """Whether the base is a NeMo checkpoint, whole, of the recipe's model, with the tokenizer that it takes from it."""
    job = examination.job
    if job is None or not _sees_files(examination):
        return Finding("base", "skipped", _why_not(examination))
    if job.base is None:
        return Finding("base", "skipped", f"{job.recipe} names none that can be read from its source")
    folder = Path(job.base)
    newest = _resumed(job)
    # A run of adapters reads its base at every start.
    if newest is not None and job.lora_rank is None:
        return Finding("base", "ok", f"the run goes on from {newest.path}, and does not read the base again")
    try:
        check_base(folder)
        _check_whole(folder)
        if job.tokenizer is None and carried_tokenizer(folder) is None:
            raise CptError(f"{folder}/hf holds no tokenizer: import the model again, or give the recipe tokenizer=")
        warnings = compatibility.check_model(compatibility.read_base(folder), job.model, job.unlike_base)
        if job.params is not None and (other_size := size_warning(job.params, folder)):
            warnings = [*warnings, other_size]
    except CptError as error:
        return from_error("base", error)
    if warnings:
        return Finding("base", "warning", *_sentences(warnings))
    architecture = base_architecture(folder)
    size = f", {checkpoint_size.parameters(architecture) / 1e6:,.1f} M parameters" if architecture else ""
    return Finding("base", "ok", f"{folder}{size}")


def run_folder(examination: Examination) -> Finding:
    """Whether no other job holds the run's folder, and its checkpoint is one that this recipe would go on from."""
    job, name = examination.job, "run folder"
    if job is None or not _sees_files(examination):
        return Finding(name, "skipped", _why_not(examination))
    try:
        check_free(job.directory)
    except CptError as error:
        # A job that is queued finds it free, perhaps.
        return replace(from_error(name, error), state="error" if examination.place.here else "warning")
    newest = to_resume(job.directory / "checkpoints")
    if newest is None:
        return Finding(name, "ok", f"{job.directory} holds no checkpoint yet: the run starts from its base")
    said = finished(job.directory / "checkpoints", job.max_steps, exporting=bool(job.exports))
    if not said:
        compatibility.check_resumed(newest.path, job.base, job.model or None)
    try:
        check_started_again(newest, job.deciding_settings(newest), job.extend, finished=bool(said))
    except CptError as error:
        return Finding(name, "error", *_sentences([error.message]))
    if said:
        return Finding(name, "warning", *_sentences([said]))
    return Finding(name, "ok", f"goes on from {newest.path}, step {newest.step}")


def data(examination: Examination) -> Finding:
    """Whether every dataset of the blend is there and whole, and what its mixture will do to the model."""
    job = examination.job
    if job is None or not _sees_files(examination):
        return Finding("data", "skipped", _why_not(examination))
    if job.data is None:
        return Finding("data", "skipped", f"{job.recipe}'s default data cannot be read from its source")
    try:
        # Where nobody knows it: the tokens and shares of texts are the same at any length; conversations have to fit.
        length = job.seq_length or (1 if isinstance(job.data, corpus.Blend) else _LONG)
        report = job.data.report(job.global_batch_size or 1, length, max(job.max_steps, 1))
        if job.replay is not None:
            job.replay.check()
    except CptError as error:
        return from_error("data", error)
    tokens = sum(each["tokens"] for each in report.sets)
    shares = ", ".join(f"{_short(each['prefix'])} {each['share']:.0%}" for each in report.sets)
    found = f"{tokens:,} tokens ({shares}); validation: {', '.join(report.validation) or 'none'}"
    return Finding("data", "warning" if report.warnings else "ok", found, " ".join(report.warnings))


def vocabulary(examination: Examination) -> Finding:
    """Whether the run's tokenizer is its base's, and the datasets were made for it."""
    job, name = examination.job, "vocabulary"
    if job is None or job.data is None or not _sees_files(examination):
        return Finding(name, "skipped", _why_not(examination) if job else "no recipe was named")
    newest = _resumed(job)
    weights = newest.path if newest else Path(job.base or "")
    if not (newest or job.base) or not weights.exists():
        return Finding(name, "skipped", "there is no base here to compare with")
    prefixes = [prefix for prefix in prefixes_of(job) if Path(corpus.full_prefix(prefix) + ".idx").exists()]
    try:
        base = compatibility.read_base(weights)
        warnings = compatibility.check_tokenizer(base, job.tokenizer)
        warnings += compatibility.check_data(base, prefixes, job.unlike_base, job.tokenizer)
        # A run that goes on has been through this; embeddings that are trained learn the tokens.
        if newest is None and job.lora_rank is not None and not job.trained_embeddings:
            warnings += compatibility.check_template(base, prefixes)
    except CptError as error:
        return from_error(name, error)
    if warnings:
        return Finding(name, "warning", *_sentences(warnings))
    return Finding(name, "ok", f"{base.rows:,} rows, and every dataset is of the tokenizer in {base.tokenizer}")


def disk(examination: Examination) -> Finding:
    """Whether the disk holds what the run will write: its best checkpoints, the last and the one being written."""
    job = examination.job
    if job and not _sees_files(examination):
        return Finding("disk", "skipped", _why_not(examination))
    folder = job.directory if job else Path.cwd()
    # The run's folder may not be there yet: the file system is its nearest parent's.
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("disk", "error", f"{there} cannot be written", "give the recipe directory=, one that can be")
    architecture = base_architecture(Path(job.base)) if job and job.base else None
    if job is None or architecture is None:
        return Finding("disk", "ok", f"{free / 1e9:,.1f} GB free for {folder}")
    if job.checkpoints == 0:
        return Finding("disk", "ok", f"{free / 1e9:,.1f} GB free for {folder}; the run writes no checkpoints")
    checkpoint = checkpoint_size.checkpoint_bytes(
        architecture, job.lora_rank, job.trained_embeddings, on_cpu=job.gpus_per_node == 0
    )
    export = checkpoint_size.export_bytes(architecture)
    # One at least: it is written before another is removed.
    needed = max(job.checkpoints - _already_there(job, checkpoint), 1) * checkpoint + job.exports * export
    found = f"{free / 1e9:,.1f} GB free for {folder}; up to {job.checkpoints} checkpoints of {checkpoint / 1e9:,.3g} GB"
    if job.exports:
        found += f" and {job.exports} exports of {export / 1e9:,.3g} GB"
    if free >= needed:
        return Finding("disk", "ok", found)
    cure = f"free {(needed - free) / 1e9:,.1f} GB, or write elsewhere (directory=)"
    if job.exports:
        cure += ", or keep fewer exports (export_keep=1)"
    kept = int((free - job.exports * export) // checkpoint) - BESIDE_THE_BEST
    if 1 <= kept < job.checkpoints - BESIDE_THE_BEST:
        cure += f", or keep fewer (log.ckpt.save_top_k={kept})"
    return Finding("disk", "error", found, cure)


def base_architecture(folder: Path) -> Architecture | None:
    """The shape of a base's model, out of the config.json that an import leaves in it; None where there is none."""
    for place in carried_places(folder):
        if (place / "config.json").is_file():
            try:
                return read_carried(place)
            except CptError:  # a shape that this project does not translate can still be trained
                return None
    return None


def _check_whole(folder: Path) -> None:
    """Raise CptError for a base that is being written, or of which a copy is short."""
    if Path(f"{folder}{UNFINISHED}").exists():
        raise CptError(f"{folder}{UNFINISHED} marks the base as not written to its end: take an older checkpoint")
    weights = folder / "weights"
    # Neither of them is another format, which `check_base` has judged.
    if ((weights / ".metadata").exists() or any(weights.glob("*.distcp"))) and (fault := Checkpoint(folder).fault):
        raise CptError(f"{fault}: copy or import it again")


def _resumed(job: Job) -> Checkpoint | None:
    return newest_whole(job.directory / "checkpoints")


def prefixes_of(job: Job) -> list[str]:
    """The prefixes of every dataset that a job reads."""
    try:
        return [prefix for each in (job.data, job.replay) if each is not None for prefix in each.prefixes()]
    except AttributeError:  # no mapping: the check of the data says so
        return []


def _sentences(warnings: list[str]) -> tuple[str, str]:
    """The first sentence of warnings, which is what was found, and the rest."""
    found, _, rest = " ".join(warnings).partition(". ")
    return found, rest


def _already_there(job: Job, checkpoint: float) -> int:
    """Checkpoints that this run has on the disk already; they make room for its next ones."""
    folders = [path for path in job.directory.glob("checkpoints/*") if path.is_dir() and not path.is_symlink()]
    return min(len(folders), job.checkpoints) if checkpoint else 0


def _short(prefix: str) -> str:
    return str(prefix).removesuffix("_text_document")


def _sees_files(examination: Examination) -> bool:
    return examination.place.same_files


def _why_not(examination: Examination) -> str:
    if examination.job is None:
        return "no recipe was named"
    return f"the job on {examination.place.executor} sees other files than this machine"
