"""Build the model of a run from its config: sizes, a compressor with its starting weights, and frozen decoders.

The `open_…` functions check files and sizes without reading any tensor. Weights are then loaded one tensor at a time,
so a host never holds a whole model for each of its ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from arc_ds.batch.segments import MARKERS
from arc_ds.config.schema import DecoderConfig, EncoderConfig, RunConfig
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.errors import ConfigError
from arc_ds.inference.decoders import OpenedDecoder, open_decoder, read_decoder_sizes
from arc_ds.inference.load import (
    ArcFolder,
    check_decoder_tokenizer,
    check_encoder_tokenizer,
    open_arc_folder,
)
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.bridge import check_bridge_init, init_bridge
from arc_ds.model.compressor import Compressor, DecoderPort
from arc_ds.model.frozen_decoder import DecoderSizes
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec, build_compressor, build_port
from arc_ds.model.weights import (
    TensorSource,
    beyond_layers,
    check_fit,
    gathered,
    load_backbone,
    open_backbone,
    read_backbone_config,
    set_parameter,
)
from arc_ds.tokenizers import check_fits, ids_digest, load_tokenizer, tokenizer_file
from arc_ds.training.engine import set_trained

MARKER_TEXT = "\n"  # markers start from this token's embedding because it ends a passage in most texts


def compressor_spec(config: RunConfig) -> CompressorSpec:
    """The specification of the configured compressor. Reads the sizes of all backbones but no weights.

    Raises WeightsError if a backbone cannot be read, and ConfigError if sizes do not match.
    """
    backbone = read_backbone_config(config.encoder.backbone, config.encoder.rope_scaling)
    pooling = config.pooling
    return CompressorSpec(
        backbone=backbone,
        num_layers=config.encoder.kept_layers(backbone.num_layers),
        rules=() if pooling.memory_tokens else group_rules(pooling.strategy, pooling.factors, pooling.num_groups),
        memory_tokens=pooling.memory_tokens,
        strategy=pooling.strategy,
        pooled_queries=pooling.pooled_queries,
        where=pooling.where,
        causal=config.encoder.causal,
        markers=tuple(marker for marker in MARKERS if getattr(config.markers, marker)),
        bridge=config.bridge.kind,
        bridge_hidden_size=config.bridge.hidden_size,
        decoder_sizes=tuple(_sizes_of(decoder).hidden_size for decoder in config.decoders),
    )


def _sizes_of(decoder: DecoderConfig) -> DecoderSizes:
    return read_decoder_sizes(
        Path(decoder.backbone),
        decoder.rope_scaling,
        implementation=decoder.implementation,
        trust_remote_code=decoder.trust_remote_code,
    )


def encoder_tokenizer_path(encoder: EncoderConfig) -> Path:
    """Path of the encoder's tokenizer. Raises TokenizerError if there is none."""
    return tokenizer_file(Path(encoder.tokenizer or encoder.backbone))


def decoder_tokenizer_path(decoder: DecoderConfig) -> Path:
    """Path of a decoder's tokenizer. Raises TokenizerError if there is none."""
    return tokenizer_file(Path(decoder.tokenizer or decoder.backbone))


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """The opened and checked weights that a run's compressor starts from.

    tensors: the encoder's backbone, or the export of another run.
    names: arguments of `weights.check_fit` that say which parameters the tensors fill.
    fresh_ports: indices of decoders whose ports are freshly initialized.
    """

    tensors: TensorSource
    names: dict[str, Any]
    fresh_ports: tuple[int, ...]


