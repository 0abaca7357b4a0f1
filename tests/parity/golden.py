"""Golden cases as objects of ARC-DS: compressor, decoder, samples and batch of a case.

The golden files contain numbers of the public reference implementation on tiny random models. Their README explains
each number. The files use the reference's names and rotary layout; this module converts both to ours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Marker, Sample, Segment
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import copy_into, load_backbone, open_backbone, permute_rotary, read_arc_checkpoint
from arc_ds.model.weights.arc_spec import spec_of_params
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.names import rotary_heads

# This pool_type has another meaning in the reference (`test_golden_model.FAULTY_CASES`). The case is therefore built
# here instead of with the reader of released checkpoints.
PRUNING_NORM = "metric_pruning_norm"


@dataclass(frozen=True)
class GoldenCase:
    """One folder of the golden files."""

    root: Path
    name: str
    meta: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def read(root: Path, name: str) -> GoldenCase:
        """Read the case `name` of the golden folder `root`."""
        meta = json.loads((root / name / "meta.json").read_text(encoding="utf-8"))
        return GoldenCase(root, name, meta, load_file(root / name / "tensors.safetensors"))

    @property
    def decoder_idx(self) -> int:
        """Index of the decoder that reads."""
        return int(self.meta.get("llm_number", 0))

    @property
    def loss_mask(self) -> Tensor:
        """Weights of the labels in `loss_masked`, float32 [text tokens]."""
        mask = self.tensors.get("in.y_mask")
        return torch.ones(self.tensors["in.y"].shape) if mask is None else mask.float()

    @property
    def marker(self) -> Marker | None:
        """The marker after each context of this case's batch."""
        wanted: Marker = "rec" if self.meta.get("batch_type") == "reconstruction" else "cont"
        return wanted if self.meta["embedder_params"][f"{wanted}_tok"] else None


def _encoder_folder(case: GoldenCase) -> Path:
    return case.root / case.meta.get("encoder", "models/enc")


def spec_of(case: GoldenCase) -> CompressorSpec:
    """The compressor spec of a case."""
    embedder = dict(case.meta["embedder_params"])
    embedder.update(case.meta.get("embedder_attr_overrides") or {})
    pooling = embedder["pooling_module"]
    if pooling["pool_type"] == PRUNING_NORM:
        embedder["pooling_module"] = {**pooling, "pool_type": "mean"}
    plain = {"embedder_params": embedder, "bridge_module": case.meta["bridge_module"]}
    num_ports = max(len(case.meta["decoders"]), case.decoder_idx + 1)
    # Without rotary scaling, as in the reference.
    backbone = open_backbone(_encoder_folder(case), "none").config
    spec = spec_of_params(Fields(plain, case.name), backbone, num_ports)
    if pooling["pool_type"] != PRUNING_NORM:
        return spec
    rules = group_rules("prune_norm", [-rate for rate in embedder["compress_rates"]])
    return dataclasses.replace(spec, strategy="prune_norm", rules=rules)


def build_case_compressor(case: GoldenCase) -> Compressor:
    """Encoder, markers and bridges with the case's weights in float32. `requires_grad` is set as in the case."""
    spec = spec_of(case)
    compressor = build_compressor(spec)
    folder = case.root / "arc_checkpoints" / case.meta["arc_checkpoint"] / "checkpoints" / "checkpoint_000010"
    overrides = {
        internal_name(name.removeprefix("param.")): tensor
        for name, tensor in case.tensors.items()
        if name.startswith("param.")
    }
    source = read_arc_checkpoint(folder, _encoder_folder(case))
    with_own = {name for name, _ in compressor.named_parameters()}
    load_backbone(
        compressor,
        source,
        skip=lambda name: name in overrides,
        allow_unused=lambda name: name not in with_own or name in overrides,
    )
    for name, tensor in overrides.items():
        copy_into(compressor.get_parameter(name), to_internal(name, tensor, spec.backbone))
    _freeze(compressor, case)
    return compressor


def build_case_decoder(case: GoldenCase) -> Decoder:
    """The frozen decoder that reads, in float32. Generation cases list only this decoder."""
    folders = case.meta["decoders"]
    source = open_backbone(case.root / folders[min(case.decoder_idx, len(folders) - 1)], "none")
    decoder = Decoder(source.config)
    load_backbone(decoder, source)
    return decoder


