"""From raw text to what is worth learning from. Names are loaded when they are first used."""

from typing import TYPE_CHECKING

from nemo_cpt.importing import on_first_use

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
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
