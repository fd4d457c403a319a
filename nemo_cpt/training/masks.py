"""Which of Megatron's masks a run's losses were counted with, by its record; without importing torch."""

from collections.abc import Mapping
from typing import Any

# Settings of a run's data that decide what its losses count and see, in words. `reset_position_ids` is none of them:
# rotary embeddings count from the sequence's beginning whatever the positions are (megatron-core, GPTModel.forward).
MASKS = {
    "eod_mask_loss": "what follows a document's end is not counted (eod_mask_loss)",
    "reset_attention_mask": "no document sees the one before (reset_attention_mask)",
}


def masks_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of `MASKS` a run trained and validated with.

    Args:
        record: of one of its checkpoints (`run.json`).
    """
    # What came of the settings stands with the validation: an attention that reads no mask heeds none.
    found = record.get("settings", {}).get("data", {}) | record.get("validated_on", {})
    return tuple(name for name in MASKS if found.get(name))
