"""What packages print while they are imported, to which no user can do anything.

Ten lines of it stood before the one that matters. Seen in torch 2.13.0, megatron-core 0.15.3, nemo_toolkit 2.7.3 and
its nv-one-logger.
"""

import logging
import warnings
from functools import cache, partial

_OF_WARNINGS = "The pynvml package is deprecated"
_OF_LOGGERS = {
    "megatron.core.utils": "has reached end of life",
    "nemo.collections.llm.gpt.model.megatron.hyena.hyena_mixer": "Using default recipe",
    "nemo_logger": "module could not be imported: cannot import name",
    "nv_one_logger.api.config": "Setting error_handling_strategy",
    "nv_one_logger.training_telemetry.api.training_telemetry_provider": "No exporters were provided",
}


@cache
def quiet_imports() -> None:
    """Leave these messages out, and no others; call it before torch and NeMo are imported."""
    warnings.filterwarnings("ignore", message=_OF_WARNINGS)
    for name, phrase in _OF_LOGGERS.items():
        logging.getLogger(name).addFilter(partial(_is_other, phrase))


def _is_other(phrase: str, record: logging.LogRecord) -> bool:
    return phrase not in record.getMessage()
