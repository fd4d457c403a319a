"""What of a URL is shown and kept."""

import json
import os
import string
import subprocess
import sys

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from nemo_cpt.errors import CptError
from nemo_cpt.executors.environment import checked_env
from nemo_cpt.hub import explained
from nemo_cpt.urls import hide_credentials, public_url

# Of characters that no address below holds, so that finding them means that they leaked
SECRETS = st.text("QZXJ7!$~", min_size=3, max_size=40)
HOSTS = st.sampled_from(["example.com", "127.0.0.1:8080", "[::1]:443", "bucket.s3.amazonaws.com"])
PATHS = st.sampled_from(["", "/", "/data/train_0.jsonl.gz", "/日本/a b.zst", "/@user/x"])
HARMLESS = st.sampled_from(["", "ref_type=heads", "id=12", "download=true&raw=1"])
SIGNED = (
    "sig Signature X-Amz-Signature X-Goog-Credential token access_token api_key apikey password se sv Policy "
    "Key-Pair-Id AWSAccessKeyId Expires auth hdnea_session OSSAccessKeyId jwt code"
)
NAMES = st.sampled_from(SIGNED.split())


@st.composite
def addresses(draw: st.DrawFn) -> tuple[str, str]:
    """A URL with a secret somewhere, and the same without it."""
    secret, host, path, harmless = draw(SECRETS), draw(HOSTS), draw(PATHS), draw(HARMLESS)
    where = draw(st.sampled_from(["user", "password", "query", "first in the query", "fragment", "long"]))
    user = {"user": f"{secret}@", "password": f"me:{secret}@"}.get(where, "")
    name = "z" if where == "long" else draw(NAMES)
    signed = f"{name}={secret * 13 if where == 'long' else secret}" if "query" in where or where == "long" else ""
    parts = [signed, harmless] if where == "first in the query" else [harmless, signed]
    query = "&".join(part for part in parts if part)
    fragment = f"#t={secret}" if where == "fragment" else ""
    return f"https://{user}{host}{path}{'?' if query else ''}{query}{fragment}", secret


@given(addresses())
def test_no_secret_is_shown(address: tuple[str, str]) -> None:
    url, secret = address
    shown = public_url(url)
    assert secret not in shown
    assert public_url(shown) == shown
    assert " " not in shown
    text = f"Cannot get {url.replace(' ', '%20')}: no route. See '{shown}'."
    assert secret not in hide_credentials(text)
    assert secret not in str(CptError(text))
    assert hide_credentials(hide_credentials(text)) == hide_credentials(text)


@given(HOSTS, PATHS, HARMLESS)
def test_other_addresses_stay(host: str, path: str, harmless: str) -> None:
    url = f"https://{host}{path.replace(' ', '%20')}{'?' if harmless else ''}{harmless}"
    assert public_url(url) == url
    assert hide_credentials(f"Look at {url}, then at ({url}).") == f"Look at {url}, then at ({url})."


@given(st.text(string.printable, max_size=80) | st.from_regex(r"\A\w*:?/{0,2}[\w@:\[\]%]*/?[\w;@]*\?[ &=\w]*#?\w*\Z"))
def test_any_text_is_one_address_or_another(text: str) -> None:
    assert public_url(public_url(text)) == public_url(text)
    hide_credentials(text)


def test_long_values_stay_apart_and_signatures_do_not() -> None:
    one, other = (f"https://example.com/get?file=corpora/japanese/{n}.gz" for n in (1, 2))
    assert public_url(one) != public_url(other)
    one, other = (f"https://example.com/a.gz?X-Amz-Date={n}&X-Amz-Signature={n}" for n in (1, 2))
    assert public_url(one) == public_url(other) == "https://example.com/a.gz?X-Amz-Date=*&X-Amz-Signature=*"


def test_what_is_no_address_is_hidden_whole() -> None:
    assert public_url("https://me:pass/word@example.com/a") == "https://*"
    assert hide_credentials("url: https://[broken/x?sig=1 is none") == "url: https://* is none"


def test_a_failed_request_is_named_without_its_query() -> None:
    text = (
        "HTTPSConnectionPool(host='a', port=443): Max retries exceeded with url: /x?X-Amz-Signature=QZX (Caused by ...)"
    )
    assert "QZX" not in str(CptError(text))


def test_the_hub_is_named_without_credentials() -> None:
    endpoint = "http://me:geheim@127.0.0.1:9"
    with (
        pytest.raises(CptError, match=r"http://127.0.0.1:9/a/b could not be reached"),
        explained("model", "a/b", f"{endpoint}/a/b"),
    ):
        raise requests.ConnectionError(endpoint)
    command = [sys.executable, "-m", "nemo_cpt.doctor.ask_hub", "a/b"]
    done = subprocess.run(command, env=os.environ | {"HF_ENDPOINT": endpoint}, capture_output=True, text=True)
    assert json.loads(done.stdout)["endpoint"] == "http://127.0.0.1:9"
    assert "geheim" not in done.stdout + done.stderr


@pytest.mark.parametrize("value", ["http://me:geheim@proxy:3128", "https://example.com/simple?token=geheim"])
def test_an_environment_that_is_written_down_holds_none(value: str) -> None:
    with pytest.raises(CptError, match="env: HTTPS_PROXY holds an address with credentials"):
        checked_env({"HTTPS_PROXY": value})
    assert checked_env({"HTTPS_PROXY": "http://proxy:3128"}) == {"HTTPS_PROXY": "http://proxy:3128"}
