"""Conversations to tokens with a mask of those that are trained on. Names are loaded when they are first used."""

from typing import TYPE_CHECKING

from nemo_cpt.importing import on_first_use

if TYPE_CHECKING:
    from nemo_cpt.conversations.dataset import ConversationSet as ConversationSet
    from nemo_cpt.conversations.dataset import lay_out as lay_out
    from nemo_cpt.conversations.dataset import open_conversations as open_conversations
    from nemo_cpt.conversations.inspection import ConversationInspection as ConversationInspection
    from nemo_cpt.conversations.inspection import inspect_conversations as inspect_conversations
    from nemo_cpt.conversations.mixture import Conversations as Conversations
    from nemo_cpt.conversations.mixture import TrainingSequences as TrainingSequences
    from nemo_cpt.conversations.packing import Packing as Packing
    from nemo_cpt.conversations.packing import pack as pack
    from nemo_cpt.conversations.preparation import ConversationReport as ConversationReport
    from nemo_cpt.conversations.preparation import prepare as prepare
    from nemo_cpt.conversations.special_rows import measure_rows as measure_rows
    from nemo_cpt.conversations.templates import load_template as load_template

_HOMES = {
    "ConversationInspection": "inspection",
    "ConversationReport": "preparation",
    "ConversationSet": "dataset",
    "Conversations": "mixture",
    "Packing": "packing",
    "TrainingSequences": "mixture",
    "inspect_conversations": "inspection",
    "lay_out": "dataset",
    "load_template": "templates",
    "measure_rows": "special_rows",
    "open_conversations": "dataset",
    "pack": "packing",
    "prepare": "preparation",
}
__all__ = sorted(_HOMES)
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
