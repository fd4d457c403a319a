"""The code a job runs: a copy of the repository as it is on disk when the job is submitted."""

import os
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import nemo_run as run

from nemo_cpt.errors import CptError

LARGEST_MIB = 50
MOST_FILES = 1000


@dataclass(kw_only=True)
class CodeSnapshot(run.Packager):
    """Packs the git repository of the current folder: tracked files as they are on disk, and untracked ones.

    NeMo-Run's GitArchivePackager packs the last commit and leaves out what is not committed without a word. Submodules
    are packed in the same way; ignored files are not packed. Outside a repository the Python files under the current
    folder are.

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
    return root, [str(file.relative_to(root)) for file in _listed(root)]


def _listed(repository: Path) -> list[Path]:
    """A repository's files that are not ignored, and those of its submodules, of which git lists the folder alone."""
    listed = _git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate") or ""
    found = []
    for path in (repository / name for name in listed.split("\0") if name):
        if (path / ".git").exists() and not path.is_symlink():
            found += _listed(path)
        elif os.path.lexists(path):
            found.append(path)
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _python_files(folder: Path) -> list[Path]:
    found = []
    for here, folders, names in os.walk(folder):
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
