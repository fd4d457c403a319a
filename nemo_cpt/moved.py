"""Where a file that a run has recorded may lie now: the project was moved, or is seen from another folder."""

from collections.abc import Iterator
from pathlib import Path


def places(recorded: Path, beside: Path) -> Iterator[Path]:
    """What is there of the ends of a recorded path, below each of the folders above another path, the longest first.

    Whoever takes one compares its content: another project may have a file of this name.

    Args:
        recorded: absolute, or relative to a folder that nobody knows any more.
        beside: what was moved with it.
    """
    names = recorded.parts[1:] if recorded.is_absolute() else recorded.parts
    for start in range(len(names)):
        for above in beside.absolute().parents:
            if (found := above.joinpath(*names[start:])).exists():
                yield found
