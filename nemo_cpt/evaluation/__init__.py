"""What a training changed: bits per byte, the language of replies, answers, benchmarks, before and after.

Names are loaded when they are first used: importing this package imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_cpt.evaluation.bits_per_byte import TextLoss, documents_loss, sequences_loss
    from nemo_cpt.evaluation.comparison import Report, evaluate

_HOMES = {
    "Report": "comparison",
    "TextLoss": "bits_per_byte",
    "documents_loss": "bits_per_byte",
    "evaluate": "comparison",
    "sequences_loss": "bits_per_byte",
}
__all__ = ["Report", "TextLoss", "documents_loss", "evaluate", "sequences_loss"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"nemo_cpt.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
