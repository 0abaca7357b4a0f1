"""New tokens of a packed batch, as the decoder alone chooses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.inference.generate import Chooser, Sampling, continue_batch
from arc_ds.model.frozen_decoder import FrozenDecoder


def generate_ids(
    decoder: FrozenDecoder,
    batch: PackedBatch,
    z_ZD: Tensor | None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_logits: Callable[[Tensor], None] = lambda _: None,
    **options: Any,
) -> list[list[int]]:
    """The new tokens of every sequence. on_logits: called with the logits before each choice."""
    chooser = Chooser(sampling or Sampling(), batch.decoder_ids.device)

    def choose(logits_BV: Tensor, rows: Sequence[int], num_sequences: int) -> Tensor:
        on_logits(logits_BV)
        return chooser(logits_BV, rows, num_sequences)

    limits = [max_new_tokens] * len(batch.tasks)
    return [line.ids for line in continue_batch(decoder, batch, z_ZD, max_new_tokens=limits, choose=choose, **options)]
