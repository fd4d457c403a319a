"""Environment variables of a job: which may be written to disk, and which are secrets."""

import re
from collections.abc import Mapping

from nemo_cpt.errors import CptError

SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)


def checked_env(env: Mapping[str, str] | None) -> dict[str, str]:
    """Return `env` as strings, refusing names that are no variables and those that look like secrets.

    Args:
        env: variables to set in the job. NeMo-Run writes them into the experiment's folder and into generated scripts.

    Raises:
        CptError: a name is not a variable's, or is one of a secret (it ends in TOKEN, KEY, SECRET, PASSWORD, ...).
    """
    for name in env or {}:
        if not _NAME.fullmatch(name):
            raise CptError(f"env: {name!r} is not the name of an environment variable")
        if name in SECRETS or _SECRET_NAME.search(name):
            raise CptError(
                f"env: {name} looks like a secret, and what stands in env is written to disk in plain text; "
                f"export {name} in the shell that launches (and name it in secrets=... for executors that have it)"
            )
    return {name: str(value) for name, value in (env or {}).items()}
