"""GGUF files of the llama architecture: header, sizes, and tensors dequantised one at a time.

The header is read here and not by the `gguf` package, whose reader spends seconds on a tokenizer's lists; the formats
of quantised blocks are the package's. Format: the GGUF specification of ggml (docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig, RopeScaling
from arc_ds.model.weights.fields import Fields, checked
from arc_ds.model.weights.hf_config import RopeScalingChoice, Sizes
from arc_ds.model.weights.stores import ALL_ROWS, Shape

_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
_STRING, _ARRAY = 8, 9
_PLAIN: Mapping[int, Any] = MappingProxyType({0: np.float32, 1: np.float16})
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One entry of the header. shape is in PyTorch's order; kind is ggml's number of the block format."""

    shape: Shape
    kind: int
    offset: int


class GgufStore:
    """One GGUF file: `metadata` by key (lists left out, a tokenizer's are long) and its tensors.

    `read` gives float32, or float16 where the file keeps plain float16.
    WeightsError where the file is no GGUF, cut short, or of a version or block format that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.metadata, self._tensors, data_start = _read_header(file)
        except (OSError, struct.error, ValueError, OverflowError, MemoryError) as error:
            raise WeightsError(f"{path} is no whole GGUF file: {error}. Copy it again.") from error
        self._data_start = data_start
        self._quants = _quants(path)
        self._check_size()

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> Shape:
        return self._tensors[name].shape

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        entry = self._tensors[name]
        start = self._data_start + entry.offset
        if entry.kind in _PLAIN:
            plain = np.memmap(self.path, _PLAIN[entry.kind], "r", offset=start, shape=entry.shape)
            return torch.from_numpy(np.array(plain[rows]))
        block = np.memmap(self.path, np.uint8, "r", offset=start, shape=self._stored_shape(entry))
        kind = self._quants.GGMLQuantizationType(entry.kind)
        return torch.from_numpy(np.ascontiguousarray(self._quants.dequantize(block[rows], kind), dtype=np.float32))

    def _stored_shape(self, entry: GgufTensor) -> Shape:
        """The bytes of a quantised tensor: rows of whole blocks."""
        kind = self._quants.GGMLQuantizationType(entry.kind)
        block_size, block_bytes = self._quants.GGML_QUANT_SIZES[kind]
        return (*entry.shape[:-1], entry.shape[-1] // block_size * block_bytes)

    def _check_size(self) -> None:
        size = self.path.stat().st_size
        for name, entry in self._tensors.items():
            try:
                stored = self._stored_shape(entry)
            except ValueError as error:
                raise WeightsError(
                    f"{self.path}: tensor `{name}` has the block format {entry.kind}, which this version of the gguf "
                    "package does not know. Update gguf, or take a file of another quantisation."
                ) from error
            end = self._data_start + entry.offset + math.prod(stored)
            if end > size:
                raise WeightsError(
                    f"{self.path} is cut short: tensor `{name}` ends at byte {end}, the file at {size}. Copy it again."
                )


def sizes_of_gguf(store: GgufStore, rope_scaling: RopeScalingChoice) -> Sizes:
    """Sizes from the metadata of a GGUF file of the llama architecture (Llama, Mistral, SmolLM).

    A `rope_freqs.weight` tensor holds the llama3 scaling of rotary frequencies.
    WeightsError for another architecture, for experts, partly rotary heads, other rotary scalings and split files.
    """
    fields = Fields(store.metadata, str(store.path))
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise WeightsError(
            f"{store.path}: `general.architecture` is {architecture!r}; ARC-DS reads GGUF files of llama (Llama, "
            "Mistral, SmolLM). Choose another file, or the Hugging Face folder of the model."
        )
    fields.refuse("llama.expert_count", 0)
    fields.refuse("split.count", 0, 1)
    hidden, num_heads = fields.integer("llama.embedding_length"), fields.integer("llama.attention.head_count")
    head_dim = fields.integer("llama.attention.key_length", hidden // num_heads)
    fields.refuse("llama.rope.dimension_count", head_dim)
    if rope_scaling == "checkpoint":
        fields.refuse("llama.rope.scaling.type", "none")
    embedding = "token_embd.weight"
    if embedding not in store.names():
        raise WeightsError(f"{store.path}: tensor `{embedding}` is missing. Copy the file again.")
    theta = fields.number("llama.rope.freq_base", 10000.0)
    config = BackboneConfig(
        family="llama",
        hidden_size=hidden,
        num_layers=fields.integer("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_size=fields.integer("llama.feed_forward_length"),
        vocab_size=store.shape(embedding)[0],
        rope_theta=theta,
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        rope_scaling=_rope_scaling(store, theta, head_dim) if rope_scaling == "checkpoint" else None,
        tie_embeddings="output.weight" not in store.names(),
    )
    window = fields.integer("llama.attention.sliding_window") if fields.get("llama.attention.sliding_window") else None
    return Sizes(checked(config, fields.where), window)


def _rope_scaling(store: GgufStore, theta: float, head_dim: int) -> RopeScaling | None:
    """The scaling whose divisors of the rotary frequencies the file holds; its other constants are Llama 3.1's."""
    if _ROPE_FACTORS not in store.names():
        return None
    divisors = store.read(_ROPE_FACTORS).double().numpy()
    scaling = RopeScaling(
        factor=round(float(divisors.max()), 4), low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    expected = llama3_divisors(scaling, theta, head_dim)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise WeightsError(
            f"{store.path}: `{_ROPE_FACTORS}` is not the llama3 scaling with low 1, high 4 and 8192 positions, the one "
            "that ARC-DS computes. Take the Hugging Face folder of the model, or set rope_scaling: none."
        )
    return scaling


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What llama3 scaling divides each rotary frequency by, float64 [head_dim / 2] (Llama 3.1's reference code)."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_positions / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1 - smooth) / scaling.factor + smooth)


def _quants(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(f"{path} needs the gguf package to be read. Run: pip install 'arc-ds[backbones]'") from error
    return gguf


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, GgufTensor], int]:
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = _scalar(file, "<I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, expected 2 or 3")
    num_tensors, num_keys = _scalar(file, "<Q"), _scalar(file, "<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key, kind = _string(file), _scalar(file, "<I")
        value = _value(file, kind)
        if kind != _ARRAY:
            metadata[key] = value
    tensors = dict(_tensor_entry(file) for _ in range(num_tensors))
    alignment = metadata.get("general.alignment", 32)
    return metadata, tensors, -(-file.tell() // alignment) * alignment


def _tensor_entry(file: BinaryIO) -> tuple[str, GgufTensor]:
    name = _string(file)
    sizes = [_scalar(file, "<Q") for _ in range(_scalar(file, "<I"))]
    return name, GgufTensor(shape=tuple(reversed(sizes)), kind=_scalar(file, "<I"), offset=_scalar(file, "<Q"))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        return _skip_array(file)
    if kind not in _SCALARS:
        raise ValueError(f"value of unknown type {kind}")
    return _scalar(file, _SCALARS[kind])


def _skip_array(file: BinaryIO) -> None:
    kind, count = _scalar(file, "<I"), _scalar(file, "<Q")
    if kind in _SCALARS:
        file.seek(count * struct.calcsize(_SCALARS[kind]), 1)
        return
    for _ in range(count):
        if kind == _STRING:
            file.seek(_scalar(file, "<Q"), 1)
        else:
            _value(file, kind)


def _string(file: BinaryIO) -> str:
    length = _scalar(file, "<Q")
    data = file.read(length)
    if len(data) != length:
        raise ValueError("it ends inside the header")
    return data.decode("utf-8")


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]
