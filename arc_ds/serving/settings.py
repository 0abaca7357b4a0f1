"""Settings of the server: its limits, waits and caches, and its upstream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arc_ds.system.urls import api_base

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and waits of the server.

    name: the name of the model in requests and answers.
    api_key: the key that requests must carry; None for no key.
    body_bytes: largest body of a request.
    all_body_bytes: memory for the bodies of all requests that are being read. More get status 429.
    documents: maximum number of documents in a request.
    document_tokens: longest document, in encoder tokens.
    request_tokens: maximum number of encoder tokens of all documents of a request.
    prompt_rows: maximum number of tokens and vectors of a prompt and its answer. A decoder that states a smaller one
        wins.
    max_tokens: maximum number of new tokens that a request may ask for.
    default_tokens: number of new tokens if a request does not state it.
    waiting: number of answers and compressions that may wait. More get status 429.
    timeout_s: time for a request. A longer one gets status 504. A client that reads nothing for so long
        loses its answer.
    grace_s: time for running requests after a stop signal.
    compress_wait_s: time for which a compression waits for others, to run as one batch.
    compress_tokens: encoder tokens of a batch of compressions.
    batch_prompts: maximum number of prompts that are answered as one batch.
    batch_rows: maximum number of rows in the cache of such a batch, padding included.
    threads: number of batches of answers that run at the same time; one if the decoder runs through transformers.
    cache_bytes: memory for compressed vectors.
    cache_dir: folder for compressed vectors; None for memory only.
    disk_bytes: size of that folder.
    prompt_embeds: whether a completion may bring the decoder's rows instead of a prompt.
    """

    name: str = "arc"
    api_key: str | None = None
    body_bytes: int = 16 * MIB
    all_body_bytes: int = 512 * MIB
    documents: int = 64
    document_tokens: int = 8192
    request_tokens: int = 65536
    prompt_rows: int = 32768
    max_tokens: int = 4096
    default_tokens: int = 256
    waiting: int = 1024
    timeout_s: float = 300.0
    grace_s: float = 300.0
    compress_wait_s: float = 0.005
    compress_tokens: int = 16384
    batch_prompts: int = 16
    batch_rows: int = 32768
    threads: int = 2
    cache_bytes: int = GIB
    cache_dir: Path | None = None
    disk_bytes: int = 10 * GIB
    prompt_embeds: bool = False


@dataclass(frozen=True, kw_only=True)
class UpstreamSettings:
    """The upstream.

    url: its address, with or without /v1.
    model: the decoder's name there.
    api_key: the key that it wants; None for none.
    silence_s: longest time without a word from it.
    """

    url: str
    model: str
    api_key: str | None = None
    silence_s: float = 60.0

    @property
    def base(self) -> str:
        return api_base(self.url)
