"""The server answers like OpenAI's: the same tokens as `ArcModel.generate`, and one clear error for each mistake."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from safetensors.torch import load

from arc_ds import ArcModel, Context
from arc_ds.export.formats import write_export
from arc_ds.inference.prompt_embeds import encode_tensor
from arc_ds.serving import compressions
from tests.helpers.served import Served, served
from tests.helpers.tiny_export import tiny_trained, write_decoder
from tests.helpers.waiting import LIMIT_S, wait_for

DOCUMENT, OTHER, QUESTION = "The wind came from the sea.", "A lamp of stone.", "Which lamp held?"
CHAT = {"messages": [{"role": "user", "content": QUESTION}], "documents": [DOCUMENT], "max_tokens": 24}
TEMPLATE = ["Document: ", Context(DOCUMENT), f"\nQuestion: {QUESTION}\nAnswer:"]
PROMPT = f"Text: <context>{OTHER}</context> so"


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(model: ArcModel, **options: Any) -> str:
    """The answer to CHAT: the template's space before the answer is no part of it."""
    (text,) = model.generate([TEMPLATE], max_new_tokens=24, stop=["\n\n"], **options)
    assert len(set(text)) > 3
    return text.removeprefix(" ")


def test_a_chat_gets_the_tokens_of_generate(client: openai.OpenAI, model: ArcModel) -> None:
    found = client.chat.completions.create(
        model="arc", messages=CHAT["messages"], max_completion_tokens=24, extra_body={"documents": [{"text": DOCUMENT}]}
    )
    assert found.choices[0].message.content == expected(model)
    assert found.choices[0].finish_reason == "length" and found.object == "chat.completion"
    usage = found.usage.model_dump()
    assert usage["prompt_tokens"] == len(model.prompt_embeds([TEMPLATE])[0])
    assert usage["completion_tokens"] == 24 and usage["total_tokens"] == 24 + usage["prompt_tokens"]
    assert usage["compressed_rows"] == len(model.compress([DOCUMENT])[0])
    assert usage["encoder_tokens"] == len(model.encoder_tokenizer.encode(DOCUMENT))


