"""Whether the Hugging Face hub and Weights & Biases let this user in; tokens and keys are never printed."""

import netrc
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from nemo_cpt.doctor.examination import Examination
from nemo_cpt.doctor.finding import Finding

GATED = "meta-llama/Llama-3.1-8B"
HUB_SECONDS = 5
TOKEN_PAGE = "https://huggingface.co/settings/tokens"
TRUE = ("1", "true", "yes", "on")


def hugging_face(examination: Examination) -> Finding:
    """Whether the hub hands out a gated model's files to the token of this environment or of the hub's store."""
    name = "Hugging Face hub"
    if examination.hub is None and (reason := _not_needed(examination)):
        return Finding(name, "skipped", reason)
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
    from requests.exceptions import RequestException

    repository = examination.hub or GATED
    with_token = "with the token found" if get_token() else "without a token"
    try:
        validate_repo_id(repository)
        # The listing of a gated model is open to anybody; a file is not.
        url = f"{constants.ENDPOINT}/{repository}/resolve/main/config.json"
        answer = get_session().head(url, headers=build_hf_headers(), timeout=HUB_SECONDS, allow_redirects=True)
        hf_raise_for_status(answer)
    except HFValidationError as error:
        return Finding(name, "error", f"{repository!r} is no repository's name ({error})", "give --hub OWNER/NAME")
    except HfHubHTTPError as error:
        return _refused(name, repository, error, with_token, constants.ENDPOINT)
    except OfflineModeIsEnabled:
        return Finding(name, "warning", "HF_HUB_OFFLINE is set: nothing can be fetched", "unset HF_HUB_OFFLINE")
    except (RequestException, OSError) as error:
        found = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        cure = "check network and proxy (HTTPS_PROXY), or set HF_ENDPOINT; a base on disk needs no hub"
        return Finding(name, "warning", found, cure)
    return Finding(name, "ok", f"{repository} is readable {with_token}")


def _refused(name: str, repository: str, error: Exception, with_token: str, endpoint: str) -> Finding:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    code = response.headers.get("X-Error-Code", "") if response is not None else ""
    page = f"{endpoint}/{repository}"
    if status in (401, 403):
        found = f"{repository} is refused {with_token} (HTTP {status}{', ' + code if code else ''})"
        cure = f"open {page}, accept its conditions, then run `hf auth login` or set HF_TOKEN ({TOKEN_PAGE})"
        return Finding(name, "error", found, cure)
    if status == 404 and code != "EntryNotFound":
        return Finding(name, "error", f"there is no {repository} at {endpoint} ({with_token})", f"look at {page}")
    if status == 404:
        return Finding(name, "ok", f"{repository} answers {with_token}; it has no config.json")
    return Finding(name, "warning", f"{endpoint} answered HTTP {status}", "try again later")


def _not_needed(examination: Examination) -> str:
    job = examination.job
    if job and job.base and (Path(job.base) / "weights").is_dir():
        return "the base is on disk; --hub OWNER/NAME asks all the same"
    if job and not job.gpus_per_node:
        return "a recipe for the CPU; --hub OWNER/NAME asks all the same"
    return ""


def weights_and_biases(examination: Examination) -> Finding:
    """Whether wandb finds a key: in the environment, or in the netrc file that `wandb login` writes."""
    environ = examination.environ
    mode = environ.get("WANDB_MODE", "").lower()
    if find_spec("wandb") is None:
        return Finding("wandb", "skipped", "not installed; recipes log to TensorBoard and metrics/")
    if mode in ("offline", "disabled", "dryrun") or environ.get("WANDB_DISABLED", "").lower() in TRUE:
        return Finding("wandb", "ok", f"no login needed: {'WANDB_MODE=' + mode if mode else 'WANDB_DISABLED is set'}")
    if environ.get("WANDB_API_KEY"):
        return Finding("wandb", "ok", "logged in by WANDB_API_KEY")
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "api.wandb.ai"
    path = Path(environ.get("NETRC") or Path.home() / ".netrc")
    if _has_entry(path, host):
        return Finding("wandb", "ok", f"logged in to {host} by {path}")
    wants = examination.job is not None and any(field.startswith("log.wandb") for field in examination.job.fields)
    cure = "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
    if wants:
        return Finding("wandb", "error", f"the recipe logs to it, and there is no key for {host}", cure)
    return Finding("wandb", "skipped", f"no key for {host}; recipes log to TensorBoard and metrics/ ({cure} to use it)")


def _has_entry(path: Path, host: str) -> bool:
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
