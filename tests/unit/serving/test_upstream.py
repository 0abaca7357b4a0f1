"""A decoder that runs upstream: vectors reproduce its answer, and each fault of the upstream is one clear error."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from arc_ds import ArcModel, Context
from arc_ds.errors import ConfigError
from arc_ds.export.formats import write_export
from arc_ds.model.decoder_adapters import DecoderLora
from arc_ds.serving.engines import cache_salt, encode_tensor
from arc_ds.serving.settings import UpstreamSettings
from tests.helpers.fake_vllm import FakeVllm, continue_rows, serving
from tests.helpers.served import Served, served
from tests.helpers.tiny_export import DECODER, tiny_trained
from tests.helpers.vllm_wire import decode_prompt_embeds
from tests.helpers.waiting import LIMIT_S, wait_for
from tests.unit.serving.test_server import CHAT, DOCUMENT, PROMPT, QUESTION, TEMPLATE, expected, raw_request


@pytest.fixture(scope="module")
def embedder(folder: Path) -> ArcModel:
    """The compressor, and the embedding table of the decoder alone."""
    return ArcModel.from_checkpoint(folder / "export", decoders=[folder / "decoder"], decoder_parts="embedding")


@pytest.fixture(scope="module")
def compressor(folder: Path) -> ArcModel:
    return ArcModel.from_checkpoint(folder / "export", decoders=[])


@contextmanager
def forwarding(fake: FakeVllm, model: ArcModel, **settings: Any) -> Iterator[Served]:
    """A server that forwards to a fake upstream."""
    with serving(fake) as url, served(model, upstream=UpstreamSettings(url=url, model="decoder", **settings)) as found:
        yield found


def test_a_decoder_with_adapters_is_no_upstreams(tmp_path: Path) -> None:
    lora = DecoderLora.of(DECODER, rank=2, scale=0.5)
    write_export(tiny_trained(tmp_path / "run", adapters=(lora,)), tmp_path / "export")
    model, settings = ArcModel.from_checkpoint(tmp_path / "export", decoders=[]), UpstreamSettings(url="", model="base")
    message = "another engine would answer with the wrong weights.*leave out --upstream"
    with pytest.raises(ConfigError, match=message), served(model, upstream=settings):
        pass


def test_vectors_reproduce_the_answer_of_a_decoder_upstream(model: ArcModel, embedder: ArcModel) -> None:
    fake = FakeVllm(model)
    with forwarding(fake, embedder) as found:
        reply = found.ask("/v1/chat/completions", CHAT)
        assert reply.text == expected(model) and "x-arc-fallback" not in reply.headers
        assert reply.json["usage"]["completion_tokens"] == 24
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none")
        stream = client.completions.create(model="arc", prompt=PROMPT, max_tokens=40, stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream)
        assert [text] == model.generate([["Text: ", Context("A lamp of stone."), " so"]], max_new_tokens=40)
    first, second = fake.bodies
    rows = decode_prompt_embeds(first["prompt_embeds"], 48)
    torch.testing.assert_close(rows, model.prompt_embeds([TEMPLATE])[0], rtol=0, atol=1e-5)
    assert first["cache_salt"] == cache_salt([rows]) != second["cache_salt"]
    assert first["model"] == "decoder" and first["stop_token_ids"] == [1] and first["stop"] == ["\n\n"]
    assert "prompt" not in first and "messages" not in first
    assert continue_rows(model, rows, 24, []) != continue_rows(model, rows.flip(0), 24, [])


def test_without_the_decoders_files_a_chat_goes_as_parts(model: ArcModel, compressor: ArcModel) -> None:
    fake = FakeVllm(model)
    with forwarding(fake, compressor) as found:
        reply = found.ask("/v1/chat/completions", CHAT)
        refused = found.ask("/v1/completions", {"prompt": PROMPT})
        assert found.ask("/v1/completions", {"prompt": "So", "max_tokens": 5}).status == 200
    chat, completion = fake.bodies
    before, vectors, after = chat["messages"][0]["content"]
    assert (before["text"], after["text"]) == ("Document: ", f"\nQuestion: {QUESTION}")
    sent = decode_prompt_embeds(vectors["data"], 48)
    torch.testing.assert_close(sent, model.compress([DOCUMENT])[0], rtol=0, atol=1e-5)
    (rows,) = model.prompt_embeds([["Document: ", Context(DOCUMENT), f"\nQuestion: {QUESTION}"]])
    assert reply.text == model.decoder_tokenizers[0].decode(continue_rows(model, rows[1:], 24, []))
    assert completion["prompt"] == "So"
    assert refused.status == 400 and "start the server with --decoder FOLDER" in refused.error["message"]


@pytest.mark.parametrize("has_table", [True, False])
def test_an_upstream_that_refuses_vectors_gets_the_text(
    model: ArcModel, embedder: ArcModel, compressor: ArcModel, has_table: bool
) -> None:
    fake = FakeVllm(model, takes_embeddings=False)
    with forwarding(fake, embedder if has_table else compressor) as found:
        reply = found.ask("/v1/chat/completions", {**CHAT, "stream": True})
        assert reply.status == 200 and reply.headers["x-arc-fallback"].startswith("text; ")
        assert found.metric("arc_fallbacks_total") == 1
    messages = fake.bodies[-1]["messages"]
    assert messages == [{"role": "user", "content": f"Document: {DOCUMENT}\nQuestion: {QUESTION}"}]


def test_rows_and_ids_go_on_to_the_upstream(model: ArcModel, embedder: ArcModel) -> None:
    """A refusal of rows cannot be mended by their text, that of embedded ids by the ids."""
    parts = ["Text: ", Context(DOCUMENT), " so"]
    (rows,) = model.prompt_embeds([parts])
    fake, body = FakeVllm(model), {"prompt_embeds": encode_tensor(rows), "max_tokens": 9}
    with serving(fake) as url:
        settings = UpstreamSettings(url=url, model="decoder")
        with served(embedder, upstream=settings, prompt_embeds=True) as found:
            assert [found.ask("/v1/completions", body).text] == model.generate([parts], max_new_tokens=9)
            fake.takes_embeddings = False
            refused = found.ask("/v1/completions", body)
            assert found.ask("/v1/completions", {"prompt": [5, 6], "max_tokens": 3}).status == 200
    assert refused.status == 400 and "--enable-prompt-embeds" in refused.error["message"]
    assert fake.bodies[-1]["prompt"] == [5, 6]


def stream(*lines: str, wait_s: float = 0.0) -> Callable[[dict[str, Any]], Response]:
    """An upstream that sends these lines, then nothing for a while."""

    async def events() -> AsyncIterator[str]:
        for line in lines:
            yield f"{line}\n\n"
        await asyncio.sleep(wait_s)

    return lambda _: StreamingResponse(events(), media_type="text/event-stream")


def event(text: Any, finish: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


FAULTS = {
    "html": (lambda _: PlainTextResponse("<html>Welcome</html>"), 502, "does not speak OpenAI's API"),
    "other json": (lambda _: JSONResponse({"hello": 1}), 502, "does not speak OpenAI's API"),
    "not json": (stream("data: {"), 502, "does not speak OpenAI's API"),
    "a list": (stream("data: []"), 502, "does not speak OpenAI's API"),
    "no choices": (stream('data: {"error": {"message": "x"}}'), 502, "does not speak OpenAI's API"),
    "choices of another kind": (stream('data: {"choices": [7]}'), 502, "does not speak OpenAI's API"),
    "text of another kind": (stream(event(7), event("", "stop")), 502, "does not speak OpenAI's API"),
    "nothing": (stream(), 502, "ended before its end"),
    "an endless line": (stream("data: " + "x" * (3 << 20)), 502, "does not speak OpenAI's API"),
    "done at once": (stream("data: [DONE]"), 502, "ended before its end"),
    "silent": (stream(wait_s=LIMIT_S), 504, "silent for too long"),
    "broken": (lambda _: JSONResponse({"error": {"message": "no GPU"}}, 500), 502, "answered 500: no GPU. See its log"),
    "redirect": (lambda _: Response(status_code=307, headers={"location": "http://x"}), 502, "answered 307"),
    "key": (lambda _: JSONResponse({"error": "who?"}, 401), 502, "ARC_UPSTREAM_API_KEY"),
    "unknown model": (
        lambda _: JSONResponse({"message": "no such model"}, 404),
        502,
        "Check --upstream and --upstream",
    ),
    "busy": (lambda _: JSONResponse({}, 429, {"retry-after": "9"}), 429, "the upstream is busy"),
    "too long": (lambda _: JSONResponse({"error": {"message": "context"}}, 400), 400, "refused the request: context"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_upstream_is_one_clear_error(model: ArcModel, embedder: ArcModel, fault: str) -> None:
    behaviour, status, words = FAULTS[fault]
    patience = {"silence_s": 0.3} if fault == "silent" else {}
    with forwarding(FakeVllm(model, behaviour=behaviour), embedder, **patience) as found:
        reply = found.ask("/v1/chat/completions", CHAT)
        assert reply.status == status and words in reply.error["message"], reply.raw
        assert reply.headers.get("retry-after") == ("9" if fault == "busy" else None)
        assert found.ask("/health").status == 200


def test_a_fault_after_the_first_words_is_an_event_of_the_stream(model: ArcModel, embedder: ArcModel) -> None:
    """The first words must come in time, so a slow machine gets more of it."""
    fake = FakeVllm(model, behaviour=stream(event("Hello"), wait_s=LIMIT_S))
    for silence_s in (0.3, 3.0, 30.0):
        with forwarding(fake, embedder, silence_s=silence_s) as found:
            reply = found.ask("/v1/completions", {"prompt": PROMPT, "stream": True})
        if reply.status == 200:
            break
    first, last = [json.loads(line[6:]) for line in reply.raw.decode().split("\n\n") if line]
    assert first["choices"][0]["text"] == "Hello" and last["error"]["code"] == "upstream_timeout"


def endless(model: ArcModel, text: str) -> tuple[FakeVllm, threading.Event]:
    """An upstream that sends a text again and again, and the event that nobody listens any more."""
    ended = threading.Event()

    async def events() -> AsyncIterator[str]:
        try:
            while True:
                yield event(text) + "\n\n"
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    return FakeVllm(model, behaviour=lambda _: StreamingResponse(events(), media_type="text/event-stream")), ended


def test_a_client_that_does_not_read_its_answer_ends_it(model: ArcModel, embedder: ArcModel) -> None:
    fake, ended = endless(model, "x" * 100_000)
    with serving(fake) as url:
        settings = UpstreamSettings(url=url, model="decoder")
        for timeout_s in (0.5, 5.0, 50.0):  # a slow machine needs more until the answer begins
            with served(embedder, upstream=settings, timeout_s=timeout_s) as found:
                opened = raw_request(found, {**CHAT, "stream": True})
                wait_for(
                    lambda found=found: found.metric("arc_request_seconds_count", path="/v1/chat/completions") == 1
                )
                assert found.ask("/health").status == 200
                opened.close()
            if fake.bodies:
                break
        wait_for(ended.is_set)


def test_an_upstream_that_is_not_there_is_named(embedder: ArcModel) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with served(embedder, upstream=UpstreamSettings(url=url, model="decoder")) as found:
            reply = found.ask("/v1/chat/completions", CHAT)
    assert reply.status == 502 and reply.error["code"] == "upstream_unreachable" and url in reply.error["message"]


def test_a_hang_up_reaches_the_upstream(model: ArcModel, embedder: ArcModel) -> None:
    fake, ended = endless(model, "x")
    with forwarding(fake, embedder) as found:
        opened = raw_request(found, {**CHAT, "stream": True})
        assert opened.recv(20).startswith(b"HTTP/1.1 200")
        opened.close()
        wait_for(ended.is_set)
        wait_for(lambda: found.metric("arc_requests_running") == 0)
