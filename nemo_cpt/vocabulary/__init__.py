"""Tokenizers of one's own: trained, grown from a model's, compared. Names are loaded when they are first used."""

from typing import TYPE_CHECKING

from nemo_cpt.importing import on_first_use

if TYPE_CHECKING:
    from nemo_cpt.vocabulary.comparison import Comparison as Comparison
    from nemo_cpt.vocabulary.comparison import compare as compare
    from nemo_cpt.vocabulary.growing import GrowReport as GrowReport
    from nemo_cpt.vocabulary.growing import grow as grow
    from nemo_cpt.vocabulary.payoff import Worth as Worth
    from nemo_cpt.vocabulary.payoff import worth as worth
    from nemo_cpt.vocabulary.training import TrainReport as TrainReport
    from nemo_cpt.vocabulary.training import train as train

_HOMES = {
    "Comparison": "comparison",
    "GrowReport": "growing",
    "TrainReport": "training",
    "Worth": "payoff",
    "compare": "comparison",
    "grow": "growing",
    "train": "training",
    "worth": "payoff",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
