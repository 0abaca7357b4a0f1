"""The client side of OpenAI's API, for any caller: sessions, faults of a connection, and a server's own words."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import aiohttp

_LINE_BYTES = 1 << 20
_CONNECT_S = 10.0
_ERROR_BYTES = 1 << 16


class ConnectionFault(Exception):
    """A connection to a server that failed. `str` gives the reason in a few words.

    kind: "timeout" if the server was silent for too long, "unreachable" if nothing listens, "broken" if it hung up.
    """

    def __init__(self, kind: Literal["timeout", "unreachable", "broken"], reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def open_session(api_key: str | None, silence_s: float) -> aiohttp.ClientSession:
    """A session without a limit on connections. Call it in a running event loop, and close it there.

    api_key: sent with each request; None: no key.
    silence_s: longest time without a byte from the server.
    """
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=silence_s),
        headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
        read_bufsize=_LINE_BYTES,
        connector=aiohttp.TCPConnector(limit=0),
    )


@asynccontextmanager
async def connection_faults() -> AsyncIterator[None]:
    """Turn aiohttp's errors into ConnectionFault."""
    try:
        yield
    except asyncio.TimeoutError as error:
        raise ConnectionFault("timeout", "it was silent for too long") from error
    except aiohttp.ClientConnectorError as error:
        raise ConnectionFault("unreachable", f"{error.os_error.strerror or error.os_error}") from error
    except aiohttp.ClientError as error:
        raise ConnectionFault("broken", type(error).__name__) from error


async def refusal_of(response: aiohttp.ClientResponse) -> str:
    """The server's own words about a refused request, in one line. Closes the response. Raises ConnectionFault."""
    try:
        async with connection_faults():
            raw = await response.content.read(_ERROR_BYTES)
    finally:
        response.close()
    try:
        plain = json.loads(raw)
        words = plain.get("error", plain).get("message", "")
    except (ValueError, AttributeError):
        words = raw.decode("utf-8", "replace")
    return " ".join(str(words).split())[:300]
