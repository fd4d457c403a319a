"""Tokenizers of one's own: trained, grown from a model's, compared. Names are loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
