"""A client for many prompts to one server of OpenAI's Completions API: vLLM, `arc-ds serve`, or another one.

A bounded number of requests is in flight. The client retries a request after a temporary fault. Any other fault is an
error.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import aiohttp

from arc_ds.errors import ServerError
from arc_ds.inference.openai_client import ConnectionFault, connection_faults, open_session, refusal_of
from arc_ds.system.urls import api_base

logger = logging.getLogger(__name__)

T = TypeVar("T")
_TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504))
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_WARN_EVERY_S = 30.0
_AGAIN = "The finished batches are kept: start the same command again."

MakeBody = Callable[[], dict[str, Any]]


class RefusedError(ServerError):
    """A request that the server refuses, whenever it is sent.

    status: HTTP status of the refusal.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Transient(Exception):
    """A fault that may pass. `wait_s`: the time that the server asks for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True)
class ServerIdentity:
    """A server's description of itself.

    name: owner of the model in its list of models, such as "vllm"; "unknown" if it has no list.
    version: None if it does not say.
    model: name of the model.
    root: path or name of the model's files, if it says so.
    max_rows: longest prompt plus answer, if it says so.
    """

    name: str
    version: str | None
    model: str
    root: str | None = None
    max_rows: int | None = None


class _Connection(NamedTuple):
    """The state that requests in one event loop share. `free` has a permit for each further request in flight."""

    session: aiohttp.ClientSession
    free: asyncio.Semaphore


class CompletionsServer:
    """A client of one server. Threads may share it.

    Used as a context manager, it keeps its connections until the block ends, which also ends the requests of other
    threads. Outside a block, each call opens its own connections.

    url: address of the server, with or without /v1.
    api_key: None for no key.
    in_flight: maximum number of requests that are being answered.
    timeout_s: longest time for an answer.
    retry_s: time for which a failing request is repeated.
    """

    def __init__(
        self, url: str, *, api_key: str | None, in_flight: int, timeout_s: float = 600.0, retry_s: float = 120.0
    ) -> None:
        self.base = api_base(url)
        self.in_flight = in_flight
        self._api_key, self._timeout_s, self._retry_s = api_key, timeout_s, retry_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_ended = False
        self._lock = threading.Lock()
        self._warned_at = -_WARN_EVERY_S

    def __enter__(self) -> CompletionsServer:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="completions", daemon=True)
        self._thread.start()
        self._connection = asyncio.run_coroutine_threadsafe(self._connect(), loop).result()
        self._loop, self._has_ended = loop, False
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None, "the block has begun"
        with self._lock:
            self._has_ended = True
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = None

    async def _connect(self) -> _Connection:
        return _Connection(open_session(self._api_key, self._timeout_s), asyncio.Semaphore(self.in_flight))

    async def _disconnect(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._connection.session.close()

    def _run(self, work: Callable[[_Connection], Coroutine[Any, Any, T]]) -> T:
        with self._lock:  # work that comes after `__exit__` has begun would never end
            is_alone = self._loop is None and not self._has_ended
            if not is_alone:
                if self._has_ended or self._loop is None:
                    raise ServerError(f"the requests to {self.base} were ended")
                future = asyncio.run_coroutine_threadsafe(work(self._connection), self._loop)
        if is_alone:
            return asyncio.run(self._alone(work))
        try:
            return future.result()
        except CancelledError as error:
            raise ServerError(f"the requests to {self.base} were ended") from error

    async def _alone(self, work: Callable[[_Connection], Coroutine[Any, Any, T]]) -> T:
        connection = await self._connect()
        try:
            return await work(connection)
        finally:
            await connection.session.close()

    def identify(self, model: str | None) -> ServerIdentity:
        """Ask for the server's name, version and models. Does not wait for a server that is down.

        model: the wanted one; None: the only one that the server has.

        Raises ServerError if the server cannot be reached, does not have the model, or if no model is named and it has
        several.
        """
        return self._run(lambda connection: self._identify(connection.session, model))

    async def _identify(self, session: aiohttp.ClientSession, model: str | None) -> ServerIdentity:
        models = await self._get(session, f"{self.base}/models")
        version = await self._get(session, f"{self.base.removesuffix('/v1')}/version")  # vLLM's, not OpenAI's
        version_text = version.get("version") if isinstance(version, dict) else None
        data = models.get("data") if isinstance(models, dict) else None
        listed = {each["id"]: each for each in data or () if isinstance(each, dict) and isinstance(each.get("id"), str)}
        if model is None:
            if len(listed) != 1:
                names = ", ".join(sorted(listed)) or "none"
                raise ServerError(f"{self.base} lists the models {names}. Set `server.model` to the wanted one.")
            (model,) = listed
        if data is not None and model not in listed:
            raise ServerError(
                f"{self.base} has no model {model!r}; it has {', '.join(sorted(listed)) or 'none'}. Set `server.model`."
            )
        entry = listed.get(model, {})
        limit = entry.get("max_model_len")
        return ServerIdentity(
            name=str(entry.get("owned_by", "unknown")),
            version=None if version_text is None else str(version_text),
            model=model,
            root=None if entry.get("root") is None else str(entry["root"]),
            max_rows=limit if isinstance(limit, int) and limit > 0 else None,
        )

    async def _get(self, session: aiohttp.ClientSession, url: str) -> Any:
        """The JSON at an address; None if the server has no such path, or no JSON there."""
        try:
            async with connection_faults():
                response = await session.get(url, allow_redirects=False)
                raw = await response.read()
        except ConnectionFault as fault:
            raise ServerError(
                f"the server {self.base} cannot be reached ({fault}). Start it, or correct `server.url`."
            ) from fault
        if response.status in (401, 403):
            raise self._refused(response.status, "it wants a key")
        if response.status in _TRANSIENT and url.endswith("/models"):
            raise ServerError(f"the server {self.base} answered {response.status}. Wait until it has loaded its model.")
        try:
            return json.loads(raw) if response.status == 200 else None
        except ValueError:
            return None

    def complete(self, make_bodies: Sequence[MakeBody], *, refusals: Collection[int] = ()) -> list[dict[str, Any]]:
        """Send requests to `/completions`. Returns their answers in the same order.

        make_bodies: each makes the body of a request as soon as it can be sent.
        refusals: further statuses that are not retried.

        Raises RefusedError if the server refuses a request, and ServerError if it has not answered one for `retry_s`
        or does not speak OpenAI's API. The other requests are ended then.
        """

        async def all_of_them(connection: _Connection) -> list[dict[str, Any]]:
            tasks = [asyncio.ensure_future(self._ask(connection, each, refusals)) for each in make_bodies]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self._run(all_of_them)

    async def _ask(self, connection: _Connection, make_body: MakeBody, refusals: Collection[int]) -> dict[str, Any]:
        async with connection.free:
            raw = await asyncio.to_thread(lambda: json.dumps(make_body()).encode())
            first_fault: float | None = None
            num_faults = 0
            while True:
                try:
                    return await self._post(connection.session, raw, refusals)
                except _Transient as fault:
                    now = time.monotonic()
                    first_fault = now if first_fault is None else first_fault
                    wait_s = min(_FIRST_WAIT_S * 2**num_faults, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
                    wait_s, num_faults = max(wait_s, fault.wait_s), num_faults + 1
                    if now + wait_s > first_fault + self._retry_s:
                        raise ServerError(
                            f"the server {self.base} {fault}; a request failed {num_faults} times in "
                            f"{now - first_fault:.0f} s (`server.retry_s`). See its log. {_AGAIN}"
                        ) from fault
                    self._warn(f"the server {self.base} {fault}; the request is sent again in {wait_s:.1f} s")
                await asyncio.sleep(wait_s)

    async def _post(self, session: aiohttp.ClientSession, raw: bytes, refusals: Collection[int]) -> dict[str, Any]:
        headers = {"content-type": "application/json"}
        try:
            async with connection_faults():
                response = await session.post(
                    f"{self.base}/completions", data=raw, headers=headers, allow_redirects=False
                )
                body = await response.read() if response.status == 200 else b""
            words = "" if response.status == 200 else await refusal_of(response)
        except ConnectionFault as fault:
            words = {"timeout": "gave no answer in time", "unreachable": f"cannot be reached ({fault})"}.get(
                fault.kind, f"closed the connection ({fault})"
            )
            raise _Transient(words) from fault
        if response.status in _TRANSIENT and response.status not in refusals:
            after = response.headers.get("retry-after", "")
            wait_s = float(after) if after.isascii() and after.isdigit() else 0.0
            raise _Transient(f"answered {response.status}: {words}", wait_s)
        if response.status != 200:
            raise self._refused(response.status, words)
        try:
            plain = json.loads(body)
        except ValueError as error:
            raise self.nonsense("its answer is not JSON") from error
        if not isinstance(plain, dict):
            raise self.nonsense("its answer is no JSON object")
        return plain

    def nonsense(self, fault: str) -> ServerError:
        """The error for an answer that is not in OpenAI's format."""
        return ServerError(
            f"the server {self.base} does not speak OpenAI's Completions API: {fault}. Correct `server.url`."
        )

    def _refused(self, status: int, words: str) -> RefusedError:
        remedies = {
            401: "Put its key into the variable that `server.api_key_env` names.",
            403: "Put its key into the variable that `server.api_key_env` names.",
            404: f"Check `server.model`: {self.base}/models lists the names.",
            413: "Raise its limit of a request's size (arc-ds serve: --max-body-mib).",
        }
        message = f"the server {self.base} answered {status}: {words.rstrip('.')}. {remedies.get(status, '')}"
        return RefusedError(status, message.rstrip())

    def _warn(self, message: str) -> None:
        if time.monotonic() - self._warned_at > _WARN_EVERY_S:
            self._warned_at = time.monotonic()
            logger.warning(message)
