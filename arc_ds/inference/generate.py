"""Batched generation from prompts of text and compressed contexts.

Shape letters: B prompts, Z compressed vectors, D width, V vocabulary.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.errors import ConfigError
from arc_ds.model.frozen_decoder import FrozenDecoder
from arc_ds.model.kv_cache import SharedRows
from arc_ds.system.device import GIB, usable_memory_bytes

MAX_NEW_TOKENS = 2**31 - 1  # positions in a cache are int32
# Logits divided by a temperature in this range are finite in float32. Outside, the choice is greedy or uniform anyway.
_TEMPERATURES = (1e-30, 1e30)
# Sequences leave once they are at least one of so many rows: the cache is copied each time.
_MIN_PART_LEAVING = 8

StopReason = Literal["string", "eos", "length"]


def whole_number(name: str, value: object, *, at_least: int, at_most: int) -> int:
    """The value as an int. Raises ConfigError if it is not a whole number in the range."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not at_least <= number <= at_most:
        raise ConfigError(f"{name} is {value!r}; expected a whole number from {at_least} to {at_most}")
    return number


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 is greedy; otherwise at least 0.
    top_p: sample from the smallest set of tokens whose probability reaches this value, in (0, 1].
    seed: seed of the random generator, from -2**63 to 2**64 - 1.

    Raises ConfigError on a negative or infinite temperature, a top_p outside (0, 1] or a seed out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        are_numbers = isinstance(self.temperature, Real) and isinstance(self.top_p, Real)
        if not are_numbers or not 0 <= self.temperature <= sys.float_info.max or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature is {self.temperature!r} and top_p {self.top_p!r}; expected two numbers: a finite "
                "temperature >= 0, and 0 < top_p <= 1"
            )
        whole_number("seed", self.seed, at_least=-(2**63), at_most=2**64 - 1)


class Continuation(NamedTuple):
    """The new tokens of a sequence, and why they end: at a stop text, at a stop id (which is left out), or a limit."""

    ids: list[int]
    stop: StopReason


# The next token of each row: see `Chooser`.
Choose = Callable[[Tensor, Sequence[int], int], Tensor]


class Chooser:
    """Choose the next token of each sequence. Keeps the random state between steps."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device).manual_seed(int(sampling.seed))

    def __call__(self, logits_BV: Tensor, sequences: Sequence[int], num_sequences: int) -> Tensor:
        """The next token of each row, int64 [B]. A drawn one does not depend on which sequences have left.

        sequences: the sequence of each row.
        num_sequences: number of sequences at the start.
        """
        if self.sampling.temperature == 0:
            return logits_BV.argmax(dim=-1)
        if len(sequences) == num_sequences:
            return self._draw(logits_BV)
        rows_B = torch.tensor(sequences, device=logits_BV.device)
        all_logits = logits_BV.new_zeros(num_sequences, logits_BV.shape[1]).index_copy(0, rows_B, logits_BV)
        return self._draw(all_logits)[rows_B]

    def _draw(self, logits_BV: Tensor) -> Tensor:
        lowest, highest = _TEMPERATURES
        temperature = float(min(max(self.sampling.temperature, lowest), highest))
        probs, order = torch.softmax(logits_BV / temperature, dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= self.sampling.top_p  # keeps the token that crosses top_p
        beyond[:, 0] = False  # a top_p below float32's smallest number would leave no token
        drawn = torch.multinomial(probs.masked_fill(beyond, 0.0), 1, generator=self.generator)
        return order.gather(1, drawn).squeeze(1)


@torch.no_grad()
def continue_batch(
    decoder: FrozenDecoder,
    batch: PackedBatch,
    z_ZD: Tensor | None,
    *,
    max_new_tokens: Sequence[int],
    choose: Choose,
    stop_ids: Collection[int] = (),
    has_ended: Callable[[int, list[int]], bool] | None = None,
    shared: SharedRows | None = None,
    max_len: int | None = None,
) -> list[Continuation]:
    """Continue every sequence of the batch. A sequence that has ended leaves the batch, if the decoder allows it.

    The first token is predicted from the last row of a sequence, which may be a text token, a compressed vector or a
    marker. The host waits for the device once in a step.

    z_ZD: compressed vectors of the batch; None for text only.
    max_new_tokens: limit of each sequence.
    choose: chooses tokens.
    stop_ids: tokens that end a sequence.
    has_ended: called after every step with (index, new tokens) of each sequence that had not ended before it. True ends
        the sequence.
    shared: see `FrozenDecoder.prefill`.
    max_len: see `FrozenDecoder.prefill`.

    Raises ConfigError if the cache does not fit into memory.
    """
    longest, stops = max(max_new_tokens), frozenset(stop_ids)
    lines: list[list[int]] = [[] for _ in max_new_tokens]
    ends: list[StopReason | None] = ["length" if limit == 0 else None for limit in max_new_tokens]
    rows = list(range(len(lines)))  # the sequence of each row that the decoder computes
    _check_memory(decoder, batch, longest)
    if longest == 0:
        return [Continuation([], "length") for _ in lines]
    logits_BV, state = decoder.prefill(batch, z_ZD, longest, shared, max_len)
    while True:
        ids_B = choose(logits_BV, rows, len(lines))
        for idx, token in zip(rows, ids_B.tolist(), strict=True):
            if ends[idx] is None:
                ends[idx] = _end_after(
                    token,
                    lines[idx],
                    token in stops,
                    max_new_tokens[idx],
                    partial(has_ended, idx) if has_ended else None,
                )
        staying = [place for place, idx in enumerate(rows) if ends[idx] is None]
        if not staying:
            break
        if _MIN_PART_LEAVING * (len(rows) - len(staying)) >= len(rows):
            staying_B = torch.tensor(staying, device=ids_B.device)
            if decoder.keep(state, staying_B):
                rows, ids_B = [rows[place] for place in staying], ids_B[staying_B]
        logits_BV = decoder.advance(ids_B, state)
    return [Continuation(line, end) for line, end in zip(lines, ends, strict=True) if end is not None]


def _end_after(
    token: int, line: list[int], is_stop: bool, limit: int, has_ended: Callable[[list[int]], bool] | None
) -> StopReason | None:
    """Add a token to a line unless it is a stop. The reason if the line has ended."""
    if not is_stop:
        line.append(token)
    is_ended = has_ended is not None and has_ended(line)
    if is_stop:
        return "eos"
    if is_ended:
        return "string"
    return "length" if len(line) == limit else None


def _check_memory(decoder: FrozenDecoder, batch: PackedBatch, max_new_tokens: int) -> None:
    """Raise ConfigError if the cache does not fit into memory, before anything is allocated."""
    num_sequences, prompt_rows = batch.decoder_cu_seqlens.numel() - 1, batch.decoder_max_seqlen
    needed = decoder.cache_row_bytes * num_sequences * (prompt_rows + max_new_tokens)
    usable = usable_memory_bytes(batch.decoder_ids.device)
    if needed > usable:
        raise ConfigError(
            f"keys and values of {num_sequences} prompts of up to {prompt_rows:,} tokens and max_new_tokens "
            f"{max_new_tokens:,} take {needed / GIB:.1f} GiB; {usable / GIB:.1f} GiB can be used. Lower "
            "max_new_tokens, or generate fewer or shorter prompts at once (max_batch_rows of an evaluation)."
        )
