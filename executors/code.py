"""The code a job runs: a copy of the repository as it is on disk when the job is submitted."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import nemo_run as run

from nemo_cpt.errors import CptError

LARGEST_MIB = 50
MOST_FILES = 1000
SECRET_FILES = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*",
    "id_ed25519*", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd", "kubeconfig",
    "credentials", "credentials.*", "secret.*", "secrets.*", "*service[-_]account*.json", "*.token", "token",
)  # fmt: skip
SECRET_FOLDERS = (".aws", ".azure", ".docker", ".gnupg", ".kube", ".ssh", "gcloud")
NO_SECRETS = ("*.example", "*.sample", "*.template", "*.py", "*.md")


@dataclass(kw_only=True)
class CodeSnapshot(run.Packager):
    """Packs the git repository of the current folder: tracked files as they are on disk, and untracked ones.

    NeMo-Run's GitArchivePackager packs the last commit and leaves out what is not committed without a word. Submodules
    are packed in the same way; ignored files are not packed, nor are untracked ones whose names are those of secrets.
    (What is tracked was published on purpose.) Outside a repository the Python files under the current folder are.

    Attributes:
        refuse_uncommitted: raise CptError while there are changes that are not committed.
    """

    refuse_uncommitted: bool = False

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Write `job_dir/name.tar.gz` and return its path; `path` is the folder the job is submitted from."""
        root, files = _files(Path(path), self.refuse_uncommitted)
        _check_sizes(root, files)
        archive = Path(job_dir) / f"{name}.tar.gz"
        partial = archive.with_suffix(".partial")
        # Level 1: code is small, and the launch waits.
        with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
            for file in files:
                tar.add(root / file, arcname=file, recursive=False)
        partial.rename(archive)
        return str(archive)


def _files(folder: Path, refuse_uncommitted: bool) -> tuple[Path, list[str]]:
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return folder, [str(file.relative_to(folder)) for file in _python_files(folder)]
    root = Path(top.strip())
    changes = _git(root, "status", "--porcelain") or ""
    if refuse_uncommitted and changes:
        raise CptError(
            f"{root} has changes that are not committed; commit them or use code='ship':\n{changes.rstrip()}"
        )
    tracked = {str(file.relative_to(root)): is_tracked for file, is_tracked in _listed(root)}
    # By name alone: looking into files would be slow, and still miss most.
    secrets = [name for name, is_tracked in tracked.items() if not is_tracked and _looks_like_a_secret(Path(name))]
    if secrets:
        print(f"nemo_cpt: not shipped with the code, secrets by their names: {', '.join(secrets)}", file=sys.stderr)
    return root, [name for name in tracked if name not in secrets]


def _listed(repository: Path) -> Iterator[tuple[Path, bool]]:
    """A repository's files that are not ignored, and those of its submodules, of which git lists the folder alone.

    Each with whether it is tracked.
    """
    # -z, or git would quote names with blanks and characters beyond ASCII.
    listed = _git(repository, "ls-files", "-z", "-t", "--cached", "--others", "--exclude-standard") or ""
    for line in filter(None, listed.split("\0")):
        tag, _, name = line.partition(" ")
        path = repository / name
        if _is_repository(path):
            yield from _listed(path)
        # git lists deleted files until the deletion is committed.
        elif os.path.lexists(path):
            yield path, tag != "?"


def _is_repository(path: Path) -> bool:
    return (path / ".git").exists() and not path.is_symlink()


def _looks_like_a_secret(file: Path) -> bool:
    if any(folder in SECRET_FOLDERS for folder in file.parts[:-1]):
        return True
    name = file.name.lower()
    return any(fnmatch(name, each) for each in SECRET_FILES) and not any(fnmatch(name, each) for each in NO_SECRETS)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _python_files(folder: Path) -> list[Path]:
    found = []
    for here, folders, names in os.walk(folder):
        # In place, so that os.walk does not enter them: hidden folders and virtual environments.
        folders[:] = [name for name in folders if name[0] != "." and not (Path(here) / name / "pyvenv.cfg").exists()]
        found += [Path(here) / name for name in names if name.endswith(".py")]
        if len(found) > MOST_FILES:
            raise CptError(
                f"{folder} is in no git repository and holds more than {MOST_FILES} Python files; submit from your "
                "project's folder, `git init` it, or use code=None to ship nothing"
            )
    return found


def _check_sizes(root: Path, files: list[str]) -> None:
    for file in files:
        mib = (root / file).lstat().st_size / 2**20
        if mib > LARGEST_MIB:
            raise CptError(
                f"{root / file} has {mib:.0f} MiB and would be shipped with the code; add it to .gitignore "
                f"(files over {LARGEST_MIB} MiB are taken for data)"
            )
