"""The cache of a native decoder's generation.

Each layer has one rectangular cache. A row is written at sequence * max_len + position, and a limit per query restricts
it to the filled part of its own sequence. Prefill (packed, ragged) and decoding (one row per sequence) therefore share
one forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arc_ds.model.backbone import LayerCache, Spans
from arc_ds.model.backbone_config import BackboneConfig


class KVCache:
    """Keys and values of all layers for B sequences of at most `max_len` rows.

    like: a tensor of the decoder, with its dtype and device.
    lengths_B: number of rows of each sequence so far, int64 [B].
    """

    def __init__(self, config: BackboneConfig, like: Tensor, lengths_B: Tensor, max_len: int) -> None:
        num_sequences = lengths_B.numel()
        shape = (num_sequences, max_len, config.num_kv_heads, config.head_dim)
        self.max_len = max_len
        self.lengths_B = lengths_B
        self._layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_layers)]
        self._cu_keys = torch.arange(num_sequences + 1, device=like.device, dtype=torch.int32) * max_len

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
