"""The interface of frozen decoders. Training, validation and inference use nothing else of them.

Shape letters: R rows, Z compressed vectors, L labels, D width, V vocabulary, B sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch
from arc_ds.model.backbone_config import BackboneConfig


@dataclass(frozen=True, kw_only=True)
class TransformersSizes:
    """The sizes of a decoder that `transformers` computes.

    model_type: name of the architecture in config.json.
    hidden_size: width of its embeddings.
    vocab_size: number of its embeddings.
    num_parameters: number of all parameters; a tied head counts once.
    layer_parameters: number of parameters in its layers. With experts, a row uses only some of them.
    attention_size: sum of the widths of the query heads of all layers; 0 if its config does not state them.
    max_positions: length of the longest sequence that it computes; None if there is no limit (`check_length`).
    cache_row_values: numbers that one row adds to the cache of a generation; 0 if its config does not state them.
    config_digest: sha256 of its config.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    num_parameters: int
    layer_parameters: int
    attention_size: int
    max_positions: int | None
    cache_row_values: int
    config_digest: str


DecoderSizes = BackboneConfig | TransformersSizes


class FrozenDecoder(nn.Module, ABC):
    """A causal LM with frozen parameters. Gradients flow through it to the compressed vectors.

    In every method, `z_ZD` are the compressed vectors of the batch (None: text only). They are in the space of the
    rows that `embed` returns.

    implementation: "native" for our packed transformer, "transformers" for the model's own code.
    """

    implementation: ClassVar[Literal["native", "transformers"]]

    @property
    @abstractmethod
    def sizes(self) -> DecoderSizes:
        """Its sizes."""

    @property
    def hidden_size(self) -> int:
        """Width D of its embeddings."""
        return self.sizes.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number V of its embeddings."""
        return self.sizes.vocab_size

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
    def prefill(
        self,
        batch: PackedBatch,
        z_ZD: Tensor | None,
        max_new_tokens: int,
        shared: Any = None,
        max_len: int | None = None,
    ) -> tuple[Tensor, Any]:
        """Start a generation: logits after the last row of each sequence, float32 [B, V], and the state for `advance`.

        max_new_tokens: maximum number of calls of `advance`.
        shared: rows before every sequence, from `read_shared`; None: none.
        max_len: length of every sequence for rotary scalings that depend on it. The default is that of the longest
            sequence of the batch, with its shared rows and all new tokens.
        """

    @abstractmethod
    def advance(self, ids_B: Tensor, state: Any) -> Tensor:
        """Logits after one more token per sequence, float32 [B, V]. Changes the state.

        state: from `prefill`.
        """

    def read_shared(self, batch: PackedBatch, z_ZD: Tensor | None, max_len: int | None) -> Any:
        """Read rows that stand before every sequence of later calls. None if each sequence must read them itself.

        batch: one sequence, the shared rows.
        max_len: see `prefill`. None: sequences have lengths of their own.
        """
        return None

    def keep(self, state: Any, sequences: Tensor) -> bool:
        """Drop all other sequences from the state of a generation. False if this decoder cannot; all stay then.

        sequences: places of the sequences that stay, int64, ascending.
        """
        return False

    def label_nll(self, batch: PackedBatch, z_ZD: Tensor | None, shared: Any = None) -> Tensor:
        """NLL in nats of each label of the batch, float32 [L].

        shared: rows before every sequence, from `read_shared` without a length; None: none.
        """
        assert shared is None, "only a decoder that reads shared rows can have some"
        nll_L: Tensor = self(batch, z_ZD)
        return nll_L


def sequences_of_rows(batch: PackedBatch) -> Tensor:
    """The sequence of each decoder row, int64 [R]."""
    lengths_B = batch.decoder_cu_seqlens.diff().long()
    numbers = torch.arange(lengths_B.numel(), device=lengths_B.device)
    return torch.repeat_interleave(numbers, lengths_B, output_size=batch.num_decoder_rows)
