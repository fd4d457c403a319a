"""What a run reads and what it writes: base checkpoint, datasets and their vocabulary, room for its checkpoints."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_cpt import corpus
from nemo_cpt.checkpoint.architecture import Architecture, read_architecture
from nemo_cpt.checkpoint.files import has_tokenizer
from nemo_cpt.doctor import sizes
from nemo_cpt.doctor.examination import Examination
from nemo_cpt.doctor.finding import Finding, from_error
from nemo_cpt.doctor.job import Job
from nemo_cpt.errors import CptError
from nemo_cpt.training.preconditions import UNFINISHED, check_base
from nemo_cpt.training.run_folder import newest_whole

LOOKED_AT = 4_000_000  # tokens of a dataset without a manifest whose largest id is looked for
BYTES_OF_DTYPE = {"float32": 4}  # bf16 and fp16 have 2


def base(examination: Examination) -> Finding:
    """Whether the base is a NeMo checkpoint, whole, with the tokenizer that the recipe takes from it."""
    job = examination.job
    if job is None or not _sees_files(examination):
        return Finding("base", "skipped", _why_not(examination))
    if job.base is None:
        return Finding("base", "skipped", f"{job.recipe} names none that can be read from its source")
    folder = Path(job.base)
    newest = newest_whole(job.directory / "checkpoints")
    if newest is not None and job.lora_rank is None:
        return Finding("base", "ok", f"the run goes on from {newest.path}, and does not read the base again")
    try:
        check_base(folder)
        _check_whole(folder)
        if job.tokenizer is None and not has_tokenizer(folder / "hf"):
            raise CptError(f"{folder}/hf holds no tokenizer: import the model again, or give the recipe tokenizer=")
    except CptError as error:
        return from_error("base", error)
    architecture = base_architecture(folder)
    size = f", {sizes.parameters(architecture) / 1e6:,.1f} M parameters" if architecture else ""
    return Finding("base", "ok", f"{folder}{size}")


def data(examination: Examination) -> Finding:
    """Whether every dataset of the blend is there and whole, and what its mixture will do to the model."""
    job = examination.job
    if job is None or not _sees_files(examination):
        return Finding("data", "skipped", _why_not(examination))
    if job.data is None:
        return Finding("data", "skipped", f"{job.recipe}'s default data cannot be read from its source")
    try:
        report = job.data.report(job.global_batch_size or 1, job.seq_length or 1, job.max_steps or 1)
    except CptError as error:
        return from_error("data", error)
    tokens = sum(each["tokens"] for each in report.sets)
    shares = ", ".join(f"{_short(each['prefix'])} {each['share']:.0%}" for each in report.sets)
    found = f"{tokens:,} tokens ({shares}); validation: {', '.join(report.validation) or 'none'}"
    return Finding("data", "warning" if report.warnings else "ok", found, " ".join(report.warnings))


def vocabulary(examination: Examination) -> Finding:
    """Whether the datasets were made with the tokenizer that the run uses."""
    job, name = examination.job, "vocabulary"
    if job is None or job.data is None or not _sees_files(examination):
        return Finding(name, "skipped", _why_not(examination) if job else "no recipe was named")
    folder = Path(job.tokenizer or f"{job.base}/hf")
    if not has_tokenizer(folder):
        return Finding(name, "skipped", f"{folder} holds no tokenizer to compare with")
    from nemo_cpt.corpus.tokenizer import _hash  # the manifest's sha256 is this one's

    made_with, own = {prefix: _made_with(prefix) for prefix in _prefixes(job)}, _hash(folder)
    if made_with and all(each.get("sha256") == own for each in made_with.values()):
        size = next(iter(made_with.values()))["vocabulary_size"]
        return Finding(name, "ok", f"{size:,} tokens, in every dataset as in {folder}")
    size, sure = _vocabulary_size(folder)
    problems = list(_of_another_vocabulary(made_with, size))
    if problems:
        cure = f"prepare it again: nemo-cpt prepare ... --tokenizer {folder}"
        return Finding(
            name, "error" if sure else "warning", f"{'; '.join(problems)}; {folder} has {size:,} tokens", cure
        )
    found = f"{size:,} tokens fit every dataset, but not all were made with the tokenizer in {folder} itself"
    return Finding(name, "warning", found, "decode a sample with `nemo-cpt inspect PREFIX --tokenizer`, and read it")


def disk(examination: Examination) -> Finding:
    """Whether the disk holds what the run will write: its best checkpoints and the one being written."""
    job = examination.job
    if job and not _sees_files(examination):
        return Finding("disk", "skipped", _why_not(examination))
    folder = job.directory if job else Path.cwd()
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("disk", "error", f"{there} cannot be written", "give the recipe directory=, one that can be")
    architecture = base_architecture(Path(job.base)) if job and job.base else None
    if job is None or architecture is None:
        return Finding("disk", "ok", f"{free / 1e9:,.1f} GB free for {folder}")
    checkpoint = sizes.checkpoint_bytes(
        architecture, job.lora_rank, job.trained_embeddings, on_cpu=job.gpus_per_node == 0
    )
    needed = max(job.checkpoints - _already_there(job, checkpoint), 1) * checkpoint
    found = f"{free / 1e9:,.1f} GB free for {folder}; up to {job.checkpoints} checkpoints of {checkpoint / 1e9:,.3g} GB"
    if free >= needed:
        return Finding("disk", "ok", found)
    cure = f"free {(needed - free) / 1e9:,.1f} GB, write elsewhere (directory=), or keep fewer (log.ckpt.save_top_k=1)"
    return Finding("disk", "error", found, cure)


def base_architecture(folder: Path) -> Architecture | None:
    """The shape of a base's model, out of the config.json that an import leaves in it; None where there is none."""
    for place in (folder / "hf", *sorted(folder.glob("context/*/"))):
        if (place / "config.json").is_file():
            try:
                return read_architecture(place)
            except CptError:  # a shape that this project does not translate can still be trained
                return None
    return None


