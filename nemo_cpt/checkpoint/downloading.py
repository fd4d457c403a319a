"""From the Hugging Face hub to disk: what a model needs and nothing else, resumable, complete or absent."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isal.isal_zlib import crc32

from nemo_cpt.arguments import checked
from nemo_cpt.checkpoint.download_record import DownloadRecord, FileRecord, read_record
from nemo_cpt.checkpoint.folders import TEMPLATES
from nemo_cpt.corpus.atomic_files import locked, make_folder
from nemo_cpt.errors import CptError
from nemo_cpt.hub import content_of, explained, git_prefix, retries_told_once
from nemo_cpt.quiet import bars_of_the_hub
from nemo_cpt.records import AsDict

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_UNUSED_SUFFIXES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".mlmodel")
_READ_AT_ONCE = 2**20  # bytes
_PATIENCE_SECONDS = 2.0  # for another process to end


@dataclass(frozen=True)
class DownloadReport(AsDict):
    """What a download did: `commit` is the revision's full hash; `already_there` says that nothing was fetched."""

    repo_id: str
    commit: str
    dest: str
    files: tuple[str, ...]
    bytes_total: int
    left_out: tuple[str, ...]
    already_there: bool
    seconds: float


@checked
def download(
    repo_id: str, dest: str | Path, revision: str = "main", *, endpoint: str | None = None, workers: int = 8
) -> DownloadReport:
    """Fetch a model from the hub into a folder that `import_hf` reads.

    Only the top folder's safetensors, configs and tokenizer files are fetched, and additional chat templates: not
    `original/*`, pickles or other formats. An interrupted download goes on where it stopped. Sizes and checksums are
    compared with the hub's, and noted in the folder with the revision's commit. The token is huggingface_hub's own (the
    variable HF_TOKEN, or `hf auth login`).

    Args:
        repo_id: such as "meta-llama/Llama-3.1-8B".
        dest: the folder to make; if it is there already and holds this revision's files, nothing is fetched.
        revision: branch, tag or commit.
        endpoint: another hub than https://huggingface.co (also the variable HF_ENDPOINT).
        workers: files fetched at once.

    Raises:
        CptError: no access, no such repository or revision, no network, no space, a file that arrived damaged, a `dest`
            that holds something else, such as another revision, or that another process is downloading to.
    """
    from huggingface_hub import HfApi

    check_options(repo_id, workers)
    start = time.monotonic()
    api = HfApi(endpoint=endpoint)
    page = f"{api.endpoint}/{repo_id}"
    with explained("model", repo_id, page, revision):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    wanted, left_out = _choose(info.siblings or [], repo_id)
    # From here on the commit, not the branch, which may move while the files come.
    dest, commit = Path(dest), str(info.sha)
    there = os.path.lexists(dest)  # a link to nothing, too, in whose place no folder can be put
    if not there:
        make_folder(dest.parent)
        with locked(dest.with_name(f"{dest.name}.download.lock"), _PATIENCE_SECONDS):
            # Another process may have brought it while this one waited.
            if not (there := dest.exists()):
                _fetch(api, repo_id, commit, dest, wanted, workers)
    if there:
        # By content: two revisions of a model have equal sizes.
        _check_present(dest, repo_id, revision, commit, wanted)
    return DownloadReport(
        repo_id,
        commit,
        str(dest),
        tuple(file.rfilename for file in wanted),
        sum(file.size or 0 for file in wanted),
        tuple(left_out),
        there,
        round(time.monotonic() - start, 3),
    )


def check_options(repo_id: str, workers: int) -> None:
    """Check the options of `download` that need no network.

    Raises:
        CptError: one is unusable.
    """
    from huggingface_hub.utils import validate_repo_id

    with explained("model", repo_id, page=""):
        validate_repo_id(repo_id)
    if workers < 1:
        raise CptError(f"workers is {workers}; it must be at least 1.")


def _choose(siblings: list[RepoSibling], repo_id: str) -> tuple[list[RepoSibling], list[str]]:
    wanted, left_out = [], []
    for file in siblings:
        path = Path(file.rfilename)
        elsewhere = str(path.parent) not in (".", TEMPLATES)
        unused = elsewhere or path.suffix in _UNUSED_SUFFIXES or path.name.startswith(".")
        # Mistral repositories hold the same weights twice: sharded, and as consolidated.safetensors.
        if unused or path.name.startswith("consolidated"):
            left_out.append(file.rfilename)
        else:
            wanted.append(file)
    if not any(file.rfilename.endswith(".safetensors") for file in wanted):
        raise CptError(
            f"{repo_id} holds no safetensors weights (only {', '.join(left_out[:4]) or 'small files'}). "
            "Pickled weights can run code when read; choose a repository or revision with safetensors."
        )
    return wanted, left_out


