"""A small vLLM: it decodes prompt embeddings as vLLM does, and runs the decoder of a tiny model on them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from arc_ds import ArcModel
from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from tests.helpers.generation import generate_ids
from tests.helpers.served import running
from tests.helpers.vllm_wire import decode_prompt_embeds

Behaviour = Callable[[dict[str, Any]], Response | None]


class FakeVllm:
    """Answers of an upstream.

    model: its decoder.
    takes_embeddings: whether it runs with --enable-prompt-embeds.
    names_tokens: whether it knows vLLM's additions to OpenAI's API: ids, log probabilities and stops of an answer.
    behaviour: returns an answer in place of the usual one, or None.
    max_rows: its --max-model-len.
    bodies: the requests so far.
    """

    def __init__(
        self,
        model: ArcModel,
        *,
        takes_embeddings: bool = True,
        names_tokens: bool = True,
        behaviour: Behaviour | None = None,
        max_rows: int = 4096,
    ) -> None:
        self.model, self.takes_embeddings, self.behaviour = model, takes_embeddings, behaviour
        self.names_tokens, self.max_rows = names_tokens, max_rows
        self.bodies: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.post("/v1/completions", response_model=None)(self.completions)
        self.app.post("/v1/chat/completions", response_model=None)(self.chat)
        self.app.get("/v1/models")(self.models)
        self.app.get("/version")(lambda: {"version": "0.1.2"})

    def models(self) -> dict[str, Any]:
        entry = {"id": "decoder", "owned_by": "vllm", "root": "/models/decoder", "max_model_len": self.max_rows}
        return {"object": "list", "data": [entry]}

    async def completions(self, request: Request) -> Response:
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        if "prompt_embeds" not in body:
            rows = self._embedded(body["prompt"])
        else:
            rows = decode_prompt_embeds(body["prompt_embeds"], self.model.decoders[0].hidden_size)
        return self._stream(body, rows, lambda text: {"text": text})

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        rows: list[Tensor] = []
        for message in body["messages"]:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    rows.append(self._embedded(part["text"])[1:])
                else:
                    rows.append(decode_prompt_embeds(part["data"], self.model.decoders[0].hidden_size))
        return self._stream(body, torch.cat(rows), lambda text: {"delta": {"content": text}})

    async def _body(self, request: Request) -> dict[str, Any] | Response:
        body = await request.json()
        self.bodies.append(body)
        if not self.takes_embeddings and "prompt_embeds" in json.dumps(body):
            message = "You must set `--enable-prompt-embeds` to input `prompt_embeds`."
            error = {"message": message, "type": "BadRequestError", "param": "prompt_embeds", "code": 400}
            return JSONResponse({"error": error}, 400)
        answer = None if self.behaviour is None else self.behaviour(body)
        return body if answer is None else answer

    def _embedded(self, text: str | list[int]) -> Tensor:
        (rows,) = self.model.prompt_embeds([text if isinstance(text, str) else [Segment.text(text)]])
        return rows

    def _whole(self, body: dict[str, Any], rows: Tensor, ids: list[int]) -> Response:
        """An answer that is not streamed. As in vLLM, it names the token that ended it, but not the text."""
        decode, stops = self.model.decoder_tokenizers[0].decode, body.get("stop", [])
        kept = next((n for n in range(len(ids) + 1) if any(stop in decode(ids[:n]) for stop in stops)), None)
        reason: str | int | None = None
        finish, named = "length", ids
        if kept is not None:
            named, finish = ids[:kept], "stop"
            reason = next(stop for stop in stops if stop in decode(named))
        elif len(ids) < body["max_tokens"]:
            finish, reason = "stop", body["stop_token_ids"][0]
            named = [*ids, body["stop_token_ids"][0]]
        text = decode(ids if kept is None else named)
        for stop in stops:
            text = text.split(stop)[0]
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
        if self.names_tokens:
            choice |= {"stop_reason": reason, "token_ids": named if body.get("return_token_ids") else None}
            if body.get("prompt_logprobs") is not None:
                entries = [{str(idx): {"logprob": value}} for idx, value in self._logprobs(body["prompt"])]
                choice["prompt_logprobs"] = [None, *entries]
        if body.get("echo"):
            values = [value for _, value in self._logprobs(body["prompt"])]
            choice["logprobs"] = {"token_logprobs": [None, *values, -1.0]}
        usage = {"prompt_tokens": len(rows), "completion_tokens": len(named if self.names_tokens else ids[:kept])}
        return JSONResponse({"model": body["model"], "choices": [choice], "usage": usage})

    def _logprobs(self, ids: list[int]) -> list[tuple[int, float]]:
        """Each token of a prompt but the first one, with its log probability."""
        (logits,) = self.model.logits([[Segment.text(ids)]])
        values = torch.log_softmax(logits, dim=-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return list(zip(ids[1:], values.tolist(), strict=True))

    def _stream(self, body: dict[str, Any], rows: Tensor, choice: Callable[[str], dict[str, Any]]) -> Response:
        ids = continue_rows(self.model, rows, body["max_tokens"], body.get("stop_token_ids", []))
        if not body["stream"]:
            return self._whole(body, rows, ids)
        tokenizer = self.model.decoder_tokenizers[0]
        text = tokenizer.decode(ids)
        for stop in body.get("stop", []):
            text = text.split(stop)[0]
        pieces = [text[start : start + 5] for start in range(0, len(text), 5)]
        usage = {"prompt_tokens": len(rows), "completion_tokens": len(ids), "total_tokens": len(rows) + len(ids)}

        async def events() -> AsyncIterator[str]:
            for piece in pieces:
                yield _event({"choices": [{"index": 0, **choice(piece), "finish_reason": None}]})
                await asyncio.sleep(0)
            yield _event({"choices": [{"index": 0, **choice(""), "finish_reason": "length"}]})
            yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def continue_rows(model: ArcModel, rows: Tensor, max_tokens: int, stop_ids: list[int]) -> list[int]:
    """Greedy tokens after rows: the decoder of the model, with the rows in place of its embeddings."""
    sample = Sample("rows", (Segment.context([0] * len(rows), None),))
    batch = pack([sample], PoolingSpec((), 0))
    (ids,) = generate_ids(model.decoders[0], batch, rows, max_new_tokens=max_tokens, stop_ids=stop_ids)
    return ids


@contextmanager
def serving(fake: FakeVllm) -> Iterator[str]:
    """Run the upstream in a thread; its address."""
    with running(uvicorn.Server(uvicorn.Config(fake.app, log_config=None, lifespan="off"))) as url:
        yield url


def _event(plain: dict[str, Any]) -> str:
    return f"data: {json.dumps(plain)}\n\n"