def _check_whole(folder: Path) -> None:
    """Raise CptError for a base that is being written, or of which a copy is short."""
    if Path(f"{folder}{UNFINISHED}").exists():
        raise CptError(f"{folder}{UNFINISHED} marks the base as not written to its end: take an older checkpoint")
    architecture = base_architecture(folder)
    if architecture is None:
        return
    there = sum(path.stat().st_size for path in (folder / "weights").glob("*.distcp"))
    wanted = sizes.parameters(architecture) * BYTES_OF_DTYPE.get(architecture.dtype or "", 2)
    if 0 < there < wanted:
        raise CptError(
            f"{folder}/weights holds {there / 1e9:.3g} GB, its model has {wanted / 1e9:.3g} GB: copy or import it again"
        )


def _vocabulary_size(folder: Path) -> tuple[int, bool]:
    """Tokens of a tokenizer.json, added ones included, and whether loading it can add no more.

    The tokenizer itself is not loaded: transformers would import torch.
    """
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        tokens = {*content["model"]["vocab"], *(entry["content"] for entry in content.get("added_tokens", []))}
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CptError(f"{folder}/tokenizer.json cannot be read ({error!r}): compare vocabularies by hand") from None
    return len(tokens), config.get("tokenizer_class") == "PreTrainedTokenizerFast"


def _of_another_vocabulary(made_with: dict[str, dict[str, Any]], size: int) -> Iterator[str]:
    for prefix, described in made_with.items():
        made_for = described.get("vocabulary_size")
        if made_for is None and (largest := _largest_id(prefix)) >= size:
            yield f"{_short(prefix)} holds the token id {largest}"
        elif made_for is not None and made_for != size:
            yield f"{_short(prefix)} was made for {made_for:,} tokens"


def _made_with(prefix: str) -> dict[str, Any]:
    """The tokenizer that a dataset's manifest names; empty for one that was not made by `prepare`."""
    try:
        return dict(corpus.read_manifest(prefix)["tokenizer"])
    except (CptError, KeyError, TypeError):
        return {}


def _largest_id(prefix: str) -> int:
    """The largest id among a dataset's first tokens; the job looks at all of them when it starts."""
    import numpy as np

    index = corpus.read_index(prefix)
    tokens = np.memmap(f"{index.prefix}.bin", dtype=index.dtype, mode="r") if index.tokens else np.zeros(1)
    return int(tokens[:LOOKED_AT].max())


def _prefixes(job: Job) -> list[str]:
    try:
        return [*job.data.train, *job.data.validation.values()] if job.data else []
    except AttributeError:  # no mapping: the check of the data says so
        return []


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
