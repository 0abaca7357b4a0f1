"""Batched generation with a KV cache from prompts of text and compressed contexts.

Each layer has one rectangular cache. A row is written at sequence * max_len + position, and a limit per query restricts
it to the filled part of its own sequence. Prefill (packed, ragged) and decoding (one row per sequence) therefore share
one forward.

Shape letters: B prompts, R rows of the prefill, Z compressed vectors, V vocabulary.
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
from arc_ds.model.backbone import LayerCache, Spans
from arc_ds.model.decoder import Decoder
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


class KVCache:
    """Keys and values of all layers for B sequences of at most `max_len` rows."""

    def __init__(self, decoder: Decoder, num_sequences: int, max_len: int) -> None:
        config, table = decoder.config, decoder.tok_embeddings.weight
        shape = (num_sequences, max_len, config.num_kv_heads, config.head_dim)
        self.max_len = max_len
        self._layers = [(table.new_zeros(shape), table.new_zeros(shape)) for _ in range(config.num_layers)]
        self._cu_keys = torch.arange(num_sequences + 1, device=table.device, dtype=torch.int32) * max_len

    def at(
        self, sequences: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Spans, list[LayerCache]]:
        """The spans of a forward over rows, and the cache of each layer.

        sequences: sequence of each row, int64 [rows].
        positions: position of each row in its sequence, int64 [rows].
        cu_seqlens: boundaries of the sequences among the rows.
        max_seqlen: length of the longest sequence among the rows.
        """
        spans = Spans(cu_seqlens, self._cu_keys, max_seqlen, self.max_len, k_limits=(positions + 1).to(torch.int32))
        rows = sequences * self.max_len + positions
        return spans, [LayerCache(keys, values, rows) for keys, values in self._layers]


@torch.no_grad()
def generate_ids(
    decoder: Decoder,
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
    _check_memory(decoder, num_sequences, batch.decoder_max_seqlen, max_new_tokens)
    cache = KVCache(decoder, num_sequences, batch.decoder_max_seqlen + max_new_tokens)
    choose = _Chooser(sampling or Sampling(), device)
    stop = torch.tensor(sorted(stop_ids), device=device, dtype=torch.int64)
    logits_BV, lengths_B = _prefill(decoder, batch, z_ZD, cache)
    done_B = torch.zeros(num_sequences, dtype=torch.bool, device=device)
    chosen: list[Tensor] = []
    for step in range(max_new_tokens):
        if on_logits is not None:
            on_logits(step, logits_BV)
        ids_B = choose(logits_BV)
        done_B = done_B | torch.isin(ids_B, stop)
        chosen.append(torch.where(done_B, -1, ids_B))
        if has_ended is not None:
            done_B = done_B | torch.tensor([has_ended(line) for line in _lines(chosen)], device=device)
        if step + 1 == max_new_tokens or bool(done_B.all()):
            break
        logits_BV = _advance(decoder, ids_B, lengths_B + step, cache)
    return _lines(chosen) if chosen else [[] for _ in range(num_sequences)]


def _lines(chosen: list[Tensor]) -> list[list[int]]:
    """The new tokens of each sequence, without the -1 after its end."""
    return [[token for token in line if token >= 0] for line in torch.stack(chosen, dim=1).tolist()]


def _check_memory(decoder: Decoder, num_sequences: int, prompt_rows: int, max_new_tokens: int) -> None:
    """Raise ConfigError if the cache does not fit into memory, before anything is allocated."""
    config, table = decoder.config, decoder.tok_embeddings.weight
    row_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * table.element_size()
    needed = row_bytes * num_sequences * (prompt_rows + max_new_tokens)
    usable = usable_memory_bytes(table.device)
    if needed > usable:
        raise ConfigError(
            f"keys and values of {num_sequences} prompts of up to {prompt_rows:,} tokens and max_new_tokens "
            f"{max_new_tokens:,} take {needed / GIB:.1f} GiB; {usable / GIB:.1f} GiB can be used. Lower "
            "max_new_tokens, or generate fewer or shorter prompts at once."
        )


def _prefill(decoder: Decoder, batch: PackedBatch, z_ZD: Tensor | None, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Logits [B, V] of the last row of each sequence, and the lengths [B] of the sequences."""
    cu = batch.decoder_cu_seqlens.long()
    lengths_B = cu[1:] - cu[:-1]
    sequences_R = torch.repeat_interleave(
        torch.arange(lengths_B.numel(), device=cu.device), lengths_B, output_size=batch.num_decoder_rows
    )
    places = cache.at(sequences_R, batch.decoder_positions, batch.decoder_cu_seqlens, batch.decoder_max_seqlen)
    h_RD = decoder.run_layers(decoder.embed(batch, z_ZD), batch.decoder_positions, *places)
    return decoder.output(decoder.norm(h_RD[cu[1:] - 1])), lengths_B


def _advance(decoder: Decoder, ids_B: Tensor, positions_B: Tensor, cache: KVCache) -> Tensor:
    """Logits [B, V] after one more token per sequence."""
    sequences = torch.arange(ids_B.numel(), device=ids_B.device)
    cu = torch.arange(ids_B.numel() + 1, device=ids_B.device, dtype=torch.int32)
    x_BD = decoder.tok_embeddings(ids_B, sequences)
    h_BD = decoder.run_layers(x_BD, positions_B, *cache.at(sequences, positions_B, cu, 1))
    return decoder.output(decoder.norm(h_BD))


class _Chooser:
    """Choose the next token of each sequence. Keeps the random state between steps."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator = torch.Generator(device).manual_seed(int(sampling.seed))

    def __call__(self, logits_BV: Tensor) -> Tensor:
        if self.sampling.temperature == 0:
            return logits_BV.argmax(dim=-1)
        lowest, highest = _TEMPERATURES
        temperature = float(min(max(self.sampling.temperature, lowest), highest))
        probs, order = torch.softmax(logits_BV / temperature, dim=-1).sort(dim=-1, descending=True)
        beyond = probs.cumsum(dim=-1) - probs >= self.sampling.top_p  # keeps the token that crosses top_p
        beyond[:, 0] = False  # a top_p below float32's smallest number would leave no token
        drawn = torch.multinomial(probs.masked_fill(beyond, 0.0), 1, generator=self.generator)
        return order.gather(1, drawn).squeeze(1)