def test_a_streamed_chat_has_the_same_text_in_pieces(client: openai.OpenAI, model: ArcModel) -> None:
    chunks = list(
        client.chat.completions.create(
            model="arc",
            messages=CHAT["messages"],
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"documents": [DOCUMENT]},
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected(model) and len([piece for piece in pieces if piece]) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 24


def test_a_document_as_a_part_of_the_message_is_the_same(server: Served, model: ArcModel) -> None:
    parts = [{"type": "text", "text": QUESTION}, {"type": "document", "text": DOCUMENT}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 24}
    assert server.ask("/v1/chat/completions", body).text == expected(model)
    other = {**CHAT, "documents": [OTHER]}
    assert server.ask("/v1/chat/completions", other).text != expected(model)


def test_a_completion_gets_the_tokens_of_generate(client: openai.OpenAI, model: ArcModel) -> None:
    parts = ["Text: ", Context(OTHER), " so"]
    (text,) = model.generate([parts], max_new_tokens=40)
    found = client.completions.create(model="arc", prompt=PROMPT, max_tokens=40)
    assert found.choices[0].text == text and found.object == "text_completion"
    chunks = client.completions.create(model="arc", prompt=PROMPT, max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    (after,) = model.generate([["Document: ", Context(DOCUMENT), "\n", *parts]], max_new_tokens=40)
    found = client.completions.create(model="arc", prompt=PROMPT, max_tokens=40, extra_body={"documents": [DOCUMENT]})
    assert found.choices[0].text == after != text


def test_stops_seeds_and_temperatures_are_those_of_generate(server: Served, model: ArcModel) -> None:
    text = expected(model)
    stop = text[8:10]
    reply = server.ask("/v1/chat/completions", {**CHAT, "stop": stop})
    assert reply.text == text[: text.index(stop)] and reply.json["choices"][0]["finish_reason"] == "stop"
    sampled = {"temperature": 0.9, "top_p": 0.8, "seed": 7}
    answers = {server.ask("/v1/chat/completions", {**CHAT, **sampled}).text for _ in range(2)}
    assert answers == {expected(model, **sampled)} != {text}
    without_seed = {server.ask("/v1/chat/completions", {**CHAT, "temperature": 1.5}).text for _ in range(3)}
    assert len(without_seed) == 3


def test_special_tokens_and_ends_of_the_decoder_stop_an_answer(server: Served, model: ArcModel) -> None:
    (ids,) = model.generate_ids([model.segments(["Text: ", Context(OTHER), " so"])], max_new_tokens=40)
    tokenizer = model.decoder_tokenizers[0]
    body = {"prompt": PROMPT, "max_tokens": 40}
    former = model.decoder_stop_ids[0]
    model.readers[0].stop_ids = (ids[10],)
    try:
        reply = server.ask("/v1/completions", body)
    finally:
        model.readers[0].stop_ids = former
    assert reply.text == tokenizer.decode(ids[: ids.index(ids[10])])
    assert reply.json["usage"]["completion_tokens"] == ids.index(ids[10])


def test_a_prompt_may_be_token_ids_or_rows(server: Served, model: ArcModel) -> None:
    parts = ["Text: ", Context(OTHER), " so"]
    (rows,) = model.prompt_embeds([parts])
    (ids,) = model.generate_ids([model.segments(parts)], max_new_tokens=20)
    body = {"prompt_embeds": encode_tensor(rows), "max_tokens": 20, "return_token_ids": True}
    with served(model, prompt_embeds=True) as open_server:
        reply = open_server.ask("/v1/completions", body)
        wrong = open_server.ask("/v1/completions", {**body, "prompt_embeds": encode_tensor(rows[:, 1:])})
    assert reply.json["choices"][0]["token_ids"] == ids and reply.json["usage"]["prompt_tokens"] == len(rows)
    assert wrong.status == 400 and "expected base64 of torch.save" in wrong.error["message"]
    prompt = [idx for segment in model.segments("Text: so") for idx in segment.ids.array.tolist()]
    by_ids, by_text = (
        server.ask("/v1/completions", {"prompt": each, "max_tokens": 9}) for each in (prompt, "Text: so")
    )
    assert by_ids.text == by_text.text and "token_ids" not in by_ids.json["choices"][0]
    assert server.ask("/version").json["version"]
    assert server.ask("/v1/models").json["data"][0]["max_model_len"] == server.service.max_rows


def test_vectors_come_as_safetensors(server: Served, model: ArcModel) -> None:
    reply = server.ask("/v1/compress", {"documents": [DOCUMENT, OTHER, DOCUMENT]})
    found = load(reply.raw)
    assert set(found) == {"context_0", "context_1", "context_2"}
    for idx, vectors in enumerate(model.compress([DOCUMENT, OTHER, DOCUMENT])):
        torch.testing.assert_close(found[f"context_{idx}"], vectors, rtol=0, atol=1e-5)
    assert int(reply.headers["x-arc-encoder-tokens"]) > 20


def chat(**changes: Any) -> dict[str, Any]:
    return {**CHAT, **changes}


MANY = "lamp " * 500
MISTAKES: list[tuple[str, Any, int, str]] = [
    ("chat/completions", b"\xff\xfe{}", 400, "not UTF-8"),
    ("chat/completions", b"{", 400, "not valid JSON"),
    ("chat/completions", b"[1]", 400, "expected an object"),
    ("chat/completions", b"[" * 100_000, 400, "not valid JSON"),
    ("chat/completions", b'{"max_tokens": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    ("chat/completions", {}, 400, "`messages`: the field is missing"),
    ("chat/completions", chat(messages=[]), 400, "`messages`"),
    ("chat/completions", chat(messages="hello"), 400, "`messages`: input should be a valid list"),
    ("chat/completions", chat(messages=["hello"]), 400, "`messages.0`: expected an object"),
    ("chat/completions", chat(messages=[{"role": "tool", "content": "x"}]), 400, "`messages.0.role`"),
    ("chat/completions", chat(messages=[{"role": "user", "content": 7}]), 400, "`messages.0.content`"),
    (
        "chat/completions",
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "`messages.0.content.0.type`: input should be 'text' or 'document'",
    ),
    ("chat/completions", chat(documents="x"), 400, "`documents`: input should be a valid list"),
    ("chat/completions", chat(documents=[7]), 400, "`documents.0`: expected a text, or an object"),
    ("chat/completions", chat(documents=[""]), 400, "`documents.0.text`"),
    ("chat/completions", chat(documents=["x"] * 9), 400, "has 9 documents; this server takes at most 8"),
    ("chat/completions", chat(documents=[MANY]), 400, "a document has 1000 tokens; this server compresses at most 400"),
    ("chat/completions", chat(documents=[MANY[:900]] * 3), 400, "tokens; this server takes at most 800"),
    ("chat/completions", chat(documents=["x" * 20_000]), 400, "20000 characters: more than 400 tokens"),
    ("chat/completions", chat(documents=["\ud83d"]), 400, "`documents.0.text`"),
    ("chat/completions", chat(max_tokens=0), 400, "`max_tokens`"),
    ("chat/completions", chat(max_tokens=2.5), 400, "`max_tokens`"),
    ("chat/completions", chat(max_tokens=True), 400, "`max_tokens`"),
    ("chat/completions", chat(max_tokens=301), 400, "at most 300"),
    ("chat/completions", chat(temperature="hot"), 400, "`temperature`"),
    ("chat/completions", chat(temperature=float("nan")), 400, "`temperature`"),
    ("chat/completions", chat(temperature=-1), 400, "`temperature`"),
    ("chat/completions", chat(top_p=0), 400, "`top_p`"),
    ("chat/completions", chat(seed=2**70), 400, "`seed`"),
    ("chat/completions", chat(stop=[""]), 400, "`stop.0`"),
    ("chat/completions", chat(stop=["x"] * 17), 400, "`stop`"),
    ("chat/completions", chat(n=2), 400, "`n` is not supported"),
    ("chat/completions", chat(n=True), 400, "`n` is not supported"),
    ("chat/completions", chat(logprobs=True), 400, "`logprobs` is not supported"),
    ("chat/completions", chat(tools=[{}]), 400, "`tools` is not supported"),
    ("chat/completions", chat(model="gpt-4"), 404, "the model 'gpt-4' does not exist here; this server has 'arc'"),
    ("completions", {"prompt": ["a", "b"]}, 400, "`prompt`"),
    ("completions", {"prompt": [1, -1]}, 400, "`prompt`"),
    ("completions", {"prompt": [1, 350]}, 400, "token ids 1 to 350 for the decoder; expected 0 to 349"),
    ("completions", {"prompt": []}, 400, "the prompt is empty"),
    ("completions", {"prompt": [1], "documents": ["a"]}, 400, "`documents` need a prompt that is a text"),
    ("completions", {}, 400, "give either `prompt` or `prompt_embeds`"),
    ("completions", {"prompt": "a", "prompt_embeds": "b"}, 400, "give either `prompt` or `prompt_embeds`"),
    ("completions", {"prompt_embeds": "b"}, 400, "start it with --prompt-embeds"),
    ("completions", {"prompt": "<context>a"}, 400, "unmatched <context>"),
    ("completions", {"prompt": "a", "logprobs": 3}, 400, "`logprobs` is not supported"),
    ("completions", {"prompt": "\udc00"}, 400, "characters that UTF-8 cannot encode"),
    ("compress", {"documents": []}, 400, "`documents`"),
    ("compress", {"texts": ["a"]}, 400, "`documents`: the field is missing"),
]


@pytest.mark.parametrize(("path", "body", "status", "fault"), MISTAKES)
def test_a_mistake_gets_one_clear_error(server: Served, path: str, body: Any, status: int, fault: str) -> None:
    reply = server.ask(f"/v1/{path}", body)
    assert reply.status == status, reply.raw
    assert fault in reply.error["message"]
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert reply.error["type"] == "invalid_request_error"
    if fault.startswith("`"):
        assert reply.error["param"] == fault.split("`")[1]


def test_as_many_documents_as_the_server_takes_are_accepted(server: Served) -> None:
    assert server.ask("/v1/compress", {"documents": ["x"] * 8}).status == 200


def test_the_words_of_an_assistant_count_too(model: ArcModel) -> None:
    said = [{"role": role, "content": "x" * size} for role, size in (("user", 1), ("assistant", 400), ("user", 1))]
    with served(model, prompt_rows=10) as found:
        reply = found.ask("/v1/chat/completions", {"messages": said})
    assert reply.status == 400 and "402 characters: more than 10 tokens" in reply.error["message"]


def test_a_byte_order_mark_before_a_body_is_no_part_of_it(server: Served) -> None:
    body = json.dumps({"documents": ["x"]}).encode("utf-8-sig")
    assert server.ask("/v1/compress", body).status == 200


def test_fields_that_ask_for_nothing_are_accepted(server: Served, model: ArcModel) -> None:
    harmless = {"n": 1, "logprobs": False, "tools": [], "presence_penalty": 0.0, "frequency_penalty": 0, "user": "me"}
    nothing = dict.fromkeys(("stop", "seed", "temperature", "top_p", "stream", "logit_bias", "tool_choice", "model"))
    assert server.ask("/v1/chat/completions", {**CHAT, **harmless, **nothing}).text == expected(model)


def test_a_large_body_gets_an_answer_and_not_a_broken_pipe(server: Served) -> None:
    for size in (2 << 20, 6 << 20):
        reply = server.ask("/v1/chat/completions", b" " * size)
        assert reply.status == 413 and "more than 1048576 bytes" in reply.error["message"]


def test_bodies_of_many_requests_do_not_exceed_the_memory_for_them(model: ArcModel) -> None:
    with served(model, body_bytes=200_000, all_body_bytes=300_000) as found:
        waiting = raw_request(found, {}, size=250_000)  # its last bytes do not come
        waiting.sendall(b" " * 190_000)
        wait_for(lambda: found.server._state.body_bytes > 190_000)
        reply = found.ask("/v1/chat/completions", b" " * 150_000)
        assert reply.status == 429 and reply.error["code"] == "queue_full"
        assert found.ask("/v1/chat/completions", CHAT).status == 200
        waiting.close()
        wait_for(lambda: found.server._state.body_bytes == 0)
        assert found.ask("/v1/chat/completions", b" " * 150_000).status == 400


def test_models_health_and_unknown_paths(server: Served, client: openai.OpenAI) -> None:
    assert [found.id for found in client.models.list()] == ["arc"] and client.models.retrieve("arc").id == "arc"
    assert server.ask("/health").json == {"status": "ok", "model": "arc"}
    assert server.ask("/v1/embeddings", {}).status == 404 and server.ask("/v1/models", {}).status == 405
    assert "arc_requests_total" in server.ask("/metrics").raw.decode()


def test_a_key_is_required_if_there_is_one(model: ArcModel) -> None:
    with served(model, api_key="schlüssel") as found:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "schlüssel".encode().decode("latin-1")},
        ):
            reply = found.ask("/v1/chat/completions", CHAT, **headers)
            assert reply.status == 401 and reply.error["code"] == "invalid_api_key"
            assert found.ask("/metrics", **headers).status == 401
        right = {"authorization": "Bearer schlüssel".encode().decode("latin-1")}
        assert found.ask("/v1/chat/completions", CHAT, **right).status == 200
        assert found.ask("/health").status == 200


def test_a_prompt_longer_than_the_decoder_reads_is_refused(model: ArcModel, server: Served) -> None:
    former, model.readers[0].max_positions = model.readers[0].max_positions, 60
    try:
        reply = server.ask("/v1/chat/completions", {**CHAT, "max_tokens": 40})
        assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"
        fitting = {key: value for key, value in CHAT.items() if key != "max_tokens"}
        usage = server.ask("/v1/chat/completions", fitting).json["usage"]
        assert usage["total_tokens"] == 60, "without max_tokens, the answer gets the room that is left"
    finally:
        model.readers[0].max_positions = former


def test_each_document_is_compressed_once(model: ArcModel) -> None:
    with served(model) as found:
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(lambda _: found.ask("/v1/chat/completions", CHAT), range(32)))
        assert {reply.text for reply in replies} == {expected(model)}
        assert found.metric("arc_encoder_tokens_total") == replies[0].json["usage"]["encoder_tokens"]
        lookups = {
            place: found.metric("arc_cache_lookups_total", found=place) for place in ("memory", "pending", "nowhere")
        }
        assert lookups["nowhere"] == 1 and sum(lookups.values()) == 32


