"""Answers of a decoder that another server runs: vLLM with `--enable-prompt-embeds`.

With the decoder's embedding table, the whole prompt goes to `/v1/completions` as rows. Without it, a chat goes to
`/v1/chat/completions` with its vectors as parts, and the upstream writes its own chat template. An upstream that
refuses vectors gets the text of the documents.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from torch import Tensor

from arc_ds.inference.arc import ArcModel, Context
from arc_ds.inference.openai_client import ConnectionFault, connection_faults, open_session, refusal_of
from arc_ds.inference.prompt import Parts, with_vectors
from arc_ds.serving import prompts
from arc_ds.serving.engines import vllm_chat, vllm_completion
from arc_ds.serving.metrics import Metrics
from arc_ds.serving.protocol import Delta, Kind, Options, RequestError
from arc_ds.serving.settings import UpstreamSettings

logger = logging.getLogger(__name__)

FALLBACK_HEADER = "x-arc-fallback"
# An upstream that does not know `prompt_embeds`, or refuses them, answers with one of these.
_REFUSALS = frozenset((400, 404, 405, 413, 415, 422, 501))


class Question(NamedTuple):
    """A prompt in all forms that an upstream may take.

    segments: the decoder's sequence; None without the decoder's files.
    chat: the conversation; None for a completion.
    text: the prompt of a completion, with the documents' text, or its token ids; None if it came as rows.
    """

    segments: Parts | None
    chat: prompts.Chat | None = None
    text: str | Sequence[int] | None = ""


class Upstream:
    """A client of the upstream. Use it as an asynchronous context manager.

    model: compresses; its decoder, if it has one, embeds the text.
    """

    def __init__(self, settings: UpstreamSettings, model: ArcModel, decoder: int, metrics: Metrics) -> None:
        self._settings, self._model, self._decoder, self._metrics = settings, model, decoder, metrics
        self._warned = False

    async def __aenter__(self) -> Upstream:
        self._session = open_session(self._settings.api_key, self._settings.silence_s)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def answer(
        self, question: Question, vectors: Sequence[Tensor], options: Options
    ) -> tuple[AsyncIterator[Delta], str | None]:
        """Ask the upstream with vectors, and with text if it refuses them. Raises RequestError on its faults.

        Returns the answer in pieces, and why it was made from text, if it was.
        """
        if not vectors and question.segments is None:
            return await self._ask_with_text(question, options), None
        kind, body = await asyncio.to_thread(self._with_vectors, question, vectors, options)
        response = await self._post(kind, body)
        if response.status == 200:
            return self._deltas(kind, response, options), None
        reason = await self._fault_of(response)
        if response.status not in _REFUSALS or question.text is None:
            raise self._error(response, reason)
        deltas = await self._ask_with_text(question, options)
        self._metrics.fallbacks.inc()
        if not self._warned:
            self._warned = True
            logger.warning(
                f"the upstream {self._settings.base} refuses prompt embeddings (status {response.status}: {reason}), "
                "so it gets the documents' text. Start vLLM with --enable-prompt-embeds, with the decoder that the "
                "encoder was trained for."
            )
        return deltas, f"text; the upstream refused prompt embeddings with status {response.status}"

    def _with_vectors(
        self, question: Question, vectors: Sequence[Tensor], options: Options
    ) -> tuple[Kind, dict[str, Any]]:
        plain = self._options(options)
        if question.segments is not None:
            (rows_RD,) = self._model.prompt_embeds([with_vectors(question.segments, vectors)], self._decoder)
            stop_ids = list(self._model.decoder_stop_ids[self._decoder])
            return "completion", vllm_completion(rows_RD, self._settings.model, **plain, stop_token_ids=stop_ids)
        assert question.chat is not None, "a completion with documents needs the decoder's files"
        remaining = iter(vectors)
        messages = [
            {
                **message,
                "content": [next(remaining) if isinstance(part, Context) else part for part in message["content"]],
            }
            for message in prompts.chat_messages(question.chat)
        ]
        return "chat", vllm_chat(messages, self._settings.model, **plain)

    async def _ask_with_text(self, question: Question, options: Options) -> AsyncIterator[Delta]:
        body = {"model": self._settings.model, **self._options(options)}
        if question.chat is None:
            kind: Kind = "completion"
            body["prompt"] = question.text
        else:
            kind = "chat"
            body["messages"] = [
                {**message, "content": prompts.as_text(message["content"])}
                for message in prompts.chat_messages(question.chat)
            ]
        response = await self._post(kind, body)
        if response.status != 200:
            raise self._error(response, await self._fault_of(response))
        return self._deltas(kind, response, options)

    def _options(self, options: Options) -> dict[str, Any]:
        sampling = options.sampling
        return {
            "max_tokens": options.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            **({"stop": list(options.stop)} if options.stop else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _post(self, kind: Kind, body: dict[str, Any]) -> aiohttp.ClientResponse:
        path = "/chat/completions" if kind == "chat" else "/completions"
        async with self._faults():
            return await self._session.post(self._settings.base + path, json=body, allow_redirects=False)

    async def _deltas(self, kind: Kind, response: aiohttp.ClientResponse, options: Options) -> AsyncIterator[Delta]:
        """The pieces of a streamed answer. The last one is held back until the upstream has counted its tokens."""
        num_tokens, last, is_first = 0, None, options.skip_space
        try:
            async with self._faults():
                async for event in _events(response):
                    usage = event.get("usage")
                    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
                        num_tokens = usage["completion_tokens"]
                    if not event["choices"]:
                        continue
                    choice = event["choices"][0]
                    text = (choice["delta"].get("content") if kind == "chat" else choice["text"]) or ""
                    if is_first and text:
                        text, is_first = text.removeprefix(" "), False
                    num_tokens += bool(text) and not isinstance(usage, dict)
                    finish = choice.get("finish_reason")
                    if finish is not None:
                        last = Delta(text, num_tokens, "length" if finish == "length" else "stop")
                    else:
                        yield Delta(text, num_tokens)
            if last is None:
                raise self._nonsense("its answer ended before its end")
            yield last._replace(num_tokens=num_tokens)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, HttpProcessingError) as error:
            raise self._nonsense("its answer is not in OpenAI's format") from error
        finally:
            response.close()

    @asynccontextmanager
    async def _faults(self) -> AsyncIterator[None]:
        """Turn faults of the connection into answers for the client."""
        base = self._settings.base
        try:
            async with connection_faults():
                yield
        except ConnectionFault as fault:
            if fault.kind == "timeout":
                message = f"the upstream {base} was silent for too long; try again later"
                raise self._counted(fault.kind, message, status=504) from fault
            message = f"the connection to the upstream {base} broke ({fault}); try again"
            if fault.kind == "unreachable":
                message = (
                    f"the upstream {base} cannot be reached ({fault}). Start it, or start this server with its address "
                    "as --upstream."
                )
            raise self._counted(fault.kind, message) from fault

    async def _fault_of(self, response: aiohttp.ClientResponse) -> str:
        async with self._faults():
            return await refusal_of(response)

    def _error(self, response: aiohttp.ClientResponse, reason: str) -> RequestError:
        """The answer for the client to a status other than 200."""
        status, base = response.status, self._settings.base
        self._metrics.upstream_errors.labels(str(status)).inc()
        if status == 429:
            after = response.headers.get("retry-after", "")
            headers = {"retry-after": after if after.isascii() and after.isdigit() else "1"}
            return RequestError(429, f"the upstream is busy: {reason}", code="upstream_busy", headers=headers)
        if status in (400, 413, 422):
            return RequestError(400, f"the upstream refused the request: {reason}", code="upstream_refused")
        remedies = {
            401: "Start this server with its key as ARC_UPSTREAM_API_KEY.",
            403: "Start this server with its key as ARC_UPSTREAM_API_KEY.",
            404: f"Check --upstream and --upstream-model: {base}/models lists its models.",
        }
        remedy = remedies.get(status, "See its log.")
        return RequestError(502, f"the upstream {base} answered {status}: {reason}. {remedy}", code="upstream_error")

    def _nonsense(self, fault: str) -> RequestError:
        message = (
            f"the upstream {self._settings.base} does not speak OpenAI's API: {fault}. Check that --upstream is the "
            "address of a vLLM server."
        )
        return self._counted("nonsense", message)

    def _counted(self, fault: str, message: str, *, status: int = 502) -> RequestError:
        """The answer for the client to a fault of the upstream, which the metrics count."""
        self._metrics.upstream_errors.labels(fault).inc()
        return RequestError(status, message, code=f"upstream_{fault}")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an event stream, up to [DONE]. Raises ValueError on anything else."""
    async for line in response.content:
        line = line.strip()
        if not line or line.startswith((b":", b"event:", b"id:", b"retry:")):
            continue
        if not line.startswith(b"data:"):
            raise ValueError("not an event stream")
        payload = line[len(b"data:") :].strip()
        if payload == b"[DONE]":
            return
        event = json.loads(payload)
        if not isinstance(event, dict) or not isinstance(event.get("choices"), list):
            raise ValueError("an event without choices")
        yield event