def _check_present(dest: Path, repo_id: str, revision: str, commit: str, wanted: list[RepoSibling]) -> None:
    """Refuse a folder that holds something else than the revision asked for, by its files' content."""
    wanted = [file for file in wanted if file.rfilename != "README.md"]  # its words change without the model
    recorded = read_record(dest)
    files = dict(recorded.files) if recorded else {}
    problem = ""
    for file in wanted:
        name, path = file.rfilename, dest / file.rfilename
        if name.startswith(TEMPLATES) and not path.exists():  # which an older version did not fetch
            continue
        if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
            problem = f"{name} is missing or has another size than the hub's"
            break
        # What the record knows is not read again: a rerun of a finished download costs no 16 GB of reading.
        files[name] = files.get(name) or _read(path, file)
        if content_of(file) not in (None, files[name].content):
            problem = f"{name} has other bytes than the hub's"
            break
    names = [file.rfilename for file in wanted if file.rfilename in files]
    others = sorted(path.name for path in dest.glob("*") if is_weights(path.name) and path.name not in names)
    if problem or others:
        holds = f"{dest} holds {recorded.repo_id} at {recorded.commit}" if recorded else f"{dest} exists"
        raise CptError(
            f"{holds} and is not {repo_id} at {revision} ({commit}): {problem or f'{others[0]} is not of it'}. "
            "Give another destination, or remove it first."
        )
    with suppress(OSError):  # a folder that cannot be written is read again next time
        DownloadRecord(repo_id, commit, {name: files[name] for name in names}).write(dest)


def is_weights(name: str) -> bool:
    """Whether a file of a repository is one of those that transformers takes a model's weights from, by its name."""
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _fetch(api: Any, repo_id: str, commit: str, dest: Path, wanted: list[RepoSibling], workers: int) -> None:
    from huggingface_hub import snapshot_download

    partial = dest.with_name(dest.name + ".download")  # a fixed name, so that the next run finds what is there
    names = [file.rfilename for file in wanted]
    try:
        partial.mkdir(exist_ok=True)
        _check_space(partial, wanted, repo_id)
        with (
            explained("model", repo_id, f"{api.endpoint}/{repo_id}", commit),
            bars_of_the_hub(sys.stderr.isatty()),
            retries_told_once(),
        ):
            snapshot_download(
                repo_id,
                revision=commit,
                local_dir=partial,
                allow_patterns=list(map(glob.escape, names)),
                endpoint=api.endpoint,
                max_workers=workers,
            )
        for path in partial.iterdir():
            if path.is_file() and path.name not in names:  # of another revision, whose download broke off
                path.unlink()
        files = {file.rfilename: _arrived(partial / file.rfilename, file) for file in wanted}
        DownloadRecord(repo_id, commit, files).write(partial)
        # huggingface_hub's notes on what arrived: of use to a resumed download alone.
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        partial.rename(dest)
    except OSError as error:
        raise CptError(f"{dest} could not be written: {error}. What arrived is kept in {partial}; rerun.") from error


def _check_space(partial: Path, wanted: list[RepoSibling], repo_id: str) -> None:
    present = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    needed = sum(file.size or 0 for file in wanted) - present
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise CptError(
            f"{repo_id} needs {needed / 1e9:.2f} GB more, {partial.parent} has {free / 1e9:.2f} GB free. "
            "Free some space or choose another destination."
        )


def _arrived(path: Path, file: RepoSibling) -> FileRecord:
    size, found = path.stat().st_size, _read(path, file)
    problem = f"has {size} bytes, the hub says {file.size}" if file.size not in (None, size) else ""
    if not problem and found.content != (content_of(file) or found.content):
        problem = f"has another {'SHA-256' if file.lfs else 'SHA-1'} sum than the hub says"
    if problem:
        path.unlink()
        raise CptError(f"{path.name} arrived damaged: it {problem}. It was removed; rerun to fetch it again.")
    return found


def _read(path: Path, file: RepoSibling) -> FileRecord:
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(git_prefix(path.stat().st_size))
    checksum = 0
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_READ_AT_ONCE):
            digest.update(piece)
            checksum = crc32(piece, checksum)
    return FileRecord(f"{'sha256' if file.lfs else 'git'}:{digest.hexdigest()}", checksum)
