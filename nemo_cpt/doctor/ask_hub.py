"""Ask the Hugging Face hub for a file of a repository, as `python -m nemo_cpt.doctor.ask_hub OWNER/NAME`.

A process of its own, because name servers and proxies can hang where no limit reaches. Prints one line of JSON; the
token, the environment's or the hub's store's, goes to the hub and nowhere else.
"""

import json
import sys
from typing import Any

SECONDS = 5


def ask(repository: str) -> dict[str, Any]:
    """Request the header of config.json: a gated model's listing is open to anybody, its files are not.

    Returns:
        `endpoint`, whether there is a `token`, and the answer's `status`, `code` and words (`said`), or the `error`
        without one.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id
    from requests.exceptions import RequestException

    from nemo_cpt.urls import public_url

    told: dict[str, Any] = {"endpoint": public_url(constants.ENDPOINT), "token": bool(get_token())}
    url = f"{constants.ENDPOINT}/{repository}/resolve/main/config.json"
    # HfApi.auth_check asks an address that mirrors (HF_ENDPOINT) need not serve, and knows no time limit;
    # get_hf_file_metadata tries six times, longer than anyone waits for a report.
    try:
        validate_repo_id(repository)
        # A HEAD request: access is decided, and nothing is downloaded.
        answer = get_session().head(url, headers=build_hf_headers(), timeout=SECONDS, allow_redirects=True)
    except (HFValidationError, OfflineModeIsEnabled, RequestException, OSError) as error:
        return told | {"error": type(error).__name__}
    code, said = (answer.headers.get(f"X-Error-{name}", "") for name in ("Code", "Message"))
    return told | {"status": answer.status_code, "code": code, "said": said}


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1])))
