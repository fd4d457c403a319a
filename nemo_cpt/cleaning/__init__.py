"""From raw text to what is worth learning from. Names are loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_cpt.cleaning.examination import examine as examine
    from nemo_cpt.cleaning.examination import explain as explain
    from nemo_cpt.cleaning.job import clean as clean
    from nemo_cpt.cleaning.job import read_cleaning as read_cleaning
    from nemo_cpt.cleaning.rules import Rules as Rules
    from nemo_cpt.cleaning.rules import read_rules as read_rules
    from nemo_cpt.cleaning.rules import rules_for as rules_for
    from nemo_cpt.cleaning.tallies import CleaningReport as CleaningReport

_HOMES = {
    "CleaningReport": "tallies",
    "Rules": "rules",
    "clean": "job",
    "examine": "examination",
    "explain": "examination",
    "read_cleaning": "job",
    "read_rules": "rules",
    "rules_for": "rules",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
