"""Which versions are installed, for records of what was computed with what, and what adds a package."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from nemo_cpt import __version__


def extra(name: str) -> str:
    """The command that adds an extra of this package: from its checkout, as no index has it under its name."""
    return f"`pip install -c constraints.txt -e '.[{name}]'` in the checkout of nemo_cpt"


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """This library's version, and that of each of the packages that is installed, by their names."""
    found = {"nemo_cpt": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
