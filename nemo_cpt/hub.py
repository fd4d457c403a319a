"""What models and datasets from the Hugging Face hub share: its errors explained, and its client's progress bars."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemo_cpt.errors import CptError

TOKEN_PAGE = "https://huggingface.co/settings/tokens"
SET_A_TOKEN = f"set the environment variable HF_TOKEN to a token from {TOKEN_PAGE}"


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Keep the hub's bars off for a while where they are not `shown`, and leave them as they were."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # Bars that the user has switched off are not switched on again at the end.
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def retries_told_once() -> Iterator[None]:
    """Make one line of what the hub's client says of its attempts, of which each takes three and a stack of errors."""
    told: list[logging.LogRecord] = []

    def shorten(record: logging.LogRecord) -> bool:
        if "Retrying in" not in record.getMessage():
            return "thrown while requesting" not in record.getMessage()
        if not told:
            record.msg, record.args = "the Hugging Face hub does not answer; trying for another half a minute", ()
        told.append(record)
        return len(told) == 1

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(shorten)
    try:
        yield
    finally:
        logger.removeFilter(shorten)


@contextmanager
def explained(kind: str, name: str, page: str, revision: str = "main") -> Iterator[None]:
    """Turn the hub's errors into CptErrors that say what to do; none of them holds the token.

    Args:
        kind: "model" or "dataset".
        name: the repository, owner/name.
        page: its page on the hub.
        revision: the branch, tag or commit that is asked for.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from requests.exceptions import RequestException

    try:
        yield
    # The order counts: gated and missing repositories are HTTP errors too, and the general ones come last.
    except GatedRepoError:
        raise CptError(f"The {kind} {name} is gated. Open {page}, accept its conditions, then {SET_A_TOKEN}.") from None
    except RepositoryNotFoundError:
        raise CptError(
            f"There is no {kind} {name} at {page}, or it is private. Check the name; if it is private, {SET_A_TOKEN}."
        ) from None
    except RevisionNotFoundError:
        raise CptError(f"{name} has no revision {revision!r}. See {page}/tree/main for those it has.") from None
    except HFValidationError as error:
        raise CptError(f"{name!r} is no repository's name ({error}). Give owner/name.") from None
    except LocalTokenNotFoundError:
        raise CptError(f"A token is needed and there is none: {SET_A_TOKEN}.") from None
    except OfflineModeIsEnabled:
        raise CptError("HF_HUB_OFFLINE is set, so nothing can be downloaded. Unset it.") from None
    except HfHubHTTPError as error:
        raise CptError(_http_problem(error, name, page)) from None
    except (LocalEntryNotFoundError, RequestException, ConnectionError) as error:
        raise CptError(
            f"{page} could not be reached or broke off ({type(error).__name__}). Check the network. "
            "A rerun goes on where this one stopped."
        ) from None
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise CptError(f"A file of {name} arrived truncated. A rerun goes on where this one stopped.") from None


def _http_problem(error: Any, name: str, page: str) -> str:
    status = error.response.status_code if error.response is not None else None
    if status in (401, 403):
        return (
            f"The hub refuses access to {name} (HTTP {status}). Open {page}, accept its conditions, then {SET_A_TOKEN}."
        )
    return f"The hub answered with an error for {name} (HTTP {status}). Try again later; a rerun goes on."
