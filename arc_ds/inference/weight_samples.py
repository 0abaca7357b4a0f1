"""Samples of a decoder's weights, by which an export recognises the decoder that it was trained for.

A sample is 32 values from the middle row of each of 16 tensors, evenly spread over the model: 2 KiB that take
milliseconds to read. Tensors go by our internal names, so the samples of a model do not depend on its container, its
split into files or its name. They distinguish other models, other trainings and most fine-tunings of one model. They
miss changes elsewhere, such as single rows that were edited. A decoder that runs through transformers is sampled by the
names in its files.

Rounding to another float dtype changes a sample by at most 2^-8 of its value. Quantisation changes it by up to a
quarter (4-bit formats: about 8%), so in GGUF files a fine-tuned model passes as the original.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from arc_ds.errors import WeightsError
from arc_ds.inference.decoders import NativeFiles, OpenedDecoder
from arc_ds.model.weights.names import Shape

logger = logging.getLogger(__name__)

_NUM_TENSORS = 16
_NUM_VALUES = 32
_FLOATS = ("F64", "F32", "F16", "BF16")
_ROUNDED = 2.0**-8  # bfloat16 has 8 significant bits
_QUANTISED = 0.25


def sample_weights(decoder: OpenedDecoder) -> dict[str, Any]:
    """Plain values for a JSON file: the samples as base64 of float32, and whether the file is GGUF.

    Raises WeightsError if a tensor cannot be read.
    """
    if isinstance(decoder, NativeFiles):
        values = _sample(decoder.tensors.shapes, decoder.tensors.tensor)
    else:
        entries = _stored_floats([file for file in decoder.files if file.suffix == ".safetensors"])
        shapes = {name: tuple(entries[name].get_shape()) for name in sorted(entries)}
        values = _sample(shapes, lambda name, rows: entries[name][rows])
    samples = base64.b64encode(values.numpy().astype("<f4").tobytes()).decode("ascii")
    return {"samples": samples, "gguf": any(file.suffix == ".gguf" for file in decoder.files)}


def sample_digest(decoder: nn.Module) -> str:
    """sha256 of the samples of a loaded decoder, in float32. It depends on the dtype of the weights."""
    tensors = dict(decoder.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
    values = _sample(shapes, lambda name, rows: tensors[name].detach()[rows].cpu())
    return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()


def check_weights(
    decoder: OpenedDecoder, recorded: Mapping[str, Any] | None, path: Path, arc_dir: str | Path, *, force: bool
) -> None:
    """Raise WeightsError if a decoder is another model than the one that a port was trained for.

    recorded: the result of `sample_weights` in training; None if the export records none, which passes.
    path: of the decoder.
    arc_dir: of the export.
    force: warn instead.
    """
    if not recorded:
        return
    difference = difference_of_models(recorded, sample_weights(decoder))
    if difference is None:
        return
    message = (
        f"decoder {path} is another model than the one that {arc_dir} was trained for: samples of its weights differ "
        f"by {difference:.1%}. The vectors have their meaning for that model alone."
    )
    if not force:
        raise WeightsError(f"{message} Give the decoder of the training, or use this one with --force (force=True).")
    logger.warning("%s It is used because you asked for it (force).", message)


def difference_of_models(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> float | None:
    """Relative difference of two results of `sample_weights`; None if they may be of one model.

    Copies may be rounded to another dtype, or quantised if one of the two is in a GGUF file.
    """
    distance = _distance(recorded, found)
    if distance <= _ROUNDED:
        return None
    if (recorded.get("gguf") or found.get("gguf")) and distance <= _QUANTISED:
        logger.info("a decoder's weights differ from those of training by %.1f%%, as quantised ones do", 100 * distance)
        return None
    return distance


def _stored_floats(files: Sequence[Path]) -> dict[str, Any]:
    """The slices of all float tensors in safetensors files by name. Quantised ones have no values without scales."""
    entries: dict[str, Any] = {}
    for path in files:
        file = safe_open(path, framework="pt")
        entries |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    return {name: entry for name, entry in entries.items() if entry.get_dtype() in _FLOATS}


def _sample(shapes: Mapping[str, Shape], read: Callable[[str, slice], Tensor]) -> Tensor:
    """Values [tensors * 32] of evenly spread matrices."""
    names = [name for name, shape in shapes.items() if len(shape) == 2 and min(shape) > 0]
    chosen = [names[place] for place in _spread(len(names), _NUM_TENSORS)]
    rows = [read(name, slice(shapes[name][0] // 2, shapes[name][0] // 2 + 1))[0].float() for name in chosen]
    return torch.cat([row[_spread(row.numel(), _NUM_VALUES)] for row in rows] or [torch.empty(0)])


def _spread(size: int, count: int) -> list[int]:
    """At most `count` indices below `size` at even distances, the first and the last among them."""
    count = min(size, count)
    return [place * (size - 1) // max(count - 1, 1) for place in range(count)]


def _distance(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Norm of the difference of two samples over the norm of the first; infinite if they have different lengths."""
    before, now = (
        torch.frombuffer(bytearray(base64.b64decode(each["samples"])), dtype=torch.float32)
        for each in (recorded, found)
    )
    if before.numel() != now.numel() or not before.numel():
        return 0.0 if before.numel() == now.numel() else math.inf
    return float((before - now).norm() / before.norm().clamp_min(torch.finfo(torch.float32).tiny))
