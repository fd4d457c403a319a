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
from nemo_run.config import get_nemorun_home

from nemo_cpt.errors import CptError

LARGEST_MIB = 50
MOST_FILES = 1000
SECRET_FILES = (
    ".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*",
    "id_ed25519*", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".git-credentials", ".htpasswd", "kubeconfig",
    "credentials", "credentials.*", "secret.*", "secrets.*", "*service[-_]account*.json", "*.token", "token",
)  # fmt: skip
SECRET_FOLDERS = (".aws", ".azure", ".docker", ".gnupg", ".kube", ".ssh", "gcloud")
# Whose names may say `secret` or `token` because they tell of one: code, and forms to fill in.
NO_SECRETS = ("*.example", "*.sample", "*.template", "*.py", "*.md")


@dataclass(kw_only=True)
class CodeSnapshot(run.Packager):
    """Packs the git repository of the current folder: tracked files as they are on disk, and untracked ones.

    NeMo-Run's GitArchivePackager packs the last commit and leaves out what is not committed without a word. Submodules
    are packed in the same way. Not packed are ignored files, the folder that NeMo-Run keeps its jobs in, and untracked
    files whose names are those of secrets. (What is tracked was published on purpose.) Outside a repository the Python
    files under the current folder are packed.

    Attributes:
        refuse_uncommitted: raise CptError while there are changes that are not committed.
    """

    refuse_uncommitted: bool = False

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Write `job_dir/name.tar.gz` and return its path; `path` is the folder the job is submitted from.

        Raises:
            CptError: where what is not committed is refused, there is such, or no repository; the code is too large; a
                file cannot be read, or the archive not be written.
        """
        root, files = _files(Path(path), self.refuse_uncommitted)
        _check_sizes(root, files)
        archive = Path(job_dir) / f"{name}.tar.gz"
        partial = archive.with_suffix(".partial")
        # Level 1: code is small, and the launch waits.
        try:
            with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
                for file in files:
                    # git names every file; a folder among them is a submodule that was never checked out.
                    tar.add(root / file, arcname=file, recursive=False)
        except OSError as error:  # a file that may not be read, a full disk
            partial.unlink(missing_ok=True)
            raise CptError(f"the code of {root} cannot be packed into {archive}: {error}") from error
        partial.rename(archive)
        return str(archive)


def import_folders(code: str) -> list[str]:
    """Where in the shipped code a job finds what can be imported here.

    Its root and `src`, and folders of the repository that are on this process's path: modules beside a script, or in
    the folder that it was started from.

    Args:
        code: the folder of the shipped code in the job.
    """
    here = Path.cwd().resolve()
    root = repository_root(here) or here
    inside = [Path("."), Path("src")]
    for folder in (here, *(Path(each).resolve() for each in sys.path)):
        # What is installed in a virtual environment within the repository is not shipped.
        if folder.is_relative_to(root) and folder.is_dir() and not _in_environment(folder, root):
            inside.append(folder.relative_to(root))
    return [os.path.normpath(os.path.join(code, folder)) for folder in dict.fromkeys(inside)]


def _in_environment(folder: Path, root: Path) -> bool:
    return any((each / "pyvenv.cfg").exists() for each in (folder, *folder.parents) if each.is_relative_to(root))


def _files(folder: Path, refuse_uncommitted: bool) -> tuple[Path, list[str]]:
    root = repository_root(folder)
    if root is None and refuse_uncommitted:
        raise CptError(f"{folder} is in no git repository, where nothing is committed; `git init` it, or code='ship'")
    if root is None:
        return folder, [str(file.relative_to(folder)) for file in _python_files(folder)]
    if refuse_uncommitted and (changes := _git(root, "status", "--porcelain")):
        raise CptError(
            f"{root} has changes that are not committed; commit them or use code='ship':\n{changes.rstrip()}"
        )
    left_out = _of_nemo_run(root)
    tracked = {
        str(file.relative_to(root)): is_tracked
        for file, is_tracked in _listed(root)
        if is_tracked or not any(file.is_relative_to(each) for each in left_out)
    }
    # By name alone: looking into files would be slow, and still miss most.
    secrets = [name for name, is_tracked in tracked.items() if not is_tracked and _looks_like_a_secret(Path(name))]
    if secrets:
        print(f"nemo_cpt: not shipped with the code, secrets by their names: {', '.join(secrets)}", file=sys.stderr)
    return root, [name for name in tracked if name not in secrets]


def _of_nemo_run(root: Path) -> list[Path]:
    """What NeMo-Run keeps its jobs in, within a repository: the code of a job would hold that of all before it."""
    home = Path(get_nemorun_home()).resolve()
    # A home that the repository is, or lies in, holds the code itself.
    return [home] if root != home and home.is_relative_to(root) else [home / "experiments", home / "secrets"]


def _listed(repository: Path) -> Iterator[tuple[Path, bool]]:
    """A repository's files that are not ignored, and those of its submodules, of which git lists the folder alone.

    Each with whether it is tracked.
    """
    # -z, or git would quote names with blanks and characters beyond ASCII.
    listed = _git(repository, "ls-files", "-z", "-t", "--cached", "--others", "--exclude-standard")
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


def repository_root(folder: Path) -> Path | None:
    """The root of the repository that a folder is in; None for one in none.

    Raises:
        CptError: there is one, and git does not read it, because it is another user's for example.
    """
    every = [each / ".git" for each in (folder, *folder.parents)]
    # A submodule or another working tree has a file of that name.
    if not any(path.is_file() or (path / "HEAD").is_file() for path in every):
        return None
    return Path(_git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))


def _git(folder: Path, *arguments: str) -> str:
    try:
        # As os.fsdecode has names that are not UTF-8.
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="surrogateescape"
        )
    except FileNotFoundError:
        raise CptError(f"{folder} is in a git repository, and git is not installed here") from None
    if done.returncode:
        raise CptError(f"git cannot list the code of {folder}: {done.stderr.strip()}")
    return done.stdout


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
        # A link's own size: it is packed as a link, and not what it leads to.
        mib = (root / file).lstat().st_size / 2**20
        if mib > LARGEST_MIB:
            raise CptError(
                f"{root / file} has {mib:.0f} MiB and would be shipped with the code; add it to .gitignore "
                f"(files over {LARGEST_MIB} MiB are taken for data)"
            )
