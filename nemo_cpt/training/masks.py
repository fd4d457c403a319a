"""Which of Megatron's masks a run's losses were counted with, by its record; without importing torch."""

from collections.abc import Mapping
from typing import Any

# Settings of a run's data that decide what its losses count and see, in words.
MASKS = {
    "eod_mask_loss": "what follows a document's end is not counted (eod_mask_loss)",
    "reset_attention_mask": "no document sees the one before (reset_attention_mask)",
    "reset_position_ids": "each document's positions begin anew (reset_position_ids)",
}
RESETS = ("reset_attention_mask", "reset_position_ids")


def masks_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of `MASKS` a run trained and validated with.

    Args:
        record: of one of its checkpoints (`run.json`).
    """
    # Of resets not the setting, but what came of it: most models and attentions heed none.
    found = {name: record.get("validated_on", {}).get(name) for name in RESETS}
    found |= {"eod_mask_loss": record.get("settings", {}).get("data", {}).get("eod_mask_loss")}
    return tuple(name for name in MASKS if found[name])
