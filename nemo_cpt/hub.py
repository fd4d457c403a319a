"""What models and datasets from the Hugging Face hub share: its errors explained, its names of bytes, its bars."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_cpt.errors import CptError

TOKEN_PAGE = "https://huggingface.co/settings/tokens"
SET_A_TOKEN = f"set the environment variable HF_TOKEN to a token from {TOKEN_PAGE}"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_name(model: str) -> bool:
    """Whether a model that is not here is named as the hub names it, and not by a path in a folder of this machine."""
    return bool(_NAME.fullmatch(model)) and not Path(model).parent.exists()


def download_advice(model: str) -> str:
    """What to say behind the path of a model that is not there and may be on the hub; perhaps nothing."""
    name = model.rpartition("/")[2]
    return f"; if it is on the hub: nemo-cpt download {model} models/{name}" if is_name(model) else ""


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
    # "Neither on the disk nor to be had": why it was not to be had is its cause.
    except LocalEntryNotFoundError as error:
        raise CptError(_why_not(error.__cause__ or error, name, page)) from None
    except (HfHubHTTPError, RequestException, ConnectionError) as error:
        raise CptError(_why_not(error, name, page)) from None
    except OSError as error:
        if "Consistency check failed" in str(error):
            raise CptError(f"A file of {name} arrived truncated. A rerun goes on where this one stopped.") from None
        check_certificates(error)
        raise
    except UnicodeEncodeError:
        raise CptError(f"HF_TOKEN holds letters that no token has. A token is at {TOKEN_PAGE}.") from None
    except ValueError as error:
        if "hf_transfer" not in str(error):
            raise
        raise CptError(
            "HF_HUB_ENABLE_HF_TRANSFER is set, and hf_transfer is not installed: unset it, or pip install hf_transfer."
        ) from None


def check_certificates(error: OSError) -> None:
    """Raise CptError for what requests says, without a number, of a REQUESTS_CA_BUNDLE that is not there."""
    if error.errno is None and "CA certificate bundle" in str(error):
        raise CptError(f"{error}: REQUESTS_CA_BUNDLE, or CURL_CA_BUNDLE, names a file that is not there.") from None


def _why_not(error: BaseException, name: str, page: str) -> str:
    """What came in place of a file or an answer, and what to do about it."""
    from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema, ProxyError, SSLError

    response = getattr(error, "response", None)
    if response is not None:
        # The hub's own words: of a token that lacks a permission they alone say which.
        said = " ".join(str(getattr(error, "server_message", None) or "").split())
        return _http_problem(response.status_code, f": {said}" if said else "", name, page)
    # Of a proxy's address requests says the same.
    no_address = isinstance(error, MissingSchema | InvalidSchema | InvalidURL)
    if no_address and not page.startswith(("https://", "http://")):
        return f"{page} is no address: HF_ENDPOINT (or endpoint=) begins with https://."
    cure = "the network"
    if isinstance(error, SSLError):
        cure = "its certificate; behind a proxy with its own one, REQUESTS_CA_BUNDLE names it"
    elif no_address or isinstance(error, ProxyError):
        cure = "the proxy (HTTPS_PROXY, HTTP_PROXY, NO_PROXY; for one of socks:// pip install pysocks)"
    return (
        f"{page} could not be reached or broke off ({type(error).__name__}). Check {cure}. A rerun goes on where this "
        "one stopped."
    )


def _http_problem(status: int, said: str, name: str, page: str) -> str:
    from huggingface_hub import get_token

    if status == 401 and get_token():  # of a public repository, too: the hub looks at the token first
        return (
            f"The hub does not take the token that was sent for {name} (HTTP 401{said}): it expired, was revoked or is "
            f"mistyped. HF_TOKEN, or `hf auth login`, sets another, from {TOKEN_PAGE}; what is public needs none."
        )
    if status in (401, 403):
        return (
            f"The hub refuses access to {name} (HTTP {status}{said}). Open {page}, accept its conditions, then "
            f"{SET_A_TOKEN}."
        )
    return f"The hub answered with an error for {name} (HTTP {status}{said}). Try again later; a rerun goes on."


def content_of(file: Any) -> str | None:
    """The hub's name for the bytes of a repository's file: git's, or of large files the SHA-256 sum; None if unsaid.

    Args:
        file: a `RepoSibling`, of a listing with `files_metadata`.
    """
    if file.lfs:
        return f"sha256:{file.lfs.sha256}"
    return f"git:{file.blob_id}" if file.blob_id else None


def git_prefix(size: int) -> bytes:
    """What git hashes, by SHA-1, before a file's bytes."""
    return f"blob {size}\0".encode()
