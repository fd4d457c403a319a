"""What a rule is, and what it finds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from nemo_cpt.cleaning.document import Document


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
class Rule:
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
