"""Decoders that a server runs: vLLM, `arc-ds serve`, or another server of OpenAI's Completions API.

The server gets token ids, or prompt embeddings if a prompt has vectors, so it reads exactly what a decoder here reads.
The reader also cuts the answers at the stop texts.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from arc_ds.batch.segments import TokenIds
from arc_ds.config.ranges import NonNegativeFloat, Positive, PositiveFloat
from arc_ds.errors import ConfigError, ServerError
from arc_ds.evaluation.systems.system import KeepsWork, System
from arc_ds.inference.decoders import Implementation, OpenedDecoder, read_decoder_sizes
from arc_ds.inference.generate import Sampling
from arc_ds.inference.load import DecoderSettings
from arc_ds.inference.prompt_embeds import cache_salt, encode_tensor
from arc_ds.inference.reader import Answer, DecoderReader, Nll, StopReason, before_first, reader_of
from arc_ds.inference.rows import Rows, num_rows, pack_rows
from arc_ds.model.frozen_decoder import DecoderSizes, FrozenDecoder, TransformersSizes
from arc_ds.model.weights.hf_config import RopeScalingChoice
from arc_ds.system.packages import require

if TYPE_CHECKING:
    from arc_ds.inference.completions_server import CompletionsServer, ServerIdentity

logger = logging.getLogger(__name__)

T = TypeVar("T")
_DEFAULT_KEY = "ARC_UPSTREAM_API_KEY"
# Statuses of a request with fields that a server does not support. Some versions of vLLM fail with 500 on them.
_REFUSALS = (400, 404, 405, 413, 415, 422, 500, 501)
_UNNAMED = -1  # a token that the server counts and does not name

# How a server gives the NLL of a prompt: vLLM's own field, or OpenAI's echo of the prompt with its log probabilities.
NllMethod = Literal["prompt_logprobs", "echo"]
_NLL_FIELDS: Mapping[NllMethod, Mapping[str, Any]] = {
    "prompt_logprobs": {"prompt_logprobs": 1},
    "echo": {"echo": True, "logprobs": 1},
}


def _address(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ConfigError(f"{text!r} is no address; expected one such as http://127.0.0.1:8000")
    return text


@dataclass(frozen=True, kw_only=True)
class ServerSection:
    """A server that runs the decoder of a system. Only `model` is part of what defines the results."""

    url: Annotated[str, _address]
    """Its address, with or without /v1."""
    model: str | None = None
    """The model's name there. None: the only one that the server has."""
    api_key_env: str = _DEFAULT_KEY
    """The environment variable that holds its key, if it wants one."""
    in_flight: Positive = 64
    """Largest number of requests that wait for its answer. vLLM runs 256 or more at once by default."""
    timeout_s: PositiveFloat = 600.0
    """Longest time for an answer."""
    retry_s: NonNegativeFloat = 120.0
    """Time for which a request is repeated that gets status 429 or 5xx or loses its connection."""

    def client(self) -> CompletionsServer:
        """A client of the server. Raises ConfigError if a named variable has no key."""
        require("aiohttp")
        from arc_ds.inference.completions_server import CompletionsServer

        key = os.environ.get(self.api_key_env, "").strip() or None
        if key is None and self.api_key_env != _DEFAULT_KEY:
            raise ConfigError(f"server.api_key_env names {self.api_key_env}, but this variable is not set: export it.")
        return CompletionsServer(
            self.url, api_key=key, in_flight=self.in_flight, timeout_s=self.timeout_s, retry_s=self.retry_s
        )


def identity_keys(section: dict[str, Any]) -> dict[str, Any]:
    """The keys of a system's section that define its results: of `server`, if it has one, the model alone."""
    others = {key: value for key, value in section.items() if key != "server"}
    server = section.get("server")
    return others if server is None else {**others, "server": {"model": server["model"]}}


@dataclass(frozen=True, kw_only=True)
class _SizesOnly:
    """The sizes of a decoder whose weights are not read."""

    sizes: DecoderSizes

    @property
    def hidden_size(self) -> int:
        return self.sizes.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab_size