def test_vectors_on_the_disk_outlive_the_server(model: ArcModel, tmp_path: Path) -> None:
    with served(model, cache_dir=tmp_path / "cache") as found:
        first = found.ask("/v1/chat/completions", CHAT)
    assert first.json["usage"]["cached_documents"] == 0
    with served(model, cache_dir=tmp_path / "cache") as found:
        second = found.ask("/v1/chat/completions", CHAT)
        assert found.metric("arc_encoder_tokens_total") == 0
    assert second.json["usage"]["cached_documents"] == 1 and second.text == first.text


class Hold:
    """Keeps generations from advancing, after some steps, until it is released."""

    def __init__(self, model: ArcModel, monkeypatch: pytest.MonkeyPatch, *, free_steps: int = 0) -> None:
        self.is_holding, self._is_released = threading.Event(), threading.Event()
        self.free_steps = free_steps
        self._advance = type(model.decoders[0]).advance
        monkeypatch.setattr(type(model.decoders[0]), "advance", lambda *args: self._advance_held(*args))

    def _advance_held(self, *args: Any) -> Any:
        self.free_steps -= 1
        if self.free_steps < 0:
            self.is_holding.set()
            assert self._is_released.wait(LIMIT_S)
        return self._advance(*args)

    def release(self) -> None:
        self._is_released.set()


