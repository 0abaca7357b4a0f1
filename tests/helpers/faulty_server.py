"""A web server for a folder, with faults on demand."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Kind = Literal["cut", "stall", "flip", "401", "403", "404", "410", "429", "500"]


class FaultyServer:
    """The settings and statistics of the server.

    faults: for a path suffix, the kind of fault and its number of occurrences.
    requests: number of requests for each file.
    delay_s: delay before each answer.
    """

    def __init__(self) -> None:
        self.faults: dict[str, tuple[Kind, int]] = {}
        self.requests: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.delay_s = 0.0
        self.url = ""
        self._lock = threading.Lock()

    def next_fault(self, path: str) -> Kind | None:
        """Count a request and return its fault, if any."""
        with self._lock:
            self.requests[path.rpartition("/")[2]] += 1
            for end, (kind, left) in self.faults.items():
                if path.endswith(end) and left > 0:
                    self.faults[end] = kind, left - 1
                    return kind
        return None


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: object, state: FaultyServer, **kwargs: object) -> None:
        self.state = state
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.state.headers.append(dict(self.headers))
        path = self.path.partition("?")[0]
        fault = self.state.next_fault(path)
        time.sleep(self.state.delay_s)
        if fault is not None and fault.isdigit():
            self.send_error(int(fault))
            return
        if fault is None:
            super().do_GET()
            return
        body = Path(self.translate_path(path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "flip":
            body = body[:600] + bytes([body[600] ^ 1]) + body[601:]
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.connection.recv(1)  # until the client gives up

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    """Serve a folder on a free port of this host."""
    state = FaultyServer()
    handler = partial(_Handler, state=state, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
