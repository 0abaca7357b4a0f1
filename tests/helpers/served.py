"""A server of this process, in a thread, and small clients for it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvicorn

from arc_ds import ArcModel
from arc_ds.data.tasks.chat import PLAIN, Layout
from arc_ds.serving.server import Server, listen
from arc_ds.serving.service import Service
from arc_ds.serving.settings import Settings, UpstreamSettings
from tests.helpers.waiting import LIMIT_S, wait_for


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def text(self) -> str:
        """The text of an answer."""
        choice = self.json["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"]

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclass
class Served:
    """A running server. `url` has no /v1."""

    url: str
    service: Service
    server: Server

    def ask(self, path: str, body: Any = None, **headers: str) -> Reply:
        return ask(self.url, path, body, **headers)

    def metric(self, name: str, **labels: str) -> float:
        """A value of the metrics; 0.0 before its first use."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


def ask(url: str, path: str, body: Any = None, **headers: str) -> Reply:
    """POST a body (JSON unless it is bytes), or GET without one."""
    raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LIMIT_S)
    try:
        connection.request(
            "GET" if raw is None else "POST", path, raw, {k.replace("_", "-"): v for k, v in headers.items()}
        )
        answer = connection.getresponse()
        return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


@contextmanager
def running(server: uvicorn.Server) -> Iterator[str]:
    """Run a uvicorn server in a thread; its address, without /v1."""
    with listen("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
        server.should_exit = True
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "the server does not stop"


@contextmanager
def served(
    model: ArcModel,
    *,
    layout: Layout = PLAIN,
    upstream: UpstreamSettings | None = None,
    decoder: int = 0,
    **settings: Any,
) -> Iterator[Served]:
    """Serve a model. `settings` replace fields of `Settings`."""
    service = Service(model, decoder, layout, "cont", Settings(**settings), upstream)
    server = Server(service)
    with running(server) as url:
        yield Served(url, service, server)
