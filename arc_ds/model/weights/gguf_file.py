"""GGUF files of the llama architecture: sizes and tensors. The `gguf` package dequantises one tensor at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig, RopeScaling
from arc_ds.model.rope import rope_frequencies
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.hf_config import RopeScalingChoice, Sizes
from arc_ds.model.weights.stores import ALL_ROWS, Shape
from arc_ds.system.user_files import check_downloaded
from arc_ds.tokenizers.gguf_header import GgufTensor, read_gguf_header

_PLAIN: Mapping[int, Any] = MappingProxyType({0: np.float32, 1: np.float16})
_ROPE_FACTORS = "rope_freqs.weight"


class GgufStore:
    """The metadata and tensors of one GGUF file.

    `metadata` omits lists, because those of a tokenizer are long. `tensor` returns float32, or float16 if the file
    stores plain float16.

    Raises WeightsError if the file is not GGUF, is truncated, or has an unsupported version or block format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_downloaded(path, WeightsError)
        try:
            self.metadata, self._tensors, self._data_start = read_gguf_header(path)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} is not a complete GGUF file: {error}. Copy it again.") from error
        self.shapes: Mapping[str, Shape] = {name: entry.shape for name, entry in self._tensors.items()}
        self._quants = _quants(path)
        self._check_kinds()
        self._check_size()

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        entry = self._tensors[name]
        start = self._data_start + entry.offset
        if entry.kind in _PLAIN:
            plain = np.memmap(self.path, _PLAIN[entry.kind], "r", offset=start, shape=entry.shape)
            return torch.from_numpy(np.array(plain[rows]))
        block = np.memmap(self.path, np.uint8, "r", offset=start, shape=self._stored_shape(entry))
        kind = self._quants.GGMLQuantizationType(entry.kind)
        return torch.from_numpy(np.ascontiguousarray(self._quants.dequantize(block[rows], kind), dtype=np.float32))

    def _stored_shape(self, entry: GgufTensor) -> Shape:
        """Shape in bytes of a quantised tensor. Each row consists of whole blocks."""
        kind = self._quants.GGMLQuantizationType(entry.kind)
        block_size, block_bytes = self._quants.GGML_QUANT_SIZES[kind]
        return (*entry.shape[:-1], entry.shape[-1] // block_size * block_bytes)

    def _check_kinds(self) -> None:
        for name, kind in {entry.kind: (name, entry.kind) for name, entry in self._tensors.items()}.values():
            try:
                known = self._quants.GGMLQuantizationType(kind)
                block_bytes = self._quants.GGML_QUANT_SIZES[known][1]
                self._quants.dequantize(np.zeros((1, block_bytes), np.uint8), known)
            except (ValueError, NotImplementedError) as error:
                raise WeightsError(
                    f"{self.path}: tensor `{name}` has the block format {kind}, which this version of the gguf "
                    "package cannot read. Update gguf, or use a file with another quantisation."
                ) from error

    def _check_size(self) -> None:
        size = self.path.stat().st_size
        for name, entry in self._tensors.items():
            end = self._data_start + entry.offset + math.prod(self._stored_shape(entry))
            if end > size:
                raise WeightsError(
                    f"{self.path} is cut short: tensor `{name}` ends at byte {end}, the file at {size}. Copy it again."
                )


def sizes_of_gguf(store: GgufStore, rope_scaling: RopeScalingChoice) -> Sizes:
    """Sizes from the metadata of a GGUF file of the llama architecture (Llama, Mistral, SmolLM).

    A `rope_freqs.weight` tensor stores the llama3 scaling of rotary frequencies. Raises WeightsError for another
    architecture, experts, partly rotary heads, other rotary scalings and split files.
    """
    fields = Fields(store.metadata, str(store.path))
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise WeightsError(
            f"{fields.where}: `general.architecture` is {architecture!r}; ARC-DS reads GGUF files of llama (Llama, "
            "Mistral, SmolLM). Choose another file, or the model's Hugging Face folder."
        )
    fields.refuse("llama.expert_count", 0)
    fields.refuse("split.count", 0, 1)
    hidden, num_heads = fields.integer("llama.embedding_length"), fields.integer("llama.attention.head_count")
    head_dim = fields.integer("llama.attention.key_length", hidden // num_heads)
    fields.refuse("llama.rope.dimension_count", head_dim)
    if rope_scaling == "checkpoint":
        fields.refuse("llama.rope.scaling.type", "none")
    embedding = "token_embd.weight"
    if embedding not in store.shapes:
        raise WeightsError(f"{fields.where}: tensor `{embedding}` is missing. Copy the file again.")
    config = BackboneConfig(
        family="llama",
        hidden_size=hidden,
        num_layers=fields.integer("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_size=fields.integer("llama.feed_forward_length"),
        vocab_size=store.shapes[embedding][0],
        rope_theta=fields.number("llama.rope.freq_base", 10000.0),
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in store.shapes,
    )
    if rope_scaling == "checkpoint" and _ROPE_FACTORS in store.shapes:
        config = _with_scaling(config, store.tensor(_ROPE_FACTORS), fields.where)
    window = fields.integer("llama.attention.sliding_window") if fields.get("llama.attention.sliding_window") else None
    return Sizes(config, window)


def _with_scaling(config: BackboneConfig, divisors: Tensor, where: str) -> BackboneConfig:
    """Add the rotary scaling that has these divisors of frequencies. Its other constants are those of Llama 3.1."""
    factor = round(float(divisors.max()), 4)
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    frequencies, expected = (rope_frequencies(c, divisors.device) for c in (config, scaled))
    if divisors.shape != frequencies.shape or not torch.allclose(frequencies / divisors, expected, rtol=1e-4, atol=0):
        raise WeightsError(
            f"{where}: `{_ROPE_FACTORS}` is not the llama3 scaling with low 1, high 4 and 8192 positions. "
            "ARC-DS supports no other scaling. Use the model's Hugging Face folder, or set rope_scaling: none."
        )
    return scaled


def _quants(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(f"{path} needs the gguf package. Run: pip install 'arc-ds[backbones]'") from error
    return gguf
