"""Whether the Hugging Face hub and Weights & Biases let this user in; tokens and keys are never printed."""

import json
import netrc
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_cpt.doctor.examination import Examination, Finding, alongside
from nemo_cpt.hub import TOKEN_PAGE
from nemo_cpt.urls import hide_credentials

GATED = "meta-llama/Llama-3.1-8B"
PROCESS_SECONDS = 15  # a name server that does not answer holds longer than the request's own limit
NETWORK_CURE = "check network and proxy (HTTPS_PROXY), or set HF_ENDPOINT; a base on disk needs no hub"
TRUE = ("1", "true", "yes", "on")


@alongside
def hugging_face(examination: Examination) -> Finding:
    """Whether the hub hands out a gated model's files to the token of this environment or of the hub's store."""
    name = "Hugging Face hub"
    if examination.hub is None and (reason := _not_needed(examination)):
        return Finding(name, "skipped", reason)
    repository = examination.hub or GATED
    # A process, which can be ended: a name server that hangs cannot.
    command = [sys.executable, "-m", "nemo_cpt.doctor.ask_hub", repository]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROCESS_SECONDS, env=examination.environ, check=True
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "warning", f"no answer in {PROCESS_SECONDS} s", NETWORK_CURE)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        return Finding(name, "warning", f"could not be asked: {hide_credentials(last)}", "pip install huggingface_hub")
    return _judged(name, repository, json.loads(done.stdout.splitlines()[-1]))


def _judged(name: str, repository: str, answer: dict[str, Any]) -> Finding:
    endpoint, status, code = answer["endpoint"], answer.get("status"), answer.get("code", "")
    token = "with the token found" if answer["token"] else "without a token"
    page = f"{endpoint}/{repository}"
    # A missing config.json says that the repository could be looked into.
    if status in (200, 404) and code in ("", "EntryNotFound"):
        return Finding(name, "ok", f"{repository} is readable {token}")
    if status in (401, 403):
        why = code or answer.get("said", "")
        found = f"{repository} is refused {token} (HTTP {status}{', ' + why if why else ''})"
        cure = f"open {page}, accept its conditions, then run `hf auth login` or set HF_TOKEN ({TOKEN_PAGE})"
        # Of a public one, too: the hub looks at the token first.
        if status == 401 and answer["token"] and not code:
            cure = f"the token expired, was revoked or is mistyped: `hf auth login`, or HF_TOKEN ({TOKEN_PAGE})"
        return Finding(name, "error", found, cure)
    if status == 404:
        return Finding(name, "error", f"there is no {repository} at {endpoint} ({token})", f"look at {page}")
    if status:
        return Finding(name, "warning", f"{endpoint} answered HTTP {status}", "try again later")
    if answer["error"] == "HFValidationError":
        return Finding(name, "error", f"{repository!r} is no repository's name", "give --hub OWNER/NAME")
    if answer["error"] == "OfflineModeIsEnabled":
        return Finding(name, "warning", "HF_HUB_OFFLINE is set: nothing can be fetched", "unset HF_HUB_OFFLINE")
    return Finding(name, "warning", f"{endpoint} does not answer ({answer['error']})", NETWORK_CURE)


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
    wanted = examination.job is not None and examination.job.logs_to_wandb
    # A container has neither this machine's netrc file nor its packages.
    if wanted and (examination.place.image is not None or not examination.place.same_files):
        return Finding("wandb", "skipped", "where the job runs, not here; WANDB_API_KEY is handed on where it is set")
    if find_spec("wandb") is None and wanted:
        return Finding("wandb", "error", "the recipe logs to it, and it is not installed", "pip install wandb")
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
    cure = "run `wandb login`, set WANDB_API_KEY, or give logger={wandb: PROJECT, offline: true}"
    if wanted:
        return Finding("wandb", "error", f"the recipe logs to it, and there is no key for {host}", cure)
    return Finding("wandb", "skipped", f"no key for {host}; recipes log to TensorBoard and metrics/")


def mlflow(examination: Examination) -> Finding:
    """Whether MLflow is installed where a recipe logs to it."""
    wanted = examination.job is not None and examination.job.logs_to_mlflow
    if not wanted or not examination.place.same_packages:
        return Finding("mlflow", "skipped", "the recipe does not log to it" if not wanted else "the job has its own")
    if find_spec("mlflow") is None:
        return Finding("mlflow", "error", "the recipe logs to it, and it is not installed", "pip install mlflow-skinny")
    return Finding("mlflow", "ok", "installed")


def _has_entry(path: Path, host: str) -> bool:
    try:
        # Asked, not read out: the key itself is nobody's business here.
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
