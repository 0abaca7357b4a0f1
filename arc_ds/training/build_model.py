"""From a run's config to its model: sizes, a compressor with its starting weights, frozen decoders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from arc_ds.config.schema import RunConfig
from arc_ds.data.segments import Marker
from arc_ds.data.tokenizers import check_fits, load_tokenizer
from arc_ds.errors import ConfigError, TokenizerError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.bridge import init_bridge
from arc_ds.model.compressor import Compressor, DecoderPort
from arc_ds.model.decoder import Decoder
from arc_ds.model.load import ArcSourceFolder, load_decoder, open_arc_folder
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import beyond_layers, find_tokenizer, load_backbone, open_backbone, read_backbone_config
from arc_ds.training.engine import set_trained

MARKER_TEXT = "\n"  # the token whose embedding a marker starts from: it ends a passage in most texts


def compressor_spec(config: RunConfig) -> CompressorSpec:
    """The compressor that the config asks for; reads the sizes of all backbones, no weights.

    WeightsError where a backbone cannot be read, ConfigError where sizes do not fit each other.
    """
    backbone = read_backbone_config(config.encoder.backbone, config.encoder.rope_scaling)
    sizes = [read_backbone_config(d.backbone, d.rope_scaling).hidden_size for d in config.decoders]
    pooling = config.pooling
    kept: dict[Marker, bool] = {"cont": config.markers.cont, "rec": config.markers.rec}
    return CompressorSpec(
        backbone=backbone,
        num_layers=config.encoder.kept_layers(backbone.num_layers),
        rules=() if pooling.memory_tokens else group_rules(pooling.strategy, pooling.factors, pooling.num_groups),
        memory_tokens=pooling.memory_tokens,
        strategy=pooling.strategy,
        pooled_queries=pooling.pooled_queries,
        where=pooling.where,
        causal=config.encoder.causal,
        markers=tuple(marker for marker, is_kept in kept.items() if is_kept),
        bridge=config.bridge.kind,
        bridge_hidden_size=config.bridge.hidden_size,
        decoder_sizes=tuple(sizes),
    )


def encoder_tokenizer_path(config: RunConfig) -> Path:
    """Where the encoder's tokenizer is; TokenizerError where there is none."""
    return _tokenizer_path(config.encoder.tokenizer, config.encoder.backbone, "encoder")


def decoder_tokenizer_paths(config: RunConfig) -> tuple[Path, ...]:
    """Where each decoder's tokenizer is; TokenizerError where one is missing."""
    return tuple(_tokenizer_path(d.tokenizer, d.backbone, f"decoder {d.name}") for d in config.decoders)


def check_tokenizers(config: RunConfig, spec: CompressorSpec) -> None:
    """TokenizerError where a tokenizer has ids that its model's embedding does not have."""
    check_fits(load_tokenizer(encoder_tokenizer_path(config)), spec.backbone.vocab_size, config.encoder.backbone)
    for decoder, path in zip(config.decoders, decoder_tokenizer_paths(config), strict=True):
        vocab_size = read_backbone_config(decoder.backbone, decoder.rope_scaling).vocab_size
        check_fits(load_tokenizer(path), vocab_size, decoder.backbone)


def starting_compressor(config: RunConfig, spec: CompressorSpec) -> Compressor:
    """A compressor with the weights that the run starts from, float32 on the CPU, frozen parts marked.

    The encoder's from its backbone, fresh bridges and markers; or all from `encoder.init_from`, whose ports serve the
    first decoders. Fresh weights follow from the config's seed.
    """
    try:
        with torch.device("meta"):
            compressor = build_compressor(spec, activation_checkpointing=config.encoder.activation_checkpointing)
    except ValueError as error:
        raise ConfigError(f"the config's sizes do not fit each other: {error}") from error
    num_loaded_ports = 0
    if config.encoder.init_from is None:
        source = open_backbone(
            config.encoder.backbone, config.encoder.rope_scaling, max_positions=config.data.max_context_tokens
        )
        load_backbone(
            compressor,
            source,
            prefix="encoder.",
            dtype=torch.float32,
            skip=_is_memory,
            allow_unused=beyond_layers(spec.num_layers),
        )
    else:
        folder = open_arc_folder(Path(config.encoder.init_from), Path(config.encoder.backbone))
        _check_same_meaning(config, spec, folder)
        num_loaded_ports = min(len(folder.spec.decoder_sizes), len(spec.decoder_sizes))
        fresh = tuple(f"ports.{n}." for n in range(num_loaded_ports, len(spec.decoder_sizes)))
        load_backbone(
            compressor,
            folder.tensors,
            dtype=torch.float32,
            skip=lambda name: name.startswith(fresh) if fresh else False,
            allow_unused=lambda name: name.startswith("ports."),
        )
    _fill_rest(compressor, config, num_loaded_ports)
    set_trained(
        compressor.encoder,
        trained_layers=config.encoder.trained_layers,
        train_embeddings=config.encoder.train_embeddings,
    )
    return compressor