@dataclass(kw_only=True)
class ServedReader(DecoderReader):
    """A reader whose decoder runs in a server. Several threads may use it at once.

    decoder: has the sizes, and for prompts with vectors the embedding table.
    server: the server.
    identity: the server's name, version and model.
    nll_method: how it gives the NLL of an answer; None if it does not.
    """

    server: CompletionsServer
    identity: ServerIdentity
    nll_method: NllMethod | None = None

    @property
    def _embedding(self) -> Tensor:
        return torch.empty(0) if isinstance(self.decoder, _SizesOnly) else super()._embedding

    def record(self) -> dict[str, Any]:
        """The identity of the decoder, for `System.describe`."""
        return {
            "implementation": "server",
            "server": {**dataclasses.asdict(self.identity), "nll": self.nll_method},
            "bos": self.bos,
        }

    def answer_rows(
        self,
        prompts: Sequence[Rows],
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        **_: Any,
    ) -> list[Answer]:
        """See `DecoderReader`. Ids of tokens that the server does not name are -1. Raises the server's errors."""
        texts, ends = self._ends(stop, stop_ids)
        limits = self._limits(max_new_tokens, len(prompts))
        options = {"stop": texts, "stop_token_ids": ends, "return_token_ids": True, **_options(sampling or Sampling())}
        bodies = [
            partial(self._body, rows, max_tokens=limit, **options) for rows, limit in zip(prompts, limits, strict=True)
        ]
        replies = self.server.complete(bodies)
        return [
            self._answer(reply, rows, limit, texts, ends)
            for reply, rows, limit in zip(replies, prompts, limits, strict=True)
        ]

    def nll_rows(self, prompts: Sequence[Rows], answers: Sequence[TokenIds], *_: Any, **__: Any) -> list[Nll]:
        """See `DecoderReader`. Only if there is an `nll_method`, and for prompts without vectors."""
        assert self.nll_method is not None, "the runner asks for no NLL that the server does not give"
        asked = [idx for idx, answer in enumerate(answers) if len(answer)]
        bodies = [partial(self._nll_body, prompts[idx], answers[idx]) for idx in asked]
        found = [Nll(0.0, 0)] * len(prompts)
        for idx, reply in zip(asked, self.server.complete(bodies), strict=True):
            whole = _ids_of([*prompts[idx], answers[idx]])
            logprobs = self._logprobs(reply, whole)[len(whole) - len(answers[idx]) :]
            found[idx] = Nll(-sum(logprobs), len(logprobs))
        return found

    def _body(self, rows: Rows, **options: Any) -> dict[str, Any]:
        if all(isinstance(part, TokenIds) for part in rows):
            prompt: dict[str, Any] = {"prompt": _ids_of(rows)}
        else:
            embeds = self._embed(rows)
            prompt = {"prompt_embeds": encode_tensor(embeds), "cache_salt": cache_salt([embeds])}
        return {"model": self.identity.model, **prompt, **options}

    @torch.no_grad()
    def _embed(self, rows: Rows) -> Tensor:
        batch, z_ZD = pack_rows([rows], self.device, self.dtype)
        return self.decoder.embed(batch, z_ZD)

    def _nll_body(self, rows: Rows, answer: TokenIds) -> dict[str, Any]:
        assert self.nll_method is not None
        return self._body([*rows, answer], max_tokens=1, **_options(Sampling()), **_NLL_FIELDS[self.nll_method])

    def _answer(
        self, reply: Mapping[str, Any], rows: Rows, limit: int, texts: Sequence[str], ends: Sequence[int]
    ) -> Answer:
        """The answer in a reply, ended as a decoder here ends it."""
        choice, usage = self._choice(reply), reply.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        raw, finish = choice.get("text"), choice.get("finish_reason")
        if not isinstance(raw, str) or finish not in ("stop", "length"):
            raise self.server.nonsense(f"an answer of {type(raw).__name__} ended with the reason {finish!r}")
        num_read = usage.get("prompt_tokens")
        if all(isinstance(part, TokenIds) for part in rows) and num_read not in (None, num_rows(rows)):
            raise ServerError(
                f"the server {self.server.base} read {num_read} tokens of a prompt of {num_rows(rows)}. It must take "
                "token ids as they are. Use another server."
            )
        ids = _named_ids(choice)
        is_named = ids is not None
        if ids is not None:
            is_eos = finish == "stop" and bool(ids) and ids[-1] in ends
            ids = ids[:-1] if is_eos else ids
            raw = self.needed_tokenizer().decode(ids)
        else:
            count = usage.get("completion_tokens")
            ids = [_UNNAMED] * (count if isinstance(count, int) else 0)
            # vLLM gives the stop text, the id that ended the answer, or None for its end of text.
            is_eos = finish == "stop" and not isinstance(choice.get("stop_reason", "" if texts else None), str)
        text = before_first(raw, texts)
        stop: StopReason = "length" if finish == "length" else "eos" if is_eos or is_named else "string"
        if text != raw and not is_eos:
            stop = "string"
        if stop == "length" and 0 < len(ids) < limit:
            raise ServerError(
                f"the server {self.server.base} ended an answer after {len(ids)} of {limit} tokens: its window is too "
                f"small for a prompt of {num_rows(rows)} rows. Start it with a larger one (vLLM: --max-model-len)."
            )
        return Answer(text, raw, ids, stop)

    def _choice(self, reply: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self.server.nonsense("its answer has no choice")
        return choices[0]

    def _logprobs(self, reply: Mapping[str, Any], ids: Sequence[int]) -> list[float]:
        """The log probability of each id but the first one, which is 0."""
        found = logprobs_of(self._choice(reply), ids)
        if found is None:
            raise self.server.nonsense(f"it gives no log probabilities of a prompt of {len(ids)} tokens")
        return found


def logprobs_of(choice: Mapping[str, Any], ids: Sequence[int]) -> list[float] | None:
    """The log probabilities of a prompt's ids in an answer, of either method; None if it has none.

    The first one is 0: nothing predicts the first token.
    """
    values: list[Any] = []
    listed, echoed = choice.get("prompt_logprobs"), choice.get("logprobs")
    if isinstance(listed, list) and len(listed) == len(ids):
        entries = [each if isinstance(each, dict) else {} for each in listed]
        own = [entry.get(str(idx)) for entry, idx in zip(entries, ids, strict=True)]
        values = [each.get("logprob") if isinstance(each, dict) else None for each in own]
    elif isinstance(echoed, dict) and isinstance(echoed.get("token_logprobs"), list):
        values = echoed["token_logprobs"][: len(ids)]  # the new token is the last one
    rest = [float(value) for value in values[1:] if isinstance(value, int | float) and not isinstance(value, bool)]
    return [0.0, *rest] if len(rest) == len(ids) - 1 else None


def open_text_reader(
    section: ServerSection,
    path: Path,
    *,
    bos: bool,
    rope_scaling: RopeScalingChoice,
    implementation: Implementation,
) -> ServedReader:
    """A reader for prompts of text. Reads tokenizer and sizes in the decoder's folder; it needs no weights.

    Raises WeightsError if there are no sizes, TokenizerError if the tokenizer is damaged or does not fit, and
    ServerError.
    """
    sizes = _SizesOnly(sizes=read_decoder_sizes(path, rope_scaling, implementation=implementation))
    settings = DecoderSettings(rope_scaling=rope_scaling, bos=bos)
    reader = reader_of(path, cast(OpenedDecoder, sizes), settings, is_whole=False)(decoder=cast(FrozenDecoder, sizes))
    served = _served(section, reader, path)
    return dataclasses.replace(served, nll_method=_find_nll_method(served))


def open_vector_reader(section: ServerSection, reader: DecoderReader, path: Path) -> ServedReader:
    """A reader for prompts of text and vectors.

    reader: the decoder with its embedding table.
    path: the decoder's folder.

    Raises ServerError if the server takes no prompt embeddings.
    """
    from arc_ds.inference.completions_server import RefusedError

    served = _served(section, reader, path)
    row = torch.zeros(1, reader.decoder.hidden_size, dtype=reader.dtype, device=reader.device)
    try:
        served.answer_rows([[row]], max_new_tokens=1)
    except RefusedError as error:
        if error.status not in _REFUSALS:
            raise
        raise ServerError(
            f"{error} It was sent a prompt of one vector of width {row.shape[1]}. Start it with prompt embeddings "
            f"(vLLM: --enable-prompt-embeds; arc-ds serve: --prompt-embeds) and with the decoder {path}."
        ) from error
    return served


def _served(section: ServerSection, reader: DecoderReader, path: Path) -> ServedReader:
    server = section.client()
    identity = server.identify(section.model)
    limits = [limit for limit in (reader.max_positions, identity.max_rows) if limit is not None]
    sizes = reader.decoder.sizes
    # Decoders through transformers always have the scaling of their files.
    if not isinstance(sizes, TransformersSizes) and sizes != read_decoder_sizes(path, "checkpoint"):
        logger.warning(
            f"the decoder {path} must run without rotary scaling, but the server {server.base} applies the scaling of "
            "its files. Remove it from the config.json that the server reads."
        )
    fields = {field.name: getattr(reader, field.name) for field in dataclasses.fields(DecoderReader)}
    fields |= {"name": path.name, "max_positions": min(limits, default=None)}
    return ServedReader(**fields, server=server, identity=identity)


def _find_nll_method(reader: ServedReader) -> NllMethod | None:
    """The first method with which the server gives the NLL of a short prompt; None if there is none."""
    from arc_ds.inference.completions_server import RefusedError

    last = min(reader.decoder.vocab_size, 32) - 1
    ids = list(range(last + 1))
    for method in _NLL_FIELDS:
        try:
            body = partial(reader._body, [TokenIds(ids)], max_tokens=1, **_options(Sampling()), **_NLL_FIELDS[method])
            (reply,) = reader.server.complete([body], refusals=_REFUSALS)
        except RefusedError as error:
            if error.status not in _REFUSALS:
                raise
            continue
        choices = reply.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict) and logprobs_of(choices[0], ids):
            return method
    return None


