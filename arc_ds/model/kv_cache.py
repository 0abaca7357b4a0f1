"""The cache of a native decoder's generation.

Rows with which all sequences begin are held once (`SharedRows`). Each sequence adds the rows of its own.

Shape letters: B sequences, P shared rows, S own rows, T new rows, N heads, K kv heads, R heads of a kv head, H head
size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arc_ds.model.backbone_config import BackboneConfig


class KeysValues(NamedTuple):
    """Rotated keys and values of a layer."""

    keys: Tensor
    values: Tensor


class SharedRows(NamedTuple):
    """The first rows of all sequences of a generation.

    layers: keys and values of each layer, [P, K, H] each.
    num_rows: P.
    max_len: see `KVCache`; None if no rotary scaling depends on it.
    """

    layers: list[KeysValues]
    num_rows: int
    max_len: int | None


class RecordedRows:
    """A cache of one layer that keeps the keys and values of the rows that pass."""

    def __init__(self) -> None:
        self.rows: KeysValues | None = None

    def update(self, k_TKH: Tensor, v_TKH: Tensor) -> KeysValues:
        self.rows = KeysValues(k_TKH, v_TKH)
        return self.rows


class PromptRows(NamedTuple):
    """The cache of one layer while it reads the own rows of all prompts, packed.

    shared: keys and values of the shared rows; None if there are none.
    sources_U: place of each key among the shared rows and the new rows after them, int64. Not read without shared
        rows.
    own: keys and values of the own rows, which are written; None if they are not needed later.
    sequences_T: sequence of each new row, int64.
    places_T: place of each new row among the own rows of its sequence, int64.
    """

    shared: KeysValues | None
    sources_U: Tensor
    own: KeysValues | None
    sequences_T: Tensor
    places_T: Tensor

    def update(self, k_TKH: Tensor, v_TKH: Tensor) -> KeysValues:
        """Keep the new rows, and return the keys and values of all rows, packed by sequence."""
        new = KeysValues(k_TKH, v_TKH)
        if self.own is not None:
            for kept, rows in zip(self.own, new, strict=True):
                kept.transpose(1, 2)[self.sequences_T, self.places_T] = rows
        if self.shared is None:
            return new
        return KeysValues(
            *(torch.cat(both).index_select(0, self.sources_U) for both in zip(self.shared, new, strict=True))
        )


class StepRows(NamedTuple):
    """The cache of one layer during a step: every sequence reads one new row.

    shared: keys and values of the shared rows, [P, K, H] each; None if there are none.
    own: keys and values of the own rows, [B, K, S, H] each.
    places_B: place of the new row among the own rows of its sequence, int64.
    num_own: number of own rows of the longest sequence, with the new one.
    """

    shared: KeysValues | None
    own: KeysValues
    places_B: Tensor
    num_own: int

    def attend(self, q_BNH: Tensor, k_BKH: Tensor, v_BKH: Tensor, *, window: int | None, scale: float | None) -> Tensor:
        """Write the new row and attend to all rows of its sequence: [B, N, H].

        Shared rows are read once for all sequences. Products and softmax are in float32 at least.

        q_BNH: rotated queries.
        k_BKH: rotated keys of the new rows.
        v_BKH: their values.
        window: see `arc_kernels.attention_varlen`.
        scale: factor of the scores; None for 1 / sqrt(H).
        """
        sequences = torch.arange(q_BNH.shape[0], device=q_BNH.device)
        for kept, rows in zip(self.own, (k_BKH, v_BKH), strict=True):
            kept[sequences, :, self.places_B] = rows
        dtype = torch.promote_types(q_BNH.dtype, torch.float32)
        own_k, own_v = (x[:, :, : self.num_own].to(dtype) for x in self.own)
        scale = q_BNH.shape[-1] ** -0.5 if scale is None else scale
        q_BKRH = (q_BNH.to(dtype) * scale).unflatten(1, (k_BKH.shape[1], -1))
        scores = q_BKRH @ own_k.transpose(-1, -2)
        if self.shared is None:
            probs = scores.masked_fill(self._hidden(0, window), -torch.inf).softmax(dim=-1)
            return (probs @ own_v).flatten(1, 2).to(q_BNH.dtype)
        shared_k, shared_v = (x.to(dtype).transpose(0, 1) for x in self.shared)
        num_shared = shared_k.shape[1]
        q_KXH = q_BKRH.transpose(0, 1).flatten(1, 2)
        shared_scores = (q_KXH @ shared_k.transpose(-1, -2)).unflatten(1, (q_BNH.shape[0], -1)).transpose(0, 1)
        scores = torch.cat((shared_scores, scores), dim=-1)
        probs = scores.masked_fill(self._hidden(num_shared, window), -torch.inf).softmax(dim=-1)
        shared_probs, own_probs = probs.split((num_shared, self.num_own), dim=-1)
        shared_o = (shared_probs.transpose(0, 1).flatten(1, 2) @ shared_v).unflatten(1, (q_BNH.shape[0], -1))
        return (own_probs @ own_v + shared_o.transpose(0, 1)).flatten(1, 2).to(q_BNH.dtype)

    def _hidden(self, num_shared: int, window: int | None) -> Tensor:
        """Whether a key is hidden from the query of its sequence, bool [B, 1, 1, P + S]."""
        limits_B1 = (self.places_B + num_shared + 1)[:, None]
        keys = torch.arange(num_shared + self.num_own, device=limits_B1.device)
        hidden = keys >= limits_B1
        if window is not None:
            hidden = hidden | (keys < limits_B1 - window)
        return hidden[:, None, None]


class LayerCache(NamedTuple):
    """The cache of one layer during a step of an attention kernel, which reads the own rows as packed sequences.

    own: keys and values, [B, S, K, H] each.
    rows: place of each new row, sequence * S + place, int64 [B].
    """

    own: KeysValues
    rows: Tensor

    def update(self, k_BKH: Tensor, v_BKH: Tensor) -> KeysValues:
        """Write the new rows and return all keys and values, [B * S, K, H] each."""
        keys, values = (x.flatten(0, 1) for x in self.own)
        keys[self.rows], values[self.rows] = k_BKH, v_BKH
        return KeysValues(keys, values)


class KVCache:
    """Keys and values of all layers for B sequences.

    On a GPU without shared rows an attention kernel reads the own rows, which are then [B, S, K, H] in memory.
    Otherwise `StepRows` reads them, and they are [B, K, S, H].

    like: a tensor of the decoder, with its dtype and device.
    lengths_B: number of own rows of each sequence so far, int64 [B].
    num_own: number of own rows of the longest sequence so far.
    max_own: the most own rows that a sequence will have.
    max_len: length of every sequence for rotary scalings that depend on it.
    shared: the rows before them; None if there are none.
    """

    def __init__(
        self,
        config: BackboneConfig,
        like: Tensor,
        *,
        lengths_B: Tensor,
        num_own: int,
        max_own: int,
        max_len: int,
        shared: SharedRows | None = None,
    ) -> None:
        self.lengths_B, self.num_own, self.max_len, self.shared = lengths_B, num_own, max_len, shared
        self.by_kernel = shared is None and like.is_cuda
        sizes = (max_own, config.num_kv_heads) if self.by_kernel else (config.num_kv_heads, max_own)
        shape = (lengths_B.numel(), *sizes, config.head_dim)
        self.layers = [KeysValues(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_layers)]

    @property
    def num_shared(self) -> int:
        """Number of shared rows."""
        return 0 if self.shared is None else self.shared.num_rows

    def by_head(self) -> list[KeysValues]:
        """The own rows of each layer as views [B, K, S, H]."""
        return [KeysValues(*(x.transpose(1, 2) for x in layer)) if self.by_kernel else layer for layer in self.layers]

    def at_step(self) -> list[StepRows] | list[LayerCache]:
        """The cache of each layer for one more row of every sequence, which it then counts."""
        places_B = self.lengths_B
        self.lengths_B, self.num_own = self.lengths_B + 1, self.num_own + 1
        if self.by_kernel:
            rows = torch.arange(places_B.numel(), device=places_B.device) * self.layers[0].keys.shape[1] + places_B
            return [LayerCache(layer, rows) for layer in self.layers]
        shared = [None] * len(self.layers) if self.shared is None else self.shared.layers
        return [
            StepRows(before, layer, places_B, self.num_own) for before, layer in zip(shared, self.layers, strict=True)
        ]

    def keep(self, sequences: Tensor) -> None:
        """Drop all other sequences.

        sequences: places of the sequences that stay, int64, ascending.
        """
        self.lengths_B = self.lengths_B[sequences]
        for idx, layer in enumerate(self.layers):  # layer by layer, so two copies of the cache never exist
            self.layers[idx] = KeysValues(*(x.index_select(0, sequences) for x in layer))


def prompt_rows(
    cu_seqlens: Tensor,
    sequences_T: Tensor,
    places_T: Tensor,
    shared: SharedRows | None,
    own: list[KeysValues] | None,
    num_layers: int,
) -> tuple[Tensor, list[PromptRows]]:
    """(boundaries of the keys of each sequence, the cache of each layer) for the own rows of packed prompts.

    cu_seqlens: boundaries of the own rows, int32 [B + 1].
    sequences_T: sequence of each row.
    places_T: place of each row in its sequence, without the shared rows.
    own: where to write the keys and values, `KVCache.by_head`; None: nowhere.
    """
    num_shared = 0 if shared is None else shared.num_rows
    starts = torch.arange(cu_seqlens.numel(), device=cu_seqlens.device, dtype=torch.int32) * num_shared
    cu_keys = cu_seqlens + starts
    sources_U = _sources(cu_seqlens.long(), num_shared, sequences_T.numel()) if num_shared else places_T
    before = [None] * num_layers if shared is None else shared.layers
    kept = [None] * num_layers if own is None else own
    return cu_keys, [PromptRows(s, sources_U, o, sequences_T, places_T) for s, o in zip(before, kept, strict=True)]


def _sources(cu_seqlens: Tensor, num_shared: int, num_rows: int) -> Tensor:
    """Keys of all sequences in order: the shared rows 0 … P - 1, then the own ones, P + row. int64."""
    num_sequences = cu_seqlens.numel() - 1
    lengths_B = cu_seqlens.diff() + num_shared
    total = num_rows + num_sequences * num_shared
    starts_B = lengths_B.cumsum(0) - lengths_B
    places_U = torch.arange(total, device=cu_seqlens.device) - torch.repeat_interleave(
        starts_B, lengths_B, output_size=total
    )
    own_U = places_U + torch.repeat_interleave(cu_seqlens[:-1], lengths_B, output_size=total)
    return torch.where(places_U < num_shared, places_U, own_U)
