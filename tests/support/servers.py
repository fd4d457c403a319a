"""HTTP servers on this machine, for as long as a test needs them."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from typing import TypeVar

Server = TypeVar("Server", bound=HTTPServer)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Let a server answer, in a thread of its own, until the block ends."""
    # Its end waits for one interval: of the default half a second, hundreds of tests are minutes.
    options = {"poll_interval": 0.01}
    with server:
        threading.Thread(target=server.serve_forever, kwargs=options, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
            # The hub's client keeps its connections, one session a thread that ever asked; none comes here again.
            if hub := sys.modules.get("huggingface_hub"):
                hub.utils.reset_sessions()
