"""What a rule is, and what it finds."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, get_type_hints

from nemo_cpt.arguments import as_wanted
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
            # YAML has lists for what are tuples here.
            value = as_wanted(each.name, getattr(self, each.name), hints[each.name], each.default)
            _check_range(each.name, value)
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


def _check_range(name: str, value: Any) -> None:
    """Refuse a number that cannot be measured; of a mapping, lengths and their limits."""
    limits = value.values() if isinstance(value, dict) else [value]
    for number in (*limits, *(value if isinstance(value, dict) else ())):
        if isinstance(number, int | float) and number < 0:
            raise CptError(f"{name}: {number!r} is below 0, which nothing that is measured can be; null sets no limit.")
    # A share in percent would never be reached, or never be met, and nothing would say so.
    for number in limits if name.endswith(("_share", "_score")) else ():
        if number is not None and number > 1:
            raise CptError(f"{name}: {number!r} is above 1, which no share can be; 0.3 is 30 %, null sets no limit.")