def open_starting_weights(config: RunConfig, spec: CompressorSpec) -> StartingWeights:
    """Open the encoder's backbone or `encoder.init_from`. Reads sizes only.

    Raises WeightsError if a tensor is missing or has the wrong shape. Raises ConfigError if the weights were trained
    with incompatible settings, or if the config's sizes do not match.
    """
    names: dict[str, Any]
    tensors: TensorSource
    encoder = config.encoder
    if encoder.init_from is None:
        is_unused = beyond_layers(spec.num_layers)
        tensors = open_backbone(encoder.backbone, encoder.rope_scaling, is_unused=is_unused)
        names = {"prefix": "encoder.", "skip": "memory".__eq__, "allow_unused": is_unused}
        fresh_ports = tuple(range(len(config.decoders)))
    else:
        folder = open_arc_folder(Path(encoder.init_from), Path(encoder.backbone))
        _check_same_meaning(config, spec, folder)
        _check_same_tokenizers(config, folder)
        tensors = folder.tensors
        num_given = len(folder.spec.decoder_sizes)
        fresh_ports = tuple(n for n, d in enumerate(config.decoders) if d.fresh_bridge or n >= num_given)
        prefixes = tuple(f"ports.{n}." for n in fresh_ports)
        names = {"skip": lambda name: name.startswith(prefixes), "allow_unused": lambda name: name.startswith("ports.")}
    try:
        with torch.device("meta"):
            compressor = build_compressor(spec)
        for port_idx in fresh_ports:
            check_bridge_init(cast(DecoderPort, compressor.ports[port_idx]).bridge, config.bridge.init)
    except ValueError as error:
        raise ConfigError(f"the config's sizes do not match: {error}") from error
    check_fit(compressor, tensors, **names)
    return StartingWeights(tensors=tensors, names=names, fresh_ports=fresh_ports)


def starting_compressor(
    config: RunConfig,
    spec: CompressorSpec,
    weights: StartingWeights,
    within: AbstractContextManager[Any] | None = None,
) -> Compressor:
    """A compressor with its starting weights, and with `requires_grad` set to False on frozen parts.

    Fresh markers and bridges are functions of the config's seed.

    within: `engine.partitioned`, which makes this a collective. By default the compressor is whole, float32 on the CPU.
    """
    with torch.device("meta") if within is None else within:
        compressor = build_compressor(spec, activation_checkpointing=config.encoder.activation_checkpointing)
    load_backbone(compressor, weights.tensors, **weights.names, name="encoder")
    _fill_rest(compressor, config, spec, weights.fresh_ports)
    set_trained(
        compressor.encoder,
        trained_layers=config.encoder.trained_layers,
        train_embeddings=config.encoder.train_embeddings,
    )
    return compressor


@dataclass(frozen=True, kw_only=True)
class DecoderFiles:
    """The opened and checked files of a decoder of the run.

    weights: its opened weights.
    placement: as configured.
    reader: its tokenizer and chat template.
    fingerprints: of the tokenizer and the chat template, by config key.
    ids_digest: of the tokenizer's ids (`tokenizers.ids_digest`).
    """

    weights: OpenedDecoder
    placement: str
    reader: ReaderFiles
    fingerprints: Mapping[str, str]
    ids_digest: str


def open_decoders(decoders: Sequence[DecoderConfig], *, bos: bool) -> tuple[DecoderFiles, ...]:
    """Open the run's decoders. Reads sizes and tokenizers.

    bos: whether sequences begin with begin-of-text.

    Raises WeightsError if a tensor is missing or has the wrong shape. Raises TokenizerError if samples have ids beyond
    a decoder's embedding, or under the conditions of `read_layout`.
    """
    opened = []
    for idx, decoder in enumerate(decoders):
        files = ReaderFiles(tokenizer=decoder_tokenizer_path(decoder), chat_template=decoder.chat_template)
        reader = files.load()
        fingerprints = {f"decoders.{idx}": reader.tokenizer.fingerprint}
        if decoder.chat_template != "none":
            layout_digest = hashlib.sha256(repr(reader.layout).encode()).hexdigest()
            fingerprints[f"decoders.{idx}.chat_template"] = layout_digest
        weights = open_decoder(
            Path(decoder.backbone),
            decoder.rope_scaling,
            implementation=decoder.implementation,
            trust_remote_code=decoder.trust_remote_code,
            activation_checkpointing=decoder.activation_checkpointing,
        )
        bos_ids = [reader.tokenizer.bos_id] if bos and reader.tokenizer.bos_id is not None else []
        needed = [*bos_ids, *reader.layout.special_ids]
        check_fits(reader.tokenizer, weights.sizes.vocab_size, decoder.backbone, needed)
        opened.append(
            DecoderFiles(
                weights=weights,
                placement=decoder.placement,
                reader=files,
                fingerprints=fingerprints,
                ids_digest=ids_digest(reader.tokenizer),
            )
        )
    return tuple(opened)


