"""Environment variables of a job: which may be written to disk, and which are secrets."""

import atexit
import os
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_cpt.errors import CptError
from nemo_cpt.urls import hide_credentials

SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
GPU_VARIABLES = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""What every job gets unless the shell or `env` says otherwise: the allocator that docs/performance.md was measured
with, which wastes 1 % of a GPU's memory, and the single queue that Megatron's tensor parallelism counts on."""
_ODD_TO_SHELLS = re.compile(r"""[\s'"`$&;()<>|*?!\\{}\[\]#~]""")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INSTALLS_BY_NAME = re.compile(
    r"\b(pip|uv)[0-9.]*\b.*\binstall\b.*[\s'\"]nemo[-_.]cpt(?![-\w./])(?!(\[[^]]*\])?\s*@)", re.IGNORECASE
)
_OTHER_INDEX = re.compile(r"--index-url|--no-index|\s-i\s")
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)


def checked_env(env: Mapping[str, str | float] | None) -> dict[str, str]:
    """Return `env` as strings, refusing names that are no variables and those that look like secrets.

    Args:
        env: variables to set in the job. NeMo-Run writes them into the experiment's folder and into generated scripts.

    Raises:
        CptError: a name is not a variable's, or is one of a secret (it ends in TOKEN, KEY, SECRET, PASSWORD, ...), or
            a value is an address with credentials.
    """
    values = {name: str(value) for name, value in (env or {}).items()}
    for name, value in values.items():
        if not _NAME.fullmatch(name):
            raise CptError(f"env: {name!r} is not the name of an environment variable")
        # By its name, because a value gives nothing away; an address may hold a password whatever it is called.
        secret = name in SECRETS or _SECRET_NAME.search(name)
        if secret or hide_credentials(value) != value:
            what = "looks like a secret" if secret else "holds an address with credentials"
            raise CptError(
                f"env: {name} {what}, and what stands in env is written to disk in plain text; "
                f"export {name} in the shell that launches (and name it in secrets=... for executors that have it)"
            )
    return values


def checked_setup(lines: Sequence[str]) -> list[str]:
    """Return shell lines that prepare a job, refusing those that take nemo_cpt from a public index.

    Raises:
        CptError: a line installs nemo_cpt by its name alone, which on PyPI is free for anybody to take.
    """
    for line in lines:
        if _INSTALLS_BY_NAME.search(line) and not _OTHER_INDEX.search(line):
            raise CptError(
                f"setup: {line!r} takes nemo_cpt from PyPI, where it is not: whoever registers the name there would "
                "run on your machines. Install a checkout (pip install -e /path/to/it), a wheel of yours or a git "
                "address, or name your own index (--index-url)"
            )
    return list(lines)


def job_env(env: Mapping[str, str | float] | None) -> dict[str, str]:
    """Return the variables of a job: `GPU_VARIABLES`, as this environment has them if it does, and `env`.

    Raises:
        CptError: see `checked_env`.
    """
    # In this order: the argument before the shell, the shell before our defaults.
    return {name: os.environ.get(name, value) for name, value in GPU_VARIABLES.items()} | checked_env(env)


def checked_secrets(names: Sequence[str] | None) -> list[str]:
    """Return the names of the secrets to pass; by default those of `SECRETS` that are set.

    Raises:
        CptError: a name the caller gave is not set in this environment.
    """
    if names is None:
        return [name for name in SECRETS if os.environ.get(name)]
    for name in names:
        if not _NAME.fullmatch(name):
            # Four letters: the rest of a token that was given for its name belongs in no log.
            raise CptError(f"secrets: give names of environment variables, not values; got {name[:4]!r}...")
        if not os.environ.get(name):
            raise CptError(f"secrets: {name} is not set in this environment; export it, or leave it out")
    return list(names)


def secrets_file(names: Sequence[str]) -> str:
    """Return the text of a shell file that exports the named variables with their values here."""
    return "".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in names)


def as_literals(variables: Mapping[str, str]) -> dict[str, str]:
    """Return variables for TorchX, to which `$` begins a macro: what it makes of them is what they were."""
    return {name: value.replace("$", "$$") for name, value in variables.items()}


def python_path(*folders: str) -> str:
    """Return what a shell assigns to PYTHONPATH for `folders`, before those it has.

    An empty entry, as `:$PYTHONPATH` leaves where none is set, is Python's word for the current folder, whose modules
    would then stand before the standard library's.
    """
    return f"""\"$(echo {":".join(map(shlex.quote, folders))}:"$PYTHONPATH" | tr -s : | sed 's/:$//')\""""


def check_for_shells(path: str, hint: str) -> None:
    """Refuse a path that a shell would read as something else, for what of NeMo-Run's quotes none.

    Args:
        path: of a job's folder.
        hint: what to do about it.

    Raises:
        CptError: it holds a blank, a quote, `$` or their like.
    """
    if odd := _ODD_TO_SHELLS.search(path):
        raise CptError(f"{path}: NeMo-Run hands this path to shells, which would not take {odd[0]!r} as it is; {hint}")


def existing_mounts(mounts: Sequence[str]) -> list[str]:
    """Return mounts as "source:target", with every source made absolute.

    Raises:
        CptError: a source does not exist here.
    """
    complete = []
    for mount in mounts:
        # "/data:/data:ro": the target keeps its flag.
        source, _, target = str(mount).partition(":")
        path = Path(source).expanduser().absolute()
        if not path.exists():
            raise CptError(f"mount {mount}: {path} does not exist")
        complete.append(f"{path}:{target or path}")
    return complete


def keep_secrets(executor: str, names: Sequence[str]) -> Path:
    """Write the named variables to a file of mode 600 in NeMo-Run's home and return its path.

    For executors that mount or copy a file before the job's own folder exists. It is needed until the job has started,
    and removed when this process ends; what processes that were killed have left behind is removed by the next one.
    """
    from nemo_run.config import get_nemorun_home

    folder = Path(get_nemorun_home()) / "secrets"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Only this host's: another host's process ids mean nothing here.
    for left in folder.glob(f"*.{socket.gethostname()}.*.env"):
        if not _is_alive(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)
    # A file for each executor: another one's secrets may be others. Host and process, by which a later launch knows
    # whose it was, stand at the end of the name.
    path = folder / f"{executor}-{len(_KEPT)}.{socket.gethostname()}.{os.getpid()}.env"
    # Before it is written: also a half-written one is to go at the end.
    _KEPT.add(path)
    write_secrets(path, names)
    return path


def write_secrets(path: Path, names: Sequence[str]) -> None:
    """Write `secrets_file` of the named variables to a new file of mode 600, in place of one that is there."""
    path.unlink(missing_ok=True)
    # Mode 600 from the first moment, and never through a link that somebody put there.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets_file(names))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # It is another user's, and so it is there.
    except PermissionError:
        return True
    return True


_KEPT: set[Path] = set()


@atexit.register
def forget_secrets() -> None:
    """Remove what `keep_secrets` wrote."""
    while _KEPT:
        _KEPT.pop().unlink(missing_ok=True)
