"""The sequences in a step's batches, to compare batches with different distribution and packing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from arc_ds.batch.packing import PackedBatch
from arc_ds.data.loading.step_batch import StepBatch


def sequences(batches: Iterable[StepBatch]) -> dict[int, Counter[tuple[Any, ...]]]:
    """Decoder, task, ids, contexts and labels of every sequence of each step, over all ranks and micro-batches."""
    found: dict[int, Counter[tuple[Any, ...]]] = {}
    for batch in batches:
        of_step = found.setdefault(batch.step, Counter())
        for micro in batch.micro_batches:
            of_step.update((micro.decoder_idx, *sequence) for sequence in _unpack(micro.batch))
    return found


def digest(batch: StepBatch) -> str:
    """sha256 over all numbers of a batch and their positions."""
    state = hashlib.sha256()
    _feed(state, batch)
    return state.hexdigest()


def _unpack(batch: PackedBatch) -> Iterable[tuple[Any, ...]]:
    bounds = batch.decoder_cu_seqlens.numpy()
    of_text = _sequence_of(bounds, batch.text_rows.numpy())
    first_output = batch.levels[-1].cu_seqlens.numpy()[:-1]
    of_context = _sequence_of(bounds, batch.compressed_rows.numpy()[batch.output_slots.numpy()[first_output]])
    contexts = np.split(batch.encoder_ids.numpy(), batch.encoder_cu_seqlens.numpy()[1:-1])
    of_label = batch.label_sequences.numpy()
    for idx, task in enumerate(batch.tasks):
        yield (
            task,
            tuple(batch.decoder_ids.numpy()[of_text == idx].tolist()),
            tuple(tuple(contexts[place].tolist()) for place in np.flatnonzero(of_context == idx)),
            tuple((batch.label_rows.numpy()[of_label == idx] - bounds[idx]).tolist()),
            tuple(batch.labels.numpy()[of_label == idx].tolist()),
        )


def _sequence_of(bounds: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(bounds, rows, side="right") - 1


def _feed(state: Any, value: object) -> None:
    if isinstance(value, torch.Tensor):
        state.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    elif isinstance(value, tuple):
        state.update(f"({len(value)}".encode())
        for item in value:
            _feed(state, item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _feed(state, getattr(value, field.name))
    else:
        state.update(repr(value).encode())
