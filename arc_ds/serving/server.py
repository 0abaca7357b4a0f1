"""Run the application until a signal stops it: running requests are finished, new ones get status 503."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from arc_ds.errors import ConfigError
from arc_ds.serving.app import ServerState, create_app
from arc_ds.serving.service import Service

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_WARN_S = 60.0


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address. Port 0 is a free one. Raises ConfigError if another program has it."""
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
        self._warned_at = -_WARN_S
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
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets running requests finish, the second one does not."""
        if self._state.is_stopping:
            self.should_exit = True
            self.config.timeout_graceful_shutdown = 0
        self._state.is_stopping = True

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Warn once a minute that no file is left for a connection. asyncio logs thousands of errors a second."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._warned_at > _WARN_S:
            self._warned_at = time.monotonic()
            logger.warning(
                f"clients wait: this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files, and "
                "connections hold all of them. Raise the limit (ulimit -n), or limit connections in a proxy."
            )

    async def on_tick(self, counter: int) -> bool:
        if self._state.is_stopping and not self.should_exit:
            if self._stop_at is None:
                self._stop_at = time.monotonic() + self._grace_s
                logger.info(f"stopping: {self._state.running} requests are finished first")
            self.should_exit = self._state.running == 0 or time.monotonic() > self._stop_at
        return await super().on_tick(counter)
