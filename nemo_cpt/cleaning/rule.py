"""What a rule is, and what it finds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from nemo_cpt.arguments import plain_scalar
from nemo_cpt.cleaning.document import Document
from nemo_cpt.errors import CptError


class Check(NamedTuple):
    """A value measured of a document, and its limits.

    Attributes:
        measure: What was measured; those that end in `_share` lie between 0 and 1, others are counts or lengths.
        value: How much it is.
        at_least: The smallest value that passes; None for any.
        at_most: The largest value that passes; None for any.
    """

    measure: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passes(self) -> bool:
        """Whether the value is within the limits."""
        # Every check of every document: no further call, no comparison that is not needed.
        if self.at_least is not None and self.value < self.at_least:
            return False
        return self.at_most is None or self.value <= self.at_most

    @property
    def limit(self) -> str:
        """The limits in words."""
        limits = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None) or "none"


@dataclass(frozen=True)
class Limits:
    """Settings whose values are checked when they are made, by Python as by YAML."""

    def __post_init__(self) -> None:
        """Check the values against the fields' types, and against each other.

        Raises:
            CptError: One is of another type, below 0, a share above 1, or a minimum above its maximum.
        """
        hints = get_type_hints(type(self))
        for each in fields(self):
            value = _value(getattr(self, each.name), hints[each.name], each.name)
            # YAML has lists for what are tuples here.
            object.__setattr__(self, each.name, value)
            if each.name.startswith("min_"):
                most = getattr(self, each.name.replace("min_", "max_", 1), None)
                if value is not None and most is not None and value > most:
                    raise CptError(f"{each.name}: {value!r} is above {each.name.replace('min_', 'max_', 1)}, {most!r}.")


@dataclass(frozen=True)
class Rule(Limits):
    """A rule about one document: its fields are its limits, None for none.

    Attributes:
        name: How configurations and reports call it.
    """

    name: ClassVar[str]

    def apply(self, document: Document) -> Iterator[Check]:
        """Change the document, yield what is measured of it, or both; a document is dropped at the first failure.

        Lazily: what a dropped document would have been asked next is not computed.
        """
        raise NotImplementedError

    def load(self) -> None:
        """Read what the rule needs, in the parent and before the first document.

        Raises:
            CptError: It cannot be had.
        """


def _value(value: Any, hint: Any, where: str) -> Any:
    """Return a value as a field's type has it, `where` being its name, for its parts too."""
    origin, inner, value = get_origin(hint), get_args(hint), plain_scalar(value)
    if origin in (Union, UnionType):
        if value is None and type(None) in inner:
            return None
        return _value(value, next(each for each in inner if each is not type(None)), where)
    if origin is Literal and value in inner:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(each, inner[0], where) for each in value)
    if origin is dict and isinstance(value, Mapping):
        return {_value(key, inner[0], where): _value(each, inner[1], where) for key, each in value.items()}
    if hint in (int, float) and type(value) in (int, float) and value < 0:
        raise CptError(f"{where}: {value!r} is below 0, which nothing that is measured can be; null sets no limit.")
    # A share in percent would never be reached, or never be met, and nothing would say so.
    if hint is float and type(value) in (int, float) and where.endswith(("_share", "_score")) and value > 1:
        raise CptError(f"{where}: {value!r} is above 1, which no share can be; 0.3 is 30 %, null sets no limit.")
    # A bool is an int to Python, and a mistake here; a whole number is a float to everybody.
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return value  # as it is written: the same rules by Python and by YAML say the same of what they drop
    if hint in (int, str, bool) and type(value) is hint:
        return value
    wanted = " or ".join(map(repr, inner)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise CptError(f"{where}: {value!r} is no {wanted}.")