def reader_of_system(system: System) -> ServedReader | None:
    """The reader of a system whose decoder a server runs; None for other systems."""
    reader = getattr(system, "reader", None)
    return reader if isinstance(reader, ServedReader) else None


def offers_nll(system: System) -> bool:
    """Whether a system computes the NLL of an answer."""
    reader = reader_of_system(system)
    return reader is None or reader.nll_method is not None


def in_order_of_end(
    numbers: Sequence[int],
    system_of: Callable[[int], System],
    size_of: Callable[[int], int],
    answer: Callable[[int], T],
) -> Generator[tuple[int, T], None, None]:
    """Yield the answer to each batch, with the batch's number, as soon as it is complete.

    A local system answers one batch after another. Batches of a served system run in threads, so that the server always
    has work. If the caller stops, or an answer raises an error, the running requests end. Before the next system
    begins, the last one forgets its kept work.

    numbers: of the batches.
    system_of: system of a batch.
    size_of: number of prompts of a batch.
    answer: answers a batch.
    """
    last: System | None = None
    for _, group in groupby(numbers, key=lambda number: id(system_of(number))):
        members = list(group)
        if isinstance(last, KeepsWork):
            last.forget()
        system = last = system_of(members[0])
        reader = reader_of_system(system)
        if reader is None:
            yield from ((number, answer(number)) for number in members)
        else:
            yield from _ahead(members, reader.server, size_of, answer)


