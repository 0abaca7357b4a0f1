"""Batched generation from prompts of text and compressed contexts.

Shape letters: B prompts, Z compressed vectors, D width, V vocabulary.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.errors import ConfigError
from arc_ds.model.frozen_decoder import FrozenDecoder
from arc_ds.system.device import GIB, usable_memory_bytes

MAX_NEW_TOKENS = 2**31 - 1  # positions in a cache are int32
# Logits divided by a temperature in this range are finite in float32. Outside, the choice is greedy or uniform anyway.
_TEMPERATURES = (1e-30, 1e30)


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


@torch.no_grad()
def generate_ids(
    decoder: FrozenDecoder,
    batch: PackedBatch,
    z_ZD: Tensor | None,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    has_ended: Callable[[list[int]], bool] | None = None,
    on_logits: Callable[[int, Tensor], None] | None = None,
) -> list[list[int]]:
    """Continue every sequence of the batch by at most `max_new_tokens` tokens.

    The first token is predicted from the last row of a sequence, which may be a text token, a compressed vector or a
    marker.

    z_ZD: compressed vectors of the batch; None for text only.
    stop_ids: tokens that end a sequence. They are not returned.
    has_ended: called with the new tokens of each sequence after every step; True ends the sequence.
    on_logits: called with (step, float32 logits [B, V]) before each choice, for inspection.

    Raises ConfigError on a negative number of new tokens, or one whose cache does not fit into memory.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, at_least=0, at_most=MAX_NEW_TOKENS)
    num_sequences, device = batch.decoder_cu_seqlens.numel() - 1, batch.decoder_ids.device
    _check_memory(decoder, batch, max_new_tokens)
    sampling = sampling or Sampling()
    generator = torch.Generator(device).manual_seed(int(sampling.seed))
    stop = torch.tensor(sorted(stop_ids), device=device, dtype=torch.int64)
    logits_BV, state = decoder.prefill(batch, z_ZD, max_new_tokens)
    done_B = torch.zeros(num_sequences, dtype=torch.bool, device=device)
    chosen: list[Tensor] = []
    for step in range(max_new_tokens):
        if on_logits is not None:
            on_logits(step, logits_BV)
        ids_B = _choose(logits_BV, sampling, generator)
        done_B = done_B | torch.isin(ids_B, stop)
        chosen.append(torch.where(done_B, -1, ids_B))
        if has_ended is not None:
            done_B = done_B | torch.tensor([has_ended(line) for line in _lines(chosen)], device=device)
        if step + 1 == max_new_tokens or bool(done_B.all()):
            break
        logits_BV = decoder.advance(ids_B, state)
    return _lines(chosen) if chosen else [[] for _ in range(num_sequences)]


def _lines(chosen: list[Tensor]) -> list[list[int]]:
    """The new tokens of each sequence, without the -1 after its end."""
    return [[token for token in line if token >= 0] for line in torch.stack(chosen, dim=1).tolist()]


def _check_memory(decoder: FrozenDecoder, batch: PackedBatch, max_new_tokens: int) -> None:
    """Raise ConfigError if the cache does not fit into memory, before anything is allocated."""
    num_sequences, prompt_rows = batch.decoder_cu_seqlens.numel() - 1, batch.decoder_max_seqlen
    needed = decoder.cache_row_bytes * num_sequences * (prompt_rows + max_new_tokens)
    usable = usable_memory_bytes(batch.decoder_ids.device)
    if needed > usable:
        raise ConfigError(
            f"keys and values of {num_sequences} prompts of up to {prompt_rows:,} tokens and max_new_tokens "
            f"{max_new_tokens:,} take {needed / GIB:.1f} GiB; {usable / GIB:.1f} GiB can be used. Lower "
            "max_new_tokens, or generate fewer or shorter prompts at once."
        )


def _choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each sequence."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    lowest, highest = _TEMPERATURES
    temperature = float(min(max(sampling.temperature, lowest), highest))
    probs, order = torch.softmax(logits_BV / temperature, dim=-1).sort(dim=-1, descending=True)
    beyond = probs.cumsum(dim=-1) - probs >= sampling.top_p  # keeps the token that crosses top_p
    beyond[:, 0] = False  # a top_p below float32's smallest number would leave no token
    drawn = torch.multinomial(probs.masked_fill(beyond, 0.0), 1, generator=generator)
    return order.gather(1, drawn).squeeze(1)
