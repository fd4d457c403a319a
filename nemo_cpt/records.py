"""Dataclasses as JSON, and back: what was written to disk may be read by another version of the library."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class AsDict:
    """What commands print with `--json`: a dataclass of plain values."""

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serialisable dict."""
        return asdict(self)


def restored(kind: type[T], recorded: Mapping[str, Any], **instead: Any) -> T:
    """A dataclass from its fields in a record; those that a newer version added are left out.

    Args:
        kind: the dataclass.
        recorded: its fields, as they were written.
        **instead: values that take the place of the recorded ones.

    Raises:
        TypeError: a field is missing that has no default.
    """
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # typeshed's protocol is private
    return kind(**{name: value for name, value in {**recorded, **instead}.items() if name in known})
