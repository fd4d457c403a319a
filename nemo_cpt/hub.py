"""What models and datasets from the Hugging Face hub share: where tokens are made, and its client's progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager

TOKEN_PAGE = "https://huggingface.co/settings/tokens"
SET_A_TOKEN = f"set the environment variable HF_TOKEN to a token from {TOKEN_PAGE}"


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Keep the hub's bars off for a while where they are not `shown`, and leave them as they were."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
