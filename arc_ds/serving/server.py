"""Run the application until a signal stops it: running requests are finished, new ones get status 503."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from arc_ds.errors import ConfigError
from arc_ds.serving.app import ServerState, create_app
from arc_ds.serving.service import Service

logger = logging.getLogger(__name__)

_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address. Port 0 takes a free one. Raises ConfigError if the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(_BACKLOG)  # connections that come before the model is served wait
    except (OSError, OverflowError) as error:
        opened.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"the server cannot listen on {host}, port {port}: {reason}. Give another --port (0 takes a free one) or "
            "an address of this host as --host."
        ) from error
    return opened


class Server(uvicorn.Server):
    """uvicorn, which waits for running requests before it stops listening.

    on_start: called when signals are handled and requests are answered.
    """

    def __init__(self, service: Service, on_start: Callable[[], None] = lambda: None) -> None:
        self._on_start = on_start
        self._state = ServerState()
        self._grace_s = service.settings.grace_s
        self._stop_at: float | None = None
        config = uvicorn.Config(
            create_app(service, self._state),
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running requests finish, the second one does not."""
        if self._state.is_stopping:
            self.should_exit = True
        self._state.is_stopping = True

    async def on_tick(self, counter: int) -> bool:
        if self._state.is_stopping and not self.should_exit:
            if self._stop_at is None:
                self._stop_at = time.monotonic() + self._grace_s
                logger.info(f"stopping: {self._state.running} requests are finished first")
            self.should_exit = self._state.running == 0 or time.monotonic() > self._stop_at
        return await super().on_tick(counter)
