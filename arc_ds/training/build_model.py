"""Build the model of a run from its config: sizes, a compressor with its starting weights, and frozen decoders.

The `open_…` functions check files and sizes without reading any tensor. Weights are then loaded one tensor at a time,
so a host never holds a whole model for each of its ranks.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arc_ds.batch.segments import Marker
from arc_ds.config.schema import DecoderConfig, RunConfig
from arc_ds.data.tasks.chat import count_template, read_layout
from arc_ds.data.tasks.task import NO_CHAT, ChatRows
from arc_ds.errors import ConfigError
from arc_ds.inference.load import (
    ArcFolder,
    check_decoder_tokenizer,
    check_encoder_tokenizer,
    open_arc_folder,
    open_decoder,
)
from arc_ds.model.bridge import check_bridge_init, init_bridge
from arc_ds.model.compressor import Compressor, DecoderPort
from arc_ds.model.decoder import Decoder
from arc_ds.model.encoder import Encoder
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
from arc_ds.planning.sizes import TEXT_WORDS, longest_context, longest_sequence
from arc_ds.tokenizers import check_fits, load_tokenizer, tokenizer_file
from arc_ds.training.engine import set_trained

MARKER_TEXT = "\n"  # markers start from this token's embedding because it ends a passage in most texts


def compressor_spec(config: RunConfig) -> CompressorSpec:
    """The specification of the configured compressor. Reads the sizes of all backbones but no weights.

    Raises WeightsError if a backbone cannot be read, and ConfigError if sizes do not match.
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
    """Path of the encoder's tokenizer. Raises TokenizerError if there is none."""
    return tokenizer_file(Path(config.encoder.tokenizer or config.encoder.backbone))


def decoder_tokenizer_paths(config: RunConfig) -> tuple[Path, ...]:
    """Path of each decoder's tokenizer. Raises TokenizerError if one is missing."""
    return tuple(tokenizer_file(Path(decoder.tokenizer or decoder.backbone)) for decoder in config.decoders)