def _ahead(
    numbers: Sequence[int], server: CompletionsServer, size_of: Callable[[int], int], answer: Callable[[int], T]
) -> Generator[tuple[int, T], None, None]:
    """Batches in threads. They have twice as many prompts as may be in flight, since some are almost answered."""
    waiting, running = list(reversed(numbers)), dict[Future[T], int]()
    pool = ThreadPoolExecutor(max_workers=2 * server.in_flight, thread_name_prefix="batch")
    try:
        with server:
            while waiting or running:
                while waiting and sum(map(size_of, running.values())) < 2 * server.in_flight:
                    number = waiting.pop()
                    running[pool.submit(answer, number)] = number
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=lambda each: each.exception() is not None):  # nothing done is lost
                    yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ids_of(rows: Rows) -> list[int]:
    return [int(idx) for part in rows for idx in np.asarray(cast(TokenIds, part)).tolist()]


def _named_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The tokens of an answer, if the server names them."""
    ids = choice.get("token_ids")
    return ids if isinstance(ids, list) and all(isinstance(idx, int) and idx >= 0 for idx in ids) else None


def _options(sampling: Sampling) -> dict[str, Any]:
    """How tokens are chosen. Everything is stated, because vLLM takes defaults from the model's generation_config."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": int(sampling.seed) % 2**63,
        "n": 1,
        "stream": False,
    }