@pytest.fixture
def hold(model: ArcModel, monkeypatch: pytest.MonkeyPatch) -> Hold:
    return Hold(model, monkeypatch)


def raw_request(server: Served, body: dict[str, Any], size: int | None = None) -> socket.socket:
    """A connection that has sent a request. `size`: the length that it announces, if it is not that of the body."""
    host, port = urlsplit(server.url).netloc.split(":")
    opened = socket.create_connection((host, int(port)), timeout=LIMIT_S)
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {size or len(raw)}\r\n\r\n"
    opened.sendall(head.encode() + raw)
    return opened


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_hangs_up_ends_the_work_for_it(server: Served, hold: Hold, is_stream: bool) -> None:
    hold.free_steps = 20
    before = server.metric("arc_answer_tokens_total")
    opened = raw_request(server, {**CHAT, "max_tokens": 250, "stream": is_stream})
    if is_stream:
        assert opened.recv(20).startswith(b"HTTP/1.1 200")
    wait_for(hold.is_holding.is_set)
    assert server.metric("arc_requests_running") == 1
    opened.close()
    wait_for(lambda: server.metric("arc_requests_running") == 0)
    hold.release()
    wait_for(lambda: server.metric("arc_answer_tokens_total") > before)
    assert server.metric("arc_answer_tokens_total") - before < 25


