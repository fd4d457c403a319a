"""What packages print while they are imported, to which no user can do anything.

Ten lines of it stood before the one that matters. Seen in torch 2.13.0, megatron-core 0.15.3, nemo_toolkit 2.7.3 and
its nv-one-logger.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

# The doctor says where Transformer Engine is missing and wanted.
_OF_WARNINGS = (
    "The pynvml package is deprecated",
    "Transformer Engine and Apex are not installed",
    "Failed to create unified memory mempool",
)
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
    for message in _OF_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, phrase in _OF_LOGGERS.items():
        logging.getLogger(name).addFilter(partial(_is_other, phrase))


@contextmanager
def bars_of_transformers(shown: bool) -> Iterator[None]:
    """Keep its bars over the files of a model's weights off for a while where they are not `shown`."""
    from transformers.utils import logging as bars

    # Bars that the user has switched off are not switched on again at the end.
    if shown or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


def _is_other(phrase: str, record: logging.LogRecord) -> bool:
    return phrase not in record.getMessage()