def _check_same_meaning(config: RunConfig, spec: CompressorSpec, folder: ArcFolder) -> None:
    """Raise ConfigError if the starting weights were trained with settings that contradict the config.

    Pooling factors may differ (the paper fine-tunes to a lower one). Decoders with fresh ports may differ too.
    """
    ours, theirs = spec, folder.spec
    pairs = {
        "encoder.rope_scaling": (ours.backbone.rope_scaling, theirs.backbone.rope_scaling),
        "encoder.causal": (ours.causal, theirs.causal),
        "pooling.strategy": (ours.strategy, theirs.strategy),
        "pooling.pooled_queries": (ours.pooled_queries, theirs.pooled_queries),
        "pooling.where": (ours.where, theirs.where),
        "number of layers that pool": (len(ours.rules), len(theirs.rules)),
        "pooling.memory_tokens": (ours.memory_tokens, theirs.memory_tokens),
    }
    for decoder, trained in zip(config.decoders, folder.decoders, strict=False):
        if decoder.fresh_bridge:
            continue
        pairs[f"data.decoder_bos, for decoder {decoder.name}"] = (config.data.decoder_bos, trained.bos)
        sizes = _sizes_of(decoder)
        if isinstance(sizes, BackboneConfig):  # transformers always applies the checkpoint's scaling
            scaling = read_backbone_config(decoder.backbone, trained.rope_scaling).rope_scaling
            pairs[f"rope_scaling of decoder {decoder.name}"] = (sizes.rope_scaling, scaling)
    different = [f"{name}: {mine} here, {other} there" for name, (mine, other) in pairs.items() if mine != other]
    if different:
        raise ConfigError(
            f"encoder.init_from={config.encoder.init_from} was trained with other settings: {'; '.join(different)}. "
            "Set the config to the settings of these weights (weights of the paper's authors: rope_scaling none)."
        )


def _check_same_tokenizers(config: RunConfig, folder: ArcFolder) -> None:
    """Raise TokenizerError if the starting weights were trained with other tokenizers."""
    path = encoder_tokenizer_path(config.encoder)
    remedy = f"Use the tokenizer of these weights: encoder.tokenizer={config.encoder.init_from}"
    check_encoder_tokenizer(load_tokenizer(path), folder.encoder_fingerprints, path, remedy=remedy)
    for decoder, settings in zip(config.decoders, folder.decoders, strict=False):
        if not decoder.fresh_bridge:
            path = decoder_tokenizer_path(decoder)
            check_decoder_tokenizer(load_tokenizer(path), settings, path)


def _fill_rest(compressor: Compressor, config: RunConfig, spec: CompressorSpec, fresh_ports: tuple[int, ...]) -> None:
    """Initialize the parameters that were not loaded; identical on all ranks."""
    generator = torch.Generator().manual_seed(config.seed)
    if spec.memory_tokens and config.encoder.init_from is None:
        set_parameter(compressor, "encoder.memory", torch.ones(spec.memory_tokens, spec.backbone.hidden_size))
    table_VD = compressor.encoder.tok_embeddings.weight
    if config.markers.init == "ones":
        start_1D = torch.ones(1, spec.backbone.hidden_size)
    else:
        ids = load_tokenizer(encoder_tokenizer_path(config.encoder)).encode(MARKER_TEXT)
        with gathered([table_VD]):
            start_1D = table_VD.detach()[ids[-1:]].to("cpu", torch.float32, copy=True)
    for port_idx in fresh_ports:
        port = build_port(spec, port_idx)
        for marker in (port.cont, port.rec):
            if marker is not None:
                marker.data.copy_(start_1D)
        init_bridge(port.bridge, config.bridge.init, generator)
        for name, parameter in port.named_parameters():
            set_parameter(compressor, f"ports.{port_idx}.{name}", parameter.detach())
