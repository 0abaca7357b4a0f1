"""The interface of frozen decoders. Training, validation and inference use nothing else of them.

Shape letters: R rows, Z compressed vectors, L labels, D width, V vocabulary, B sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch


class FrozenDecoder(nn.Module, ABC):
    """A causal LM with frozen parameters. Gradients flow through it to the compressed vectors.

    In every method, `z_ZD` are the compressed vectors of the batch (None: text only). They are in the space of the
    rows that `embed` returns.
    """

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width D of its embeddings."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number V of ids that it has embeddings of."""

    @property
    @abstractmethod
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        """Classes of its layers. ZeRO-3 gathers the parameters of a layer together."""

    @property
    @abstractmethod
    def cache_row_bytes(self) -> int:
        """Bytes that one row of one sequence takes in the cache of a generation."""

    @abstractmethod
    def forward(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        """NLL in nats of each label of the batch, float32 [L]."""

    @abstractmethod
    def logits(self, batch: PackedBatch, z_ZD: Tensor | None, rows: Tensor) -> Tensor:
        """Logits of the given rows (int64 [n]): float32 [n, V]."""

    @abstractmethod
    def embed(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        """Token embeddings with the compressed vectors between them, [R, D]."""

    @abstractmethod
    def prefill(self, batch: PackedBatch, z_ZD: Tensor | None, max_new_tokens: int) -> tuple[Tensor, Any]:
        """Start a generation: logits after the last row of each sequence, float32 [B, V], and the state for `advance`.

        max_new_tokens: maximum number of calls of `advance`.
        """

    @abstractmethod
    def advance(self, ids_B: Tensor, state: Any) -> Tensor:
        """Logits after one more token per sequence, float32 [B, V]. Changes the state.

        state: from `prefill`.
        """