def frozen_decoders(config: RunConfig, device: torch.device, dtype: torch.dtype) -> list[Decoder]:
    """The decoders' modules with their weights; not placed yet. WeightsError where a tensor is missing or misshapen."""
    return [
        load_decoder(
            Path(d.backbone),
            d.rope_scaling,
            device,
            dtype,
            activation_checkpointing=d.activation_checkpointing,
            max_positions=longest_sequence(config),
        )
        for d in config.decoders
    ]


def longest_sequence(config: RunConfig) -> int:
    """Most decoder rows that a training or validation sequence can have: prefix, open context, continuation, begin."""
    data = config.data
    return data.max_prefix_tokens + data.max_context_tokens + data.max_continuation_tokens + 1


def _check_same_meaning(config: RunConfig, spec: CompressorSpec, folder: ArcSourceFolder) -> None:
    """ConfigError where the weights to start from were trained as something else than what the config asks for.

    Pooling factors may differ (the paper fine-tunes to a lower one), and so may decoders that get fresh ports.
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
    for decoder, trained in zip(config.decoders, folder.decoder_rope_scaling, strict=False):
        pairs[f"rope_scaling of decoder {decoder.name}"] = (
            read_backbone_config(decoder.backbone, decoder.rope_scaling).rope_scaling,
            read_backbone_config(decoder.backbone, trained).rope_scaling,
        )
    different = [f"{name}: {mine} here, {other} there" for name, (mine, other) in pairs.items() if mine != other]
    if different:
        raise ConfigError(
            f"encoder.init_from={config.encoder.init_from} holds weights of another meaning: {'; '.join(different)}. "
            "Set the config to what they were trained as (weights of the paper's authors: rope_scaling none)."
        )


def _fill_rest(compressor: Compressor, config: RunConfig, num_loaded_ports: int) -> None:
    """Fresh weights where nothing was loaded."""
    generator = torch.Generator().manual_seed(config.seed)
    encoder = compressor.encoder
    if encoder.memory is not None and encoder.memory.is_meta:
        encoder.memory = nn.Parameter(torch.ones(encoder.memory.shape))
    start = _marker_start(config, encoder.tok_embeddings.weight, encoder.config)
    for port in compressor.ports[num_loaded_ports:]:
        assert isinstance(port, DecoderPort)
        port.to_empty(device="cpu")
        for marker in (port.cont, port.rec):
            if marker is not None:
                marker.data.copy_(start)
        try:
            init_bridge(port.bridge, config.bridge.init, generator)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _marker_start(config: RunConfig, table_VD: torch.Tensor, backbone: BackboneConfig) -> torch.Tensor:
    """What a fresh marker starts as, [1, D]."""
    if config.markers.init == "ones":
        return torch.ones(1, backbone.hidden_size)
    tokenizer = load_tokenizer(encoder_tokenizer_path(config))
    ids = tokenizer.encode(MARKER_TEXT)
    return table_VD.detach()[ids[-1:]].clone()


def _is_memory(name: str) -> bool:
    return name == "memory"


def _tokenizer_path(named: str | None, backbone: str, what: str) -> Path:
    if named is not None:
        return Path(named)
    found = find_tokenizer(Path(backbone))
    if found is None:
        raise TokenizerError(f"{what}: no tokenizer beside {backbone}; copy it there or set the `tokenizer` key")
    return found
