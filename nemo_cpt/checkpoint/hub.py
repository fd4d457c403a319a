"""From the Hugging Face hub to disk: what a model needs and nothing else, resumable, complete or absent."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_cpt.errors import CptError
from nemo_cpt.hub import explained, progress_bars

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_UNUSED_SUFFIXES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".mlmodel")
_UNUSED_FOLDERS = ("original", "onnx", "openvino", "coreml", "flax")


@dataclass(frozen=True)
class DownloadReport:
    """What a download did: `commit` is the revision's full hash; `already_there` says that nothing was fetched."""

    repo_id: str
    commit: str
    dest: str
    files: tuple[str, ...]
    bytes_total: int
    left_out: tuple[str, ...]
    already_there: bool
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON-serialisable dict."""
        return asdict(self)


def download(
    repo_id: str, dest: str | Path, revision: str = "main", *, endpoint: str | None = None, workers: int = 8
) -> DownloadReport:
    """Fetch a model from the hub into a folder that `import_hf` reads.

    Only the top folder's safetensors, configs and tokenizer files are fetched: not `original/*`, pickles or other
    formats. An interrupted download goes on where it stopped. Sizes and, for large files, SHA-256 sums are checked
    against the hub's. The token is huggingface_hub's own (the variable HF_TOKEN, or `hf auth login`).

    Args:
        repo_id: such as "meta-llama/Llama-3.1-8B".
        dest: the folder to make; if it is there already and complete, nothing is fetched.
        revision: branch, tag or commit.
        endpoint: another hub than https://huggingface.co (also the variable HF_ENDPOINT).
        workers: files fetched at once.

    Raises:
        CptError: no access, no such repository or revision, no network, no space, or a file that arrived damaged.
    """
    from huggingface_hub import HfApi

    start = time.monotonic()
    api = HfApi(endpoint=endpoint)
    page = f"{api.endpoint}/{repo_id}"
    with explained("model", repo_id, page, revision):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    wanted, left_out = _choose(info.siblings or [], repo_id)
    there = Path(dest).exists()
    if there:
        _refuse_if_incomplete(Path(dest), wanted, repo_id)
    else:
        _fetch(api, repo_id, str(info.sha), Path(dest), wanted, workers)
    return DownloadReport(
        repo_id,
        str(info.sha),
        str(dest),
        tuple(file.rfilename for file in wanted),
        sum(file.size or 0 for file in wanted),
        tuple(left_out),
        there,
        round(time.monotonic() - start, 3),
    )


def _choose(siblings: list[RepoSibling], repo_id: str) -> tuple[list[RepoSibling], list[str]]:
    wanted, left_out = [], []
    for file in siblings:
        path = Path(file.rfilename)
        unused = len(path.parts) > 1 or path.suffix in _UNUSED_SUFFIXES or path.name.startswith(".")
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


def _refuse_if_incomplete(dest: Path, wanted: list[RepoSibling], repo_id: str) -> None:
    for file in wanted:
        path = dest / file.rfilename
        if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
            raise CptError(
                f"{dest} exists and is not {repo_id}: {file.rfilename} is missing or has another size than the hub's. "
                "Give another destination, or remove it first."
            )


def _fetch(api: Any, repo_id: str, commit: str, dest: Path, wanted: list[RepoSibling], workers: int) -> None:
    from huggingface_hub import snapshot_download

    partial = dest.with_name(dest.name + ".download")  # a fixed name, so that the next run finds what is there
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _check_space(partial, wanted, repo_id)
        with explained("model", repo_id, f"{api.endpoint}/{repo_id}", commit), progress_bars(sys.stderr.isatty()):
            snapshot_download(
                repo_id,
                revision=commit,
                local_dir=partial,
                allow_patterns=[file.rfilename for file in wanted],
                endpoint=api.endpoint,
                max_workers=workers,
            )
        for file in wanted:
            _check_file(partial / file.rfilename, file)
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


def _check_file(path: Path, file: RepoSibling) -> None:
    size = path.stat().st_size
    problem = f"has {size} bytes, the hub says {file.size}" if file.size not in (None, size) else ""
    if not problem and file.lfs:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.lfs.sha256:
                problem = "has another SHA-256 sum than the hub says"
    if problem:
        path.unlink()
        raise CptError(f"{path.name} arrived damaged: it {problem}. It was removed; rerun to fetch it again.")
