"""Where a server listens, and by which names it may be asked.

A page of anybody's can let its own name lead to 127.0.0.1 (DNS rebinding), and its script then asks a server there as
one of its own origin, which CORS does not forbid. The Host header tells: it has the name that the page was opened by.
"""

import socket
from collections.abc import Collection

from nemo_cpt.errors import CptError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
ALL_ADDRESSES = ("0.0.0.0", "::")


def names_to_answer(host: str, allowed: Collection[str]) -> frozenset[str] | None:
    """The names that requests may go by; None for every name.

    On all addresses a machine has names that it does not know of itself, and there requests carry a key, which no
    stranger's page has.

    Args:
        host: the address that the server listens on.
        allowed: further names.
    """
    if host in ALL_ADDRESSES and not allowed:
        return None
    return frozenset(name_of(each) for each in (*LOCAL_HOSTS, host, *allowed))


def name_of(host: str) -> str:
    """The name or the address in a Host header, which may bring a port along: `[::1]:8000`, `Example.org.`."""
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host if host.count(":") > 1 else host.partition(":")[0]  # an address of IPv6 without brackets
    return name.lower().removesuffix(".")


def listen(host: str, port: int, cure: str) -> socket.socket:
    """A socket that listens, before a model is loaded: a port in use is known at once.

    Args:
        host: an address or a name.
        port: 0 takes a free one.
        cure: what a message says to do where that cannot be had.

    Raises:
        CptError: it cannot.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    # Else a server that was just ended keeps its port busy for a minute.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # of two that are only bound, the second would not know until it has loaded its model
    except OSError as error:
        raise CptError(f"cannot listen on {host}:{port} ({error.strerror}): {cure}") from None
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """The base URL of the API behind a socket."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
