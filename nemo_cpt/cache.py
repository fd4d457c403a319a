"""Where what can be made again is kept between commands."""

import os
from pathlib import Path

from nemo_cpt.errors import CptError


def cache_folder(kind: str) -> Path:
    """The user's folder for one kind of cached thing (XDG Base Directory Specification), made if it is not there.

    Raises:
        CptError: it cannot be made: a home that may only be read, or none.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nemo_cpt", kind)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise CptError(f"no cache can be kept ({error}); XDG_CACHE_HOME names another place") from error
    return folder
