"""Where what can be made again is kept between commands."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The user's folder for one kind of cached thing; it need not be there yet (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nemo_cpt", kind)