def samples_of(case: GoldenCase) -> list[Sample]:
    """The sequences of a training case."""
    text = case.tensors["in.x"].split(case.meta["seqlens"])
    no_contexts: list[list[int]] = [[] for _ in text]
    contexts = _contexts(case, case.meta.get("embed_seqlens", no_contexts))
    offsets = case.meta.get("insert_comp_repr", no_contexts)
    task = case.meta.get("batch_type") or "text"
    return [
        Sample(task, _interleave(ids.tolist(), at, segments))
        for ids, at, segments in zip(text, offsets, contexts, strict=True)
    ]


def prompts_of(case: GoldenCase) -> list[list[Segment]]:
    """The prompts of a generation case, from token ids."""
    texts = [[token for part in prompt for token in part] for prompt in case.meta["prompt_tokens"]]
    no_contexts: list[list[int]] = [[] for _ in texts]
    offsets = case.meta["insertion_lists"] or no_contexts
    sizes = case.meta.get("embed_seqlens")
    if sizes is None and case.meta.get("encoder_seqlens"):
        flat = iter(case.meta["encoder_seqlens"])
        sizes = [[next(flat) for _ in at] for at in offsets]
    contexts = _contexts(case, sizes or no_contexts)
    return [list(_interleave(*prompt)) for prompt in zip(texts, offsets, contexts, strict=True)]


def _contexts(case: GoldenCase, sizes: list[list[int]]) -> list[list[Segment]]:
    """The context segments of each sequence. `sizes`: number of tokens of each context."""
    if not any(sizes):
        return [[] for _ in sizes]
    stored = case.tensors.get("in.embeddings")
    ids = iter(case.meta["encoder_input_tokens"] if stored is None else stored.tolist())
    return [[Segment.context([next(ids) for _ in range(n)], case.marker) for n in sequence] for sequence in sizes]


def _interleave(text: list[int], offsets: list[int], contexts: list[Segment]) -> tuple[Segment, ...]:
    """Split text at the offsets (each relative to the previous one) and insert the contexts at the splits."""
    segments: list[Segment] = []
    for offset, context in zip(offsets, contexts, strict=True):
        segments += [Segment.text(text[:offset]), context]
        text = text[offset:]
    return (*segments, Segment.text(text))


def pack_case(case: GoldenCase) -> PackedBatch:
    """The batch of a case, with the golden label of every text token. The loss applies the case's mask."""
    pooling = spec_of(case).packing if case.meta.get("embedder_params") else PoolingSpec(())
    batch = pack(samples_of(case), pooling)
    rows = batch.text_rows
    sequences = torch.bucketize(rows, batch.decoder_cu_seqlens[1:].long(), right=True)
    return dataclasses.replace(batch, label_rows=rows, labels=case.tensors["in.y"], label_sequences=sequences)


def internal_name(name: str) -> str:
    """Convert the reference's name of a trained parameter to our name in a `Compressor`."""
    module, _, rest = name.partition(".")
    parts = rest.split(".")
    if module == "bridge_module":
        port, leaf = (parts[0], parts[1:]) if parts[0].isdigit() else ("0", parts)
        return f"ports.{port}.bridge.{'.'.join(leaf)}"
    if parts[0] in ("rec_tok", "cont_tok"):
        return f"ports.{parts[1]}.{parts[0].removesuffix('_tok')}"
    return "encoder.memory" if parts[0] == "mem_embeddings" else f"encoder.{rest}"


def to_internal(name: str, tensor: Tensor, config: BackboneConfig) -> Tensor:
    """A tensor of the encoder with rotary rows in our order. Other tensors are unchanged. `name` is our name."""
    heads = rotary_heads(name, config) if name.startswith("encoder.") else None
    return tensor if heads is None else permute_rotary(tensor, heads, to="half")


def _freeze(compressor: Compressor, case: GoldenCase) -> None:
    embedder = case.meta["embedder_params"]
    layers: nn.ModuleList = compressor.encoder.layers
    for layer in layers[: max(0, len(layers) - embedder["trained_layers"])]:
        layer.requires_grad_(False)
    compressor.encoder.tok_embeddings.requires_grad_(embedder["train_embedding_mtx"])
