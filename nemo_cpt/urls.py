"""How a URL is told from a path, and shown and kept: as an address, without what would let a reader use it."""

import re
from urllib.parse import unquote, urlsplit

# Names of passwords and tokens, and of the fields of queries signed for Amazon's, Google's, Azure's and other stores
_SECRET = re.compile(
    r"sig|token|secret|passw|pwd|auth|cred|key|session|expires?|policy|jwt|accessid|^code$|"
    r"^x-\w+-|^(s[eprtvi]|ss|spr|srt|sip|sk\w+)$",
    re.IGNORECASE,
)
_PLAIN = 12  # characters of a value that is shown; a longer one may be a secret under a name of its own
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]*[^\s'\"<>.,;:)\]]")  # not the punctuation after it
_REQUESTED = re.compile(r"(?<=with url: )[^\s'\"]+")  # how urllib3's messages name the path and query that failed


def is_address(text: str) -> bool:
    """Whether a text is the address of a server, and no path."""
    return text.startswith(("http://", "https://"))


def public_url(url: str) -> str:
    """Return a URL as it may be shown and kept: the same for the same file, without credentials, in one word.

    User, password and fragment go. Of the query, values that a server may take for credentials become `*`, so that a
    signed URL and its renewal are one address, and other long values `*` and a fingerprint. What stands in the path
    stays, since a secret there looks like a folder. `public_url(public_url(url)) == public_url(url)`.
    """
    try:
        parts = urlsplit(url.replace(" ", "%20"))
        _ = parts.port  # what follows a colon is no port where a password holds a slash
    except ValueError:
        return f"{url.partition('://')[0]}://*"
    host = parts.netloc.rpartition("@")[2]
    query = "&".join(_public_value(field) for field in parts.query.split("&")) if parts.query else ""
    return parts._replace(netloc=host, query=query, fragment="").geturl()


def _public_value(field: str) -> str:
    from hashlib import sha256

    name, equals, value = field.partition("=") if "=" in field else ("", "", field)
    if _SECRET.search(unquote(name)):
        return f"{name}=*"
    short = len(value) <= _PLAIN
    return field if short else f"{name}{equals}*{sha256(value.encode()).hexdigest()[:8]}"


def hide_credentials(text: str) -> str:
    """Return a text with every URL in it as `public_url` gives it; of a request's path, the query is dropped."""
    text = _REQUESTED.sub(lambda found: found.group().partition("?")[0], text)
    return _URL.sub(lambda found: public_url(found.group()), text)
