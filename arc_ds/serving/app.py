"""The HTTP side of the server: routes, limits of bodies, keys, hang-ups, streams and errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arc_ds.serving.protocol import Delta, Frame, Kind, RequestError, queue_full, to_json
from arc_ds.serving.service import Reply, Service
from arc_ds.serving.settings import Settings
from arc_ds.serving.upstream import FALLBACK_HEADER
from arc_ds.version import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T")
_PATHS = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/compress", "/v1/models", "/version", "/health", "/metrics")
)
_DRAINED_BODIES = 8  # bodies beyond the limit are read up to this multiple, so that the client reads the answer
_BODY_S = 60.0
_STOPPING = RequestError(503, "the server is stopping; ask another one", code="stopping", headers={"retry-after": "5"})


class ServerState:
    """The state that the requests of a server share.

    is_stopping: whether new requests are refused. A signal sets it.
    running: number of requests that are being answered.
    body_bytes: bytes of the bodies in memory.
    """

    def __init__(self) -> None:
        self.is_stopping = False
        self.running = 0
        self.body_bytes = 0


def create_app(service: Service, state: ServerState) -> FastAPI:
    """The application. It opens and closes the service with its own life."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service:
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    settings = service.settings

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _generate("chat", request, service, state)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _generate("completion", request, service, state)

    @app.post("/v1/compress")
    async def compress(request: Request) -> Response:
        with closing(_Patience(request, settings)) as wait:
            with _Body(request, settings, state) as body:
                raw = await wait(body.read())
                wait.watch()
                contexts = await wait(asyncio.to_thread(service.read_documents, raw))
            tensors = await wait(service.compress(contexts))
        headers = {"x-arc-encoder-tokens": str(sum(len(context.ids) for context in contexts))}
        return Response(tensors, media_type="application/octet-stream", headers=headers)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [entry]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != settings.name:
            raise RequestError(404, f"the model {name!r} does not exist here", param="model", code="model_not_found")
        return _json(entry)

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok", "model": settings.name})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        message = f"{error.detail}: {request.method} {request.url.path}. The paths are {', '.join(sorted(_PATHS))}."
        return _refusal(RequestError(error.status_code, message, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=408)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _refusal(RequestError(500, "the server failed to answer; its log has the reason"))

    entry = {
        "id": settings.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "arc-ds",
        "max_model_len": service.max_rows,
    }
    app.add_middleware(_Gate, service=service, state=state)
    return app


class _Gate:
    """Counts requests, and refuses those without the key and those that come while the server stops."""

    def __init__(self, app: ASGIApp, service: Service, state: ServerState) -> None:
        self._app, self._service, self._state = app, service, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, path = self._service.metrics, scope["path"]
        label = path if path in _PATHS else "other"
        started, status, is_begun, is_stuck = time.monotonic(), 500, False, False

        async def count(message: Message) -> None:
            nonlocal status, is_begun, is_stuck
            if message["type"] == "http.response.start":
                status, is_begun = message["status"], True
            try:
                await asyncio.wait_for(send(message), self._service.settings.timeout_s)
            except asyncio.TimeoutError:
                is_stuck = True
                raise

        error = self._error(scope)
        self._state.running += 1
        metrics.running.inc()
        try:
            if error is not None:
                await _refusal(error)(scope, receive, count)
            else:
                await self._app(scope, receive, count)
        except Exception:
            if not is_stuck:
                raise
            logger.warning(f"{path}: a client did not read its answer for {self._service.settings.timeout_s:g} s")
        except asyncio.CancelledError:
            if not self._state.is_stopping:
                raise
            if not is_begun:
                await _refusal(_STOPPING)(scope, receive, count)
        finally:
            self._state.running -= 1
            metrics.running.dec()
            metrics.requests.labels(label, str(status)).inc()
            metrics.seconds.labels(label).observe(time.monotonic() - started)

    def _error(self, scope: Scope) -> RequestError | None:
        key, path = self._service.settings.api_key, scope["path"]
        if key is not None and path != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                message = "the API key is missing or wrong: send the header `Authorization: Bearer KEY`"
                return RequestError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if self._state.is_stopping and path != "/metrics":
            return _STOPPING
        return None


class _Patience:
    """Waits for work on behalf of a request, until the client hangs up or its time is over.

    Raises ClientDisconnect, or RequestError with status 504. The work is cancelled then.
    """

    def __init__(self, request: Request, settings: Settings) -> None:
        self._request, self._settings = request, settings
        self._deadline = time.monotonic() + settings.timeout_s
        self._gone: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Notice from now on if the client hangs up. Its body must have been read."""
        self._gone = asyncio.create_task(self._hang_up())

    def close(self) -> None:
        if self._gone is not None:
            self._gone.cancel()

    async def __call__(self, work: Awaitable[T]) -> T:
        task = asyncio.ensure_future(work)
        watched: set[asyncio.Future[Any]] = {task} if self._gone is None else {task, self._gone}
        try:
            left = max(self._deadline - time.monotonic(), 0)
            await asyncio.wait(watched, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._gone is not None and self._gone.done():
                raise ClientDisconnect
            message = f"the request took longer than {self._settings.timeout_s:g} s. Ask for fewer tokens or try again."
            raise RequestError(504, message, code="timeout")
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _hang_up(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


class _Body:
    """The body of a request. It counts its bytes in the state of the server while the block is open."""

    def __init__(self, request: Request, settings: Settings, state: ServerState) -> None:
        self._request, self._settings, self._state = request, settings, state
        self._kept = 0

    def __enter__(self) -> _Body:
        return self

    def __exit__(self, *_: object) -> None:
        self._state.body_bytes -= self._kept

    async def read(self) -> bytes:
        """All of it. Raises RequestError if it is too large or comes too slowly, or if too many others are read."""
        limit = self._settings.body_bytes
        try:
            size, chunks = await asyncio.wait_for(self._read(), _BODY_S)
        except asyncio.TimeoutError as error:
            headers = {"connection": "close"}
            raise RequestError(408, f"the body did not arrive within {_BODY_S:g} s", headers=headers) from error
        if size > limit:
            message = (
                f"the body has more than {limit} bytes, the limit of this server (--max-body-mib). Send less at once."
            )
            raise RequestError(413, message, code="body_too_large", headers={"connection": "close"})
        if self._kept < size:
            raise queue_full("the server reads too many bodies at this time; try again")
        return b"".join(chunks)

    async def _read(self) -> tuple[int, list[bytes]]:
        """Size of the body, and its chunks. Those of a body that is refused are dropped."""
        size, chunks = 0, list[bytes]()
        settings, is_refused = self._settings, False
        async for chunk in self._request.stream():
            size += len(chunk)
            is_full = self._state.body_bytes + len(chunk) > settings.all_body_bytes
            is_refused = is_refused or is_full or size > settings.body_bytes
            if is_refused:
                chunks.clear()
                self._keep(-self._kept)
            else:
                chunks.append(chunk)
                self._keep(len(chunk))
            if size > _DRAINED_BODIES * settings.body_bytes:
                break
        return size, chunks

    def _keep(self, num_bytes: int) -> None:
        self._kept += num_bytes
        self._state.body_bytes += num_bytes


async def _generate(kind: Kind, request: Request, service: Service, state: ServerState) -> Response:
    started = time.monotonic()
    wait = _Patience(request, service.settings)
    is_handed_over = False
    try:
        with _Body(request, service.settings, state) as body:
            raw = await wait(body.read())
            wait.watch()
            asked = await wait(asyncio.to_thread(service.read, kind, raw))
        del raw
        reply = await wait(service.reply(asked))
        # The first piece decides about the status, so it comes before the headers.
        first = await wait(anext(reply.deltas))
        service.metrics.first_token.observe(time.monotonic() - started)
        frame = Frame(kind=kind, model=service.settings.name)
        headers = {} if reply.fallback is None else {FALLBACK_HEADER: reply.fallback}
        if asked.is_stream:
            events = _events(frame, reply, first, wait, with_usage=asked.with_usage)
            is_handed_over = True
            headers["cache-control"] = "no-store"
            return _Stream(events, media_type="text/event-stream", headers=headers)
        texts, last = [first.text], first
        while last.finish is None:
            last = await wait(anext(reply.deltas))
            texts.append(last.text)
        usage = replace(reply.usage, completion_tokens=last.num_tokens)
        ids = last.ids if asked.with_ids else None
        return _json(frame.answer("".join(texts), last.finish, usage, ids), headers=headers)
    finally:
        if not is_handed_over:
            wait.close()


class _Stream(StreamingResponse):
    """A stream that ends its generator, and so the work for it, as soon as nobody reads any more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]  # it is an asynchronous generator


async def _events(frame: Frame, reply: Reply, first: Delta, wait: _Patience, *, with_usage: bool) -> AsyncIterator[str]:
    """An answer as server-sent events. A fault after the beginning is an event, because the status is sent already."""
    delta, is_first = first, True
    try:
        while True:
            if delta.text or is_first or delta.finish is not None:
                # OpenAI's last event of an answer has a reason and no text.
                if delta.text or is_first:
                    yield _event(frame.chunk(delta.text, None, is_first=is_first))
                is_first = False
                if delta.finish is not None:
                    break
            delta = await wait(anext(reply.deltas))
        yield _event(frame.chunk("", delta.finish, is_first=False))
        if with_usage:
            yield _event(frame.usage_chunk(replace(reply.usage, completion_tokens=delta.num_tokens)))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.body)
    except ClientDisconnect:
        return
    finally:
        wait.close()
        await reply.deltas.aclose()  # type: ignore[attr-defined]  # they are asynchronous generators


def _event(plain: dict[str, Any]) -> str:
    return f"data: {to_json(plain)}\n\n"


def _json(plain: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(plain), status_code=status, media_type="application/json", headers=headers)


def _refusal(error: RequestError) -> Response:
    return _json(error.body, error.status, error.headers)
