"""What a container sees of this machine's files: what its job reads, and what it writes, must be mounted."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nemo_cpt.constants import CODE_IN_CONTAINER
from nemo_cpt.corpus import full_prefix
from nemo_cpt.doctor.examination import Examination, Finding
from nemo_cpt.doctor.inputs import prefixes_of
from nemo_cpt.doctor.job import Job, Place

RESULTS = "results"
JOBS_FOLDER = Path(CODE_IN_CONTAINER).parent  # which NeMo-Run itself mounts


def mounts(examination: Examination) -> Finding:
    """Whether the container has the files here that the job names, and keeps what it writes."""
    name, job = "mounts", examination.job
    if job is None or job.place.volumes is None:
        return Finding(name, "skipped", "the job is in no container of Docker's")
    wrong = [said for what, path in _paths(job) if (said := _what_is_wrong(what, path, job.place))]
    if not wrong:
        return Finding(name, "ok", f"the container sees what the job names, through {', '.join(job.place.volumes)}")
    return Finding(name, "error", "; ".join(wrong), "mount it at its own path: docker(mounts=['/data:/data'])")


def with_files(job: Job) -> Job:
    """Return a job whose place has `same_files` where a container sees everything that the job names as it is here."""
    place = job.place
    if place.volumes is None or not all(_is_as_here(what, path, place) for what, path in _paths(job)):
        return job
    return replace(job, place=replace(place, same_files=True))


def _paths(job: Job) -> Iterator[tuple[str, str]]:
    """What a job reads and writes, each with its name."""
    if job.base is not None:
        yield "base", job.base
    # Else it is the hub's name of one.
    if job.tokenizer is not None and Path(job.tokenizer).exists():
        yield "tokenizer", job.tokenizer
    yield from (("data", full_prefix(prefix)) for prefix in prefixes_of(job))
    yield RESULTS, str(job.directory)


def _what_is_wrong(what: str, path: str, place: Place) -> str:
    """Why a container does not see a path, or does not keep what is written to it; empty where it does.

    What is not here at all may be the image's own.
    """
    volume, mounted = _mounted(path, place)
    if mounted is None:
        if what == RESULTS:
            if _inside(path).is_relative_to(JOBS_FOLDER):
                return ""
            return f"{path}, where the run writes, would be gone with the container: it is in none of its mounts"
        return f"{what} {path} is in none of the container's mounts" if _is_here(path) else ""
    if what == RESULTS and volume.endswith(":ro"):
        return f"{path}, where the run writes, is mounted to be read alone ({volume})"
    # Of a folder that is not there yet its parents' links count.
    real = os.path.realpath(mounted)
    source = os.path.realpath(volume.partition(":")[0])
    if not Path(real).is_relative_to(source) and _mounted(real, place)[1] != real:
        return f"{what} {path} is a link to {real}, which is in none of the container's mounts"
    return ""


def _is_as_here(what: str, path: str, place: Place) -> bool:
    return _mounted(path, place)[1] == os.path.abspath(path) and not _what_is_wrong(what, path, place)


def _mounted(path: str, place: Place) -> tuple[str, str | None]:
    """The volume through which a container sees a path, and the path here that it is; "" and None where none does."""
    inside = _inside(path)
    found: tuple[str, str | None] = ("", None)
    longest = -1
    for volume in place.volumes or ():
        if ":" not in volume:  # it begins empty, and nobody finds it again
            continue
        source, target = volume.split(":")[:2]
        # The innermost of several mounts is the one that a path is seen through.
        if inside.is_relative_to(target) and len(Path(target).parts) > longest:
            longest = len(Path(target).parts)
            found = volume, os.path.normpath(os.path.join(source, inside.relative_to(target)))
    return found


def _inside(path: str) -> Path:
    """A path as the container has it, in which a job starts where its code is."""
    return Path(os.path.normpath(os.path.join(CODE_IN_CONTAINER, path)))


def _is_here(path: str) -> bool:
    """Whether a file or folder, or a dataset of this prefix, is on this machine."""
    return os.path.exists(path) or os.path.exists(f"{path}.idx")
