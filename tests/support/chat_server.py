"""A server of OpenAI's chat protocol that answers as a test says, over HTTP."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from tests.support.servers import serving

Body = dict[str, Any]
Fault = Literal["broken stream", "cut stream", "no json", "no chunk", "503", "429", "403", "400", "hang up"]
NAME = "known-judge"


class ChatServer:
    """Serves `NAME`; streams what `answer` returns for a request's body and its number, from 1, or fails as it raises.

    Attributes:
        asked: the bodies of all requests, in the order in which they came.
        keys: what they gave as their key.
    """

    def __init__(self, answer: Callable[[Body, int], str]) -> None:
        self.asked: list[Body] = []
        self.keys: list[str] = []
        self._lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat._lock:
                    chat.asked.append(body)
                    chat.keys.append(self.headers["Authorization"])
                    number = len(chat.asked)
                try:
                    self._stream(answer(body, number))
                except FaultError as error:
                    self._fail(error.fault)

            def do_GET(self) -> None:
                self._send(200, json.dumps({"object": "list", "data": [{"id": NAME, "object": "model"}]}))

            def _stream(self, text: str, whole: bool = True, missing: int = 0) -> None:
                pieces = [{"delta": {"content": piece}} for piece in (text[:5], text[5:])] if text else []
                ends = [{"delta": {}, "finish_reason": "stop"}]
                chunks: list[Body] = [{"choices": [{"index": 0} | each]} for each in (*pieces, *ends)]
                chunks.append({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})
                lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
                content = "".join([*lines, "data: [DONE]\n\n"] if whole else lines[:1])
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Content-Length", str(len(content.encode()) + missing))
                self.end_headers()
                self.wfile.write(content.encode())

            def _fail(self, fault: Fault) -> None:
                if fault == "broken stream":
                    self._stream("This answer breaks off", whole=False, missing=1000)
                elif fault == "cut stream":
                    self._stream("This answer breaks off", whole=False)
                elif fault == "no json":
                    self._send(200, "data: <html>It works!</html>\n\n", "text/event-stream")
                elif fault == "no chunk":
                    self._send(200, 'data: {"status": "ok"}\n\n', "text/event-stream")
                elif fault.isdigit():
                    self._send(int(fault), json.dumps({"error": {"message": "try later" if fault == "503" else "bad"}}))
                self.close_connection = True

            def _send(self, status: int, content: str, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Say nothing of clients that did not wait for their answer."""

        server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        self._serving = serving(server)

    def __enter__(self) -> "ChatServer":
        self._serving.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._serving.__exit__(*raised)


class FaultError(Exception):
    """What an `answer` raises to fail in a way."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault: Fault = fault