def check_tokenizers(config: RunConfig, spec: CompressorSpec) -> dict[str, str]:
    """Check all tokenizers; return the fingerprints of tokenizers and chat templates by config key.

    Raises TokenizerError if samples have ids beyond a model's embedding, or a requested chat template is missing.
    """
    tokenizer = load_tokenizer(encoder_tokenizer_path(config))
    check_fits(tokenizer, spec.backbone.vocab_size, config.encoder.backbone)
    fingerprints = {"encoder": tokenizer.fingerprint}
    for idx, (decoder, path) in enumerate(zip(config.decoders, decoder_tokenizer_paths(config), strict=True)):
        vocab_size = read_backbone_config(decoder.backbone, decoder.rope_scaling).vocab_size
        tokenizer = load_tokenizer(path)
        layout = read_layout(decoder.chat_template, tokenizer, path)
        bos_ids = [tokenizer.bos_id] if config.data.decoder_bos and tokenizer.bos_id is not None else []
        check_fits(tokenizer, vocab_size, decoder.backbone, [*bos_ids, *layout.special_ids])
        fingerprints[f"decoders.{idx}"] = tokenizer.fingerprint
        if layout.is_chat:
            fingerprints[f"decoders.{idx}.chat_template"] = hashlib.sha256(repr(layout).encode()).hexdigest()
    return fingerprints


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
    if config.encoder.init_from is None:
        tensors = open_backbone(
            config.encoder.backbone, config.encoder.rope_scaling, max_positions=longest_context(config)
        )
        names = {"prefix": "encoder.", "skip": _is_memory, "allow_unused": beyond_layers(spec.num_layers)}
        fresh_ports = tuple(range(len(config.decoders)))
    else:
        folder = open_arc_folder(Path(config.encoder.init_from), Path(config.encoder.backbone))
        _check_same_meaning(config, spec, folder)
        _check_same_tokenizers(config, folder)
        tensors = folder.tensors
        num_given = len(folder.spec.decoder_sizes)
        fresh_ports = tuple(n for n, d in enumerate(config.decoders) if d.fresh_bridge or n >= num_given)
        prefixes = tuple(f"ports.{n}." for n in fresh_ports)
        names = {"skip": lambda name: name.startswith(prefixes), "allow_unused": lambda name: name.startswith("ports.")}
    with torch.device("meta"):
        compressor = _build(config, spec)
    check_fit(compressor, tensors, **names)
    for port_idx in fresh_ports:
        port = compressor.ports[port_idx]
        assert isinstance(port, DecoderPort)
        _check_bridge(port, config)
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
        compressor = _build(config, spec)
    load_backbone(compressor, weights.tensors, **weights.names)
    _fill_rest(compressor, config, spec, weights.fresh_ports)
    set_trained(
        compressor.encoder,
        trained_layers=config.encoder.trained_layers,
        train_embeddings=config.encoder.train_embeddings,
    )
    return compressor


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """A decoder of the run.

    shape: the decoder on the "meta" device.
    tensors: source of its weights.
    """

    shape: Decoder
    tensors: TensorSource

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the decoder."""
        return sum(parameter.numel() for parameter in self.shape.parameters())

    def load(
        self, device: torch.device, dtype: torch.dtype, within: AbstractContextManager[Any] | None = None
    ) -> Decoder:
        """Load the decoder, frozen. within: `engine.partitioned`; by default the decoder is whole on the device."""
        decoder = self.shape
        if within is not None:
            with within:
                decoder = Decoder(decoder.config, activation_checkpointing=decoder.activation_checkpointing)
        load_backbone(decoder, self.tensors, dtype=dtype, device=device)
        return decoder.eval()


def open_decoders(config: RunConfig) -> tuple[DecoderWeights, ...]:
    """Open the run's decoders. Reads sizes, and the tokenizers of decoders with a chat template.

    Raises WeightsError if a tensor is missing or has the wrong shape, or if a sequence can exceed a decoder's attention
    window. Raises TokenizerError under the conditions of `read_layout`.
    """
    opened = []
    for decoder, tokenizer_path in zip(config.decoders, decoder_tokenizer_paths(config), strict=True):
        shape, tensors = open_decoder(
            Path(decoder.backbone),
            decoder.rope_scaling,
            activation_checkpointing=decoder.activation_checkpointing,
            max_positions=longest_sequence(config, _chat_rows(decoder, tokenizer_path)),
        )
        check_fit(shape, tensors)
        opened.append(DecoderWeights(shape=shape, tensors=tensors))
    return tuple(opened)


def _chat_rows(decoder: DecoderConfig, tokenizer_path: Path) -> ChatRows:
    if decoder.chat_template == "none":
        return NO_CHAT
    tokenizer = load_tokenizer(tokenizer_path)
    layout = read_layout(decoder.chat_template, tokenizer, tokenizer_path)
    return ChatRows(*count_template(layout, tokenizer), TEXT_WORDS)


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
        pairs[f"rope_scaling of decoder {decoder.name}"] = (
            read_backbone_config(decoder.backbone, decoder.rope_scaling).rope_scaling,
            read_backbone_config(decoder.backbone, trained.rope_scaling).rope_scaling,
        )
    different = [f"{name}: {mine} here, {other} there" for name, (mine, other) in pairs.items() if mine != other]
    if different:
        raise ConfigError(
            f"encoder.init_from={config.encoder.init_from} was trained with other settings: {'; '.join(different)}. "
            "Set the config to the settings of these weights (weights of the paper's authors: rope_scaling none)."
        )


def _check_same_tokenizers(config: RunConfig, folder: ArcFolder) -> None:
    """Raise TokenizerError if the starting weights were trained with other tokenizers."""
    path = encoder_tokenizer_path(config)
    remedy = f"Use the tokenizer of these weights: encoder.tokenizer={config.encoder.init_from}"
    check_encoder_tokenizer(load_tokenizer(path), folder.encoder_fingerprints, path, remedy=remedy)
    paths = decoder_tokenizer_paths(config)
    for decoder, path, settings in zip(config.decoders, paths, folder.decoders, strict=False):
        if not decoder.fresh_bridge:
            check_decoder_tokenizer(load_tokenizer(path), settings, path)


def _build(config: RunConfig, spec: CompressorSpec) -> Compressor:
    try:
        return build_compressor(spec, activation_checkpointing=config.encoder.activation_checkpointing)
    except ValueError as error:
        raise ConfigError(f"the config's sizes do not match: {error}") from error


def _check_bridge(port: DecoderPort, config: RunConfig) -> None:
    try:
        check_bridge_init(port.bridge, config.bridge.init)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _fill_rest(compressor: Compressor, config: RunConfig, spec: CompressorSpec, fresh_ports: tuple[int, ...]) -> None:
    """Initialize the parameters that were not loaded; identical on all ranks."""
    generator = torch.Generator().manual_seed(config.seed)
    encoder = compressor.encoder
    if spec.memory_tokens and config.encoder.init_from is None:
        set_parameter(compressor, "encoder.memory", torch.ones(spec.memory_tokens, spec.backbone.hidden_size))
    start = _marker_start(config, encoder)
    for port_idx in fresh_ports:
        port = build_port(spec, port_idx)
        for marker in (port.cont, port.rec):
            if marker is not None:
                marker.data.copy_(start)
        init_bridge(port.bridge, config.bridge.init, generator)
        for name, parameter in port.named_parameters():
            set_parameter(compressor, f"ports.{port_idx}.{name}", parameter.detach())


def _marker_start(config: RunConfig, encoder: Encoder) -> torch.Tensor:
    """Initial value of a fresh marker, float32 [1, D]."""
    if config.markers.init == "ones":
        return torch.ones(1, encoder.config.hidden_size)
    tokenizer = load_tokenizer(encoder_tokenizer_path(config))
    ids = tokenizer.encode(MARKER_TEXT)
    table_VD = encoder.tok_embeddings.weight
    with gathered([table_VD]):
        return table_VD.detach()[ids[-1:]].to("cpu", torch.float32, copy=True)


def _is_memory(name: str) -> bool:
    return name == "memory"
