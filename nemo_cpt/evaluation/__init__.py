"""What a training changed: bits per byte, the language of replies, answers, benchmarks, before and after.

Names are loaded when they are first used: importing this package imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from nemo_cpt.importing import on_first_use

if TYPE_CHECKING:
    from nemo_cpt.evaluation.bits_per_byte import TextLoss, conversations_loss, documents_loss, sequences_loss
    from nemo_cpt.evaluation.comparison import Report, evaluate

_HOMES = {
    "Report": "comparison",
    "TextLoss": "bits_per_byte",
    "conversations_loss": "bits_per_byte",
    "documents_loss": "bits_per_byte",
    "evaluate": "comparison",
    "sequences_loss": "bits_per_byte",
}
__all__ = ["Report", "TextLoss", "conversations_loss", "documents_loss", "evaluate", "sequences_loss"]
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
