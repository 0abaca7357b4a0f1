"""A small HTTP server that answers completions by a script of faults, one entry for each request."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {"choices": [{"index": 0, "text": " yes", "finish_reason": "length"}], "usage": {"completion_tokens": 1}}
SLOW_S = 1.0


class FaultyCompletions:
    """The state of the server.

    script: faults of the next requests; "ok" after its end. An int is a status.
    bodies: the requests so far.
    most: largest number of requests that were open at once.
    answer_s: time for a good answer.
    """

    def __init__(self, script: Sequence[Any], answer_s: float = 0.0) -> None:
        self.script, self.answer_s = list(script), answer_s
        self.bodies: list[dict[str, Any]] = []
        self.most = self._open = 0
        self._lock = threading.Lock()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            fault = self.script.pop(0) if self.script else "ok"
            self.bodies.append(body)
            self._open += 1
            self.most = max(self.most, self._open)
        try:
            self._reply(handler, fault)
        finally:
            with self._lock:
                self._open -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, fault: Any) -> None:
        good = json.dumps(GOOD).encode()
        if isinstance(fault, int):
            error = json.dumps({"error": {"message": f"fault {fault}"}}).encode()
            _send(handler, fault, error, {"Retry-After": "0"})
        elif fault == "closed":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()  # a reset
        elif fault == "cut":
            _send(handler, 200, good[:20], {"Content-Length": str(len(good))})
        elif fault == "slow":
            time.sleep(SLOW_S)
            _send(handler, 200, good)
        elif fault == "html":
            _send(handler, 200, b"<html>Welcome</html>")
        elif isinstance(fault, dict):
            _send(handler, 200, json.dumps(fault).encode())
        else:
            time.sleep(self.answer_s)
            _send(handler, 200, good)


def _send(handler: BaseHTTPRequestHandler, status: int, raw: bytes, headers: dict[str, str] | None = None) -> None:
    try:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)
    except OSError:
        pass  # the client has hung up
    handler.close_connection = True


@contextmanager
def faulty_completions(*script: Any, answer_s: float = 0.0) -> Iterator[tuple[str, FaultyCompletions]]:
    """Run the server in a thread: (its address, its state)."""
    state = FaultyCompletions(script, answer_s)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.answer(self)

        def do_GET(self) -> None:
            _send(self, 404, b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
