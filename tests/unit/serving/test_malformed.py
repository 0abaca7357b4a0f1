"""No request makes the server fail or crash, whatever its body. ARC_MALFORMED sets the number of requests."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.served import Served
from tests.helpers.waiting import LIMIT_S

NUM_REQUESTS = int(os.environ.get("ARC_MALFORMED", "300"))
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/compress")
TEXTS = st.text(max_size=30) | st.sampled_from(
    ["<context>", "</context>", "<context></context>", "<s>", "\ud800", "\x00", "a" * 5000, "é\u0301", " ", "\n\n"]
)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.integers(-2, 3) | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
VALID: list[dict[str, Any]] = [
    {
        "model": "arc",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Which?"}, {"type": "document", "text": "A lamp."}]},
            {"role": "assistant", "content": "This one."},
            {"role": "user", "content": "Why?"},
        ],
        "documents": ["The wind came.", {"text": "A tower."}],
        "max_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["\n"],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    {"prompt": "So <context>a lamp</context> is", "documents": ["A tower."], "max_tokens": 2, "n": 1, "logprobs": None},
    {"documents": ["A tower.", {"text": "A lamp."}]},
]
NAMES = (
    "max_completion_tokens",
    "tools",
    "logit_bias",
    "echo",
    "best_of",
    "response_format",
    "user",
    "documents",
    "stop",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inner for found in places(one, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """A valid body with some values replaced, removed or added."""
    body = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(body) if path] or [("documents",)]))
        owner = body
        for key in path[:-1]:
            owner = owner[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "add":
            body[draw(st.sampled_from(NAMES))] = draw(VALUES)
        elif action == "replace" or path[-1] not in owner:
            owner[path[-1]] = draw(VALUES)
        elif isinstance(owner, dict):
            del owner[path[-1]]
        if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 3:
            body["max_tokens"] = 400  # refused; a valid large number would only take long
    return body


BODIES = (
    st.binary(max_size=60)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | damaged().map(lambda body: json.dumps(body).encode())
    | damaged().map(lambda body: json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | damaged().map(lambda body: json.dumps(body).encode()[:-3])
)


def test_every_request_gets_an_answer_that_is_no_fault_of_the_server(server: Served) -> None:
    seen: Counter[int] = Counter()

    @settings(max_examples=NUM_REQUESTS, suppress_health_check=list(HealthCheck), database=None)
    @given(path=st.sampled_from(PATHS), body=BODIES)
    def send(path: str, body: bytes) -> None:
        reply = server.ask(path, body)
        seen[reply.status] += 1
        assert reply.status in (200, 400, 404), reply.raw
        if reply.status != 200:
            assert reply.error["message"] and reply.error["type"] == "invalid_request_error"

    send()
    print(f"answers by status: {dict(seen)}")
    assert seen[200] > NUM_REQUESTS / 100 and seen[400] > NUM_REQUESTS / 3


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BROKEN = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: x\r\n\r\n",
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    HEAD + b"Content-Length: 50\r\n\r\n{}",
    HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
    HEAD + b"Authorization: \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/\xff\x00 HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /v1/models/%ff%00%0d%0a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PUT /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /metrics HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nHost: x\r\n\r\n",
]


def test_broken_http_does_not_end_the_server(server: Served) -> None:
    host, port = urlsplit(server.url).netloc.split(":")
    for raw in [*BROKEN, random.Random(0).randbytes(2000)]:
        with socket.create_connection((host, int(port)), timeout=LIMIT_S) as opened:
            opened.sendall(raw)
            opened.shutdown(socket.SHUT_WR)
            answer = opened.recv(100)
            assert not answer or answer.split()[1][:1] in (b"2", b"4"), (raw[:60], answer)
    assert server.ask("/health").status == 200
    assert server.metric("arc_requests_total", path="other", status="500") == 0
