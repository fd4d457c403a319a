"""What packages print while they are imported, to which no user can do anything; and their bars.

Ten lines of it stood before the one that matters. Seen in torch 2.13.0, megatron-core 0.15.3, nemo_toolkit 2.7.3 and
its nv-one-logger.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


def bars_of_transformers(shown: bool) -> AbstractContextManager[None]:
    """Keep its bars over the files of a model's weights off for a while where they are not `shown`."""
    from transformers.utils import logging as bars

    return _off_for_a_while(
        shown or not bars.is_progress_bar_enabled(), bars.disable_progress_bar, bars.enable_progress_bar
    )


def bars_of_the_hub(shown: bool) -> AbstractContextManager[None]:
    """Keep huggingface_hub's bars off for a while where they are not `shown`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    return _off_for_a_while(shown or are_progress_bars_disabled(), disable_progress_bars, enable_progress_bars)


@contextmanager
def _off_for_a_while(left: bool, off: Callable[[], None], on: Callable[[], None]) -> Iterator[None]:
    # Bars that the user has switched off are left so, and not switched on again at the end.
    if left:
        yield
        return
    off()
    try:
        yield
    finally:
        on()


def _is_other(phrase: str, record: logging.LogRecord) -> bool:
    return phrase not in record.getMessage()