def test_answers_that_no_client_waits_for_take_no_place_in_the_queue(model: ArcModel, hold: Hold) -> None:
    with served(model, waiting=2, threads=1, batch_prompts=1) as found:
        first = raw_request(found, {**CHAT, "max_tokens": 250})
        wait_for(lambda: found.metric("arc_batch_size_count", work="generate") == 1)
        waiting = [raw_request(found, CHAT) for _ in range(2)]
        wait_for(lambda: found.metric("arc_answers_waiting") == 2)
        for opened in waiting:
            opened.close()
        wait_for(lambda: found.metric("arc_answers_waiting") == 0)
        assert found.metric("arc_batch_size_count", work="generate") == 1, "the first answer still runs"
        first.close()
        hold.release()
        assert found.ask("/v1/chat/completions", CHAT).status == 200


def test_connections_beyond_the_files_of_the_process_give_one_warning(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            server.server._on_loop_error(None, {"exception": OSError(errno.EMFILE, "Too many open files")})
    assert len(caplog.messages) == 1 and "ulimit -n" in caplog.text


def test_a_client_that_hangs_up_early_costs_no_compression(model: ArcModel, monkeypatch: pytest.MonkeyPatch) -> None:
    has_hung_up = threading.Event()

    async def pause(_seconds: float) -> None:
        while not has_hung_up.is_set():
            await asyncio.sleep(0.005)

    monkeypatch.setattr(compressions, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": pause}))
    with served(model) as found:
        raw_request(found, CHAT).close()
        wait_for(lambda: found.metric("arc_requests_total", path="/v1/chat/completions", status="408") == 1)
        has_hung_up.set()
        assert found.ask("/v1/compress", {"documents": [OTHER]}).status == 200
        assert found.metric("arc_encoder_tokens_total") == len(model.encoder_tokenizer.encode(OTHER))


def test_answers_that_wait_are_generated_as_one_batch(
    model: ArcModel, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [{"prompt": f"<context>{DOCUMENT}</context> {n}", "max_tokens": 4 + n} for n in range(12)]
    with served(model, threads=1, batch_prompts=8) as found, ThreadPoolExecutor(12) as pool:
        running = [pool.submit(found.ask, "/v1/completions", body) for body in bodies]
        started = "arc_batch_size_sum"
        wait_for(lambda: found.metric(started, work="generate") + found.metric("arc_answers_waiting") == 12)
        hold.release()
        replies = [reply.result() for reply in running]
        assert found.metric("arc_batch_size_count", work="generate") <= 3
        assert found.metric("arc_batch_size_sum", work="generate") == 12
    monkeypatch.undo()
    for n, reply in enumerate(replies):
        (text,) = model.generate([[Context(DOCUMENT), f" {n}"]], max_new_tokens=4 + n)
        assert reply.text == text and reply.json["usage"]["completion_tokens"] == 4 + n


@pytest.mark.parametrize("work", ["generate_ids", "compress"])
def test_a_batch_is_bounded_by_its_rows_or_tokens(model: ArcModel, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    run, sizes = getattr(ArcModel, work), []

    def recorded(self: ArcModel, lines: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(lines))
        if work == "generate_ids":  # the others wait for a batch meanwhile
            wait_for(lambda: sum(sizes) + found.metric("arc_answers_waiting") == 8)
        return run(self, lines, *args, **options)

    monkeypatch.setattr(ArcModel, work, recorded)
    texts = [f"{n} lamps of stone." for n in range(8)]
    encoder, decoder = model.encoder_tokenizer, model.decoder_tokenizers[0]
    tokens, rows = len(encoder.encode(texts[0])), 1 + len(decoder.encode(texts[0])) + 4
    limits = {"batch_rows": 2 * rows, "compress_tokens": 3 * tokens - 1}
    with served(model, threads=1, **limits) as found, ThreadPoolExecutor(8) as pool:
        if work == "compress":
            assert found.ask("/v1/compress", {"documents": texts}).status == 200
        else:
            bodies = [{"prompt": text, "max_tokens": 4} for text in texts]
            replies = list(pool.map(lambda body: found.ask("/v1/completions", body), bodies))
            assert {reply.status for reply in replies} == {200}
    assert max(sizes) == 2 and sum(sizes) == 8


def test_a_request_that_takes_too_long_gets_504(model: ArcModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream must begin within the time, so a slow machine gets more of it."""
    body = {**CHAT, "max_tokens": 200, "stream": True}
    for timeout_s in (0.3, 3.0, 30.0):
        hold = Hold(model, monkeypatch, free_steps=20)
        with served(model, timeout_s=timeout_s) as found:
            stream = found.ask("/v1/chat/completions", body)
            reply = found.ask("/v1/chat/completions", {**CHAT, "max_tokens": 200})
            hold.release()
        monkeypatch.undo()
        assert reply.status == 504 and reply.error["code"] == "timeout"
        if stream.status == 200:
            break
    events = [line.removeprefix("data: ") for line in stream.raw.decode().split("\n\n") if line]
    assert len(events) > 1 and json.loads(events[-1])["error"]["code"] == "timeout"


def test_more_requests_than_may_wait_get_429(model: ArcModel, hold: Hold) -> None:
    with served(model, waiting=2, threads=1, batch_prompts=1) as found, ThreadPoolExecutor(12) as pool:
        running = [pool.submit(found.ask, "/v1/chat/completions", CHAT)]
        wait_for(lambda: found.metric("arc_batch_size_count", work="generate") == 1)
        running += [pool.submit(found.ask, "/v1/chat/completions", CHAT) for _ in range(11)]
        wait_for(lambda: found.metric("arc_requests_total", path="/v1/chat/completions", status="429") == 9)
        hold.release()
        replies = [reply.result() for reply in running]
    by_status = {status: [r for r in replies if r.status == status] for status in (200, 429)}
    assert (len(by_status[200]), len(by_status[429])) == (3, 9)
    refused = by_status[429][0]
    assert refused.error["code"] == "queue_full" and refused.headers["retry-after"] == "1"
    assert {reply.text for reply in by_status[200]} == {expected(model)}


def test_a_stopping_server_finishes_its_answers_and_refuses_others(model: ArcModel, hold: Hold) -> None:
    with served(model) as found, ThreadPoolExecutor(1) as pool:
        running = pool.submit(found.ask, "/v1/chat/completions", {**CHAT, "max_tokens": 40})
        wait_for(lambda: found.metric("arc_batch_size_count", work="generate") == 1)
        found.server.handle_exit(15, None)
        reply = found.ask("/v1/chat/completions", CHAT)
        assert reply.status == 503 and reply.error["code"] == "stopping"
        assert found.ask("/health").status == 503
        hold.release()
        assert running.result().status == 200 and running.result().json["usage"]["completion_tokens"] == 40
        wait_for(lambda: found.server.should_exit)


def test_vectors_are_those_of_the_port_of_the_decoder(tmp_path: Path) -> None:
    write_export(tiny_trained(tmp_path / "run", decoder_sizes=(48, 48)), tmp_path / "export")
    decoders = [write_decoder(tmp_path / name).parent / name for name in ("first", "second")]
    model = ArcModel.from_checkpoint(tmp_path / "export", decoders=decoders)
    with served(model, decoder=1) as found:
        vectors = load(found.ask("/v1/compress", {"documents": [DOCUMENT]}).raw)["context_0"]
    first, second = (model.compress([DOCUMENT], decoder)[0] for decoder in range(2))
    torch.testing.assert_close(vectors, second)
    assert not torch.allclose(vectors, first)


@pytest.mark.parametrize("grace_s", [0.3, 300.0])
def test_answers_that_run_are_given_up_after_the_grace_or_a_second_signal(
    model: ArcModel, hold: Hold, grace_s: float
) -> None:
    """The server waits for the step that runs, and then takes no other."""
    with served(model, grace_s=grace_s) as found, ThreadPoolExecutor(1) as pool:
        running = pool.submit(found.ask, "/v1/chat/completions", {**CHAT, "max_tokens": 250})
        wait_for(lambda: found.metric("arc_batch_size_count", work="generate") == 1)
        found.server.handle_exit(15, None)
        if grace_s < 1:
            wait_for(lambda: found.server.should_exit)
        found.server.handle_exit(15, None)
        assert found.server.config.timeout_graceful_shutdown == 0, "uvicorn would wait for 5 s"
        wait_for(lambda: found.service._generation._is_closed)
        hold.release()
        assert running.result().status == 503 and running.result().error["code"] == "stopping"


@pytest.mark.parametrize("work", ["generate_ids", "compress"])
def test_one_at_fault_does_not_fail_the_others_of_its_batch(
    model: ArcModel, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    run, sizes = getattr(ArcModel, work), list[int]()

    def faulty(self: ArcModel, lines: Any, *args: Any, **options: Any) -> Any:
        if work == "generate_ids" and not sizes:  # the others wait for a batch meanwhile
            wait_for(lambda: len(lines) + found.metric("arc_answers_waiting") == 8)
        sizes.append(len(lines))
        prompts = [line if work == "generate_ids" else [SimpleNamespace(ids=line)] for line in lines]
        if any(sum(len(segment.ids) for segment in prompt) > 30 for prompt in prompts):
            raise torch.OutOfMemoryError("no room")
        return run(self, lines, *args, **options)

    monkeypatch.setattr(ArcModel, work, faulty)
    texts = ["x" * (60 if n == 3 else 4) + str(n) for n in range(8)]
    bodies = [{"prompt": text, "max_tokens": 4} if work == "generate_ids" else {"documents": [text]} for text in texts]
    path = "/v1/completions" if work == "generate_ids" else "/v1/compress"
    with served(model, threads=1, compress_wait_s=0.1) as found, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda body: found.ask(path, body), bodies))
    assert [reply.status for reply in replies] == [503 if n == 3 else 200 for n in range(8)]
    assert max(sizes) > 1
