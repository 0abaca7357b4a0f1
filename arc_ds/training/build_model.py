"""Build the model of a run from its config: sizes, a compressor with its starting weights, and frozen decoders.

The `open_…` functions check files and sizes without reading any tensor. Weights are then loaded one tensor at a time,
so a host never holds a whole model for each of its ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arc_ds.batch.segments import MARKERS
from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.config.schema import DecoderConfig, EncoderConfig, LoraConfig, RunConfig
from arc_ds.config.validate import NO_ADAPTERS
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.errors import ConfigError
from arc_ds.inference.decoders import OpenedDecoder, open_decoder, read_decoder_sizes
from arc_ds.inference.load import (
    ArcFolder,
    check_decoder_tokenizer,
    check_encoder_tokenizer,
    empty_compressor,
    open_arc_folder,
)
from arc_ds.inference.weight_samples import sample_weights
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.bridge import check_bridge_init, init_bridge
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder_adapters import DecoderLora
from arc_ds.model.frozen_decoder import DecoderSizes
from arc_ds.model.lora import is_adapter, starting_adapter
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec, LoraSpec, build_bridge, build_compressor, build_port
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
from arc_ds.training.ports import PortPlan, PortRecord, plan_ports, tensors_of_run

MARKER_TEXT = "\n"  # markers start from this token's embedding because it ends a passage in most texts


def compressor_spec(config: RunConfig) -> CompressorSpec:
    """The specification of the configured compressor, with the ports that are trained. Reads sizes but no weights.

    Raises WeightsError if a backbone cannot be read, and ConfigError if sizes do not match.
    """
    backbone = read_backbone_config(config.encoder.backbone, config.encoder.rope_scaling)
    pooling = config.pooling
    sizes = {idx: decoder_sizes(decoder) for idx, decoder in config.trained_decoders.items()}
    spec = CompressorSpec(
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
        bridge_shared=config.bridge.shared,
        decoder_sizes=(),
    )
    return spec.with_ports((each.hidden_size, _decoder_lora(config, idx, each)) for idx, each in sizes.items())


def _decoder_lora(config: RunConfig, idx: int, sizes: DecoderSizes) -> DecoderLora | None:
    """The configured adapters of a decoder."""
    lora = lora_spec(config.decoders[idx].lora)
    if lora is None:
        return None
    if not isinstance(sizes, BackboneConfig):
        raise ConfigError(f"decoders.{idx}.lora: {NO_ADAPTERS}")
    return DecoderLora.of(sizes, rank=lora.rank, scale=lora.scale)


def decoder_sizes(decoder: DecoderConfig) -> DecoderSizes:
    """The sizes of a decoder, from its files. Raises WeightsError if they cannot be read."""
    return read_decoder_sizes(
        Path(decoder.backbone),
        decoder.rope_scaling,
        implementation=decoder.implementation,
        trust_remote_code=decoder.trust_remote_code,
    )


def tokenizer_path(model: EncoderConfig | DecoderConfig) -> Path:
    """Path of the tokenizer of the encoder or of a decoder. Raises TokenizerError if there is none."""
    return tokenizer_file(Path(model.tokenizer or model.backbone))


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """The opened and checked weights that a run's compressor starts from.

    tensors: the encoder's backbone, or the export of another run.
    names: arguments of `weights.check_fit` that say which parameters the tensors fill.
    plan: origin and place of the ports.
    folder: the opened `encoder.init_from`, or None.
    """

    tensors: TensorSource
    names: dict[str, Any]
    plan: PortPlan
    folder: ArcFolder | None = None


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
        plan, folder = plan_ports(config.decoders, (), keep_unlisted=False), None
    else:
        folder = open_arc_folder(Path(encoder.init_from), Path(encoder.backbone))
        # Afterwards every tensor is known, also those that the run leaves out.
        check_fit(empty_compressor(folder.spec, folder.tensors.path), folder.tensors)
        theirs = [decoder.name for decoder in folder.decoders]
        plan = plan_ports(config.decoders, theirs, keep_unlisted=encoder.keep_ports)
        _check_same_meaning(config, spec, folder, plan)
        _check_shared_bridge(config, folder, plan)
        _check_same_tokenizers(config, folder, plan)
        tensors = tensors_of_run(folder, spec, plan)
        prefixes = _fresh_prefixes(spec, plan)
        names = {"skip": lambda name: name.startswith(prefixes)}
    try:
        with torch.device("meta"):
            compressor = build_compressor(spec)
        for prefix in _fresh_prefixes(spec, plan):
            check_bridge_init(compressor.get_submodule(prefix.removesuffix(".")), config.bridge.init)
    except ValueError as error:
        raise ConfigError(f"the config's sizes do not match: {error}") from error
    check_fit(compressor, tensors, **names)
    return StartingWeights(tensors=tensors, names=names, plan=plan, folder=folder)


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
        compressor = build_compressor(
            spec,
            activation_checkpointing=config.encoder.activation_checkpointing,
            lora=lora_spec(config.encoder.lora),
        )
    is_other = weights.names["skip"]
    names = weights.names | {"skip": lambda name: is_adapter(name) or is_other(name)}
    load_backbone(compressor, weights.tensors, **names, name="encoder")
    _fill_rest(compressor, config, spec, weights.plan)
    set_trained(compressor.encoder, **config.encoder.trained_parts)
    return compressor


def lora_spec(lora: LoraConfig | None) -> LoraSpec | None:
    """The configured adapters."""
    return None if lora is None else LoraSpec(rank=lora.rank, scale=lora.alpha / lora.rank)


@dataclass(frozen=True, kw_only=True)
class DecoderFiles:
    """The opened and checked files of a decoder of the run.

    weights: its opened weights.
    placement: as configured.
    reader: its tokenizer and chat template.
    fingerprints: of the tokenizer and the chat template, by config key.
    record: of its port, for checkpoints.
    """

    weights: OpenedDecoder
    placement: str
    reader: ReaderFiles
    fingerprints: Mapping[str, str]
    record: PortRecord


def open_decoders(decoders: Mapping[int, DecoderConfig], *, bos: bool) -> tuple[DecoderFiles, ...]:
    """Open the run's decoders. Reads sizes, tokenizers and samples of the weights.

    decoders: the trained decoders by their index in the config.
    bos: whether sequences begin with begin-of-text.

    Raises WeightsError if a tensor is missing or has the wrong shape. Raises TokenizerError if samples have ids beyond
    a decoder's embedding, or under the conditions of `read_layout`.
    """
    opened = []
    for idx, decoder in decoders.items():
        files = ReaderFiles(tokenizer=tokenizer_path(decoder), chat_template=decoder.chat_template)
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
        settings = TrainedFor(
            name=decoder.name,
            rope_scaling=decoder.rope_scaling,
            implementation="native" if isinstance(weights.sizes, BackboneConfig) else "transformers",
            bos=bos,
            chat_template=decoder.chat_template,
        )
        ids = ids_digest(reader.tokenizer)
        opened.append(
            DecoderFiles(
                weights=weights,
                placement=decoder.placement,
                reader=files,
                fingerprints=fingerprints,
                record=PortRecord(decoder=settings, ids_digest=ids, weights=sample_weights(weights)),
            )
        )
    return tuple(opened)


def _check_same_meaning(config: RunConfig, spec: CompressorSpec, folder: ArcFolder, plan: PortPlan) -> None:
    """Raise ConfigError if the starting weights were trained with settings that contradict the config.

    Pooling factors may differ (the paper fine-tunes to a lower one), and the first of several memory tokens may be
    used. Decoders with fresh ports may differ too.
    """
    ours, theirs = spec, folder.spec
    pairs = {
        "encoder.rope_scaling": (ours.backbone.rope_scaling, theirs.backbone.rope_scaling),
        "encoder.causal": (ours.causal, theirs.causal),
        "pooling.strategy": (ours.strategy, theirs.strategy),
        "pooling.pooled_queries": (ours.pooled_queries, theirs.pooled_queries),
        "pooling.where": (ours.where, theirs.where),
        "number of layers that pool": (len(ours.rules), len(theirs.rules)),
    }
    if not 0 < ours.memory_tokens <= theirs.memory_tokens:
        pairs["pooling.memory_tokens"] = (ours.memory_tokens, theirs.memory_tokens)
    if plan.kept or len(plan.fresh) < len(plan.sources):
        pairs |= _form_of_ports(ours, theirs, is_kept=bool(plan.kept))
    for port, (decoder, source) in enumerate(zip(config.trained_decoders.values(), plan.sources, strict=True)):
        if source is None:
            continue
        trained = folder.decoders[source]
        pairs[f"lora of decoder {decoder.name}"] = (_adapters(ours, port), _adapters(theirs, source))
        pairs[f"data.decoder_bos, for decoder {decoder.name}"] = (config.data.decoder_bos, trained.bos)
        sizes = decoder_sizes(decoder)
        if isinstance(sizes, BackboneConfig):  # transformers always applies the checkpoint's scaling
            scaling = read_backbone_config(decoder.backbone, trained.rope_scaling).rope_scaling
            pairs[f"rope_scaling of decoder {decoder.name}"] = (sizes.rope_scaling, scaling)
    different = [f"{name}: {mine} here, {other} there" for name, (mine, other) in pairs.items() if mine != other]
    if different:
        raise ConfigError(
            f"encoder.init_from={config.encoder.init_from} was trained with other settings: {'; '.join(different)}. "
            "Set the config to the settings of these weights (weights of the paper's authors: rope_scaling none)."
            + (" To leave out the ports of other decoders, set encoder.keep_ports=false." if plan.kept else "")
        )


def _adapters(spec: CompressorSpec, port: int) -> str:
    lora = spec.adapters_of(port)
    return "none" if lora is None else f"rank {lora.rank} and alpha {lora.scale * lora.rank:g}"


def _form_of_ports(ours: CompressorSpec, theirs: CompressorSpec, *, is_kept: bool) -> dict[str, tuple[Any, Any]]:
    """Settings of ports by config key, here and there, that must be equal if a port is continued or kept."""
    pairs: dict[str, tuple[Any, Any]] = {"bridge.kind": (ours.bridge, theirs.bridge)}
    if is_kept or not set(ours.markers) <= set(theirs.markers):
        pairs["markers"] = (", ".join(ours.markers) or "none", ", ".join(theirs.markers) or "none")
    if is_kept and ours.bridge in ("mlp", "mlp_gelu", "rms"):
        pairs["bridge.hidden_size"] = (ours.bridge_hidden_size, theirs.bridge_hidden_size)
    return pairs


def _check_shared_bridge(config: RunConfig, folder: ArcFolder, plan: PortPlan) -> None:
    """Raise ConfigError if a bridge that all decoders share cannot start from these weights."""
    if not config.bridge.shared:
        return
    if plan.kept:
        kept = ", ".join(port.name for port in plan.kept)
        raise ConfigError(
            f"bridge.shared is true, so every step trains the bridge, and the ports of {kept} cannot be kept. Set "
            "bridge.shared=false: each decoder then gets a copy of the bridge. Or train all decoders, or set "
            "encoder.keep_ports=false."
        )
    trained = config.trained_decoders.values()
    names = [decoder.name for decoder, source in zip(trained, plan.sources, strict=True) if source is not None]
    if len(names) > 1 and not folder.spec.bridge_shared:
        raise ConfigError(
            f"bridge.shared is true, but {config.encoder.init_from} has a bridge for each of {', '.join(names)}. Set "
            "fresh_bridge for all of them except the one whose bridge they will share, or bridge.shared=false."
        )


def _fresh_prefixes(spec: CompressorSpec, plan: PortPlan) -> tuple[str, ...]:
    """Prefixes of the parameters that start fresh, in the order in which they are drawn."""
    prefixes = [f"ports.{idx}." for idx in plan.fresh]
    if spec.bridge_shared and len(plan.fresh) == len(plan.sources):
        prefixes.append("bridge.")
    return tuple(prefixes)


def _check_same_tokenizers(config: RunConfig, folder: ArcFolder, plan: PortPlan) -> None:
    """Raise TokenizerError if the starting weights were trained with other tokenizers."""
    path = tokenizer_path(config.encoder)
    remedy = f"Use the tokenizer of these weights: encoder.tokenizer={config.encoder.init_from}"
    check_encoder_tokenizer(load_tokenizer(path), folder.encoder_fingerprints, path, remedy=remedy)
    for (idx, decoder), source in zip(config.trained_decoders.items(), plan.sources, strict=True):
        if source is not None:
            path, settings = tokenizer_path(decoder), folder.decoders[source]
            remedy = f"If it is a new decoder, set decoders.{idx}.fresh_bridge=true."
            check_decoder_tokenizer(load_tokenizer(path), settings, path, remedy=remedy)


def _fill_rest(compressor: Compressor, config: RunConfig, spec: CompressorSpec, plan: PortPlan) -> None:
    """Initialize the parameters that were not loaded; identical on all ranks."""
    generator = torch.Generator().manual_seed(config.seed)
    of_decoders = torch.Generator().manual_seed(config.seed)  # fresh bridges do not depend on adapters
    if spec.memory_tokens and config.encoder.init_from is None:
        set_parameter(compressor, "encoder.memory", torch.ones(spec.memory_tokens, spec.backbone.hidden_size))
    if config.encoder.lora is not None:
        of_adapters = torch.Generator().manual_seed(config.seed)  # of its own, too
        for name, parameter in list(compressor.named_parameters()):
            if is_adapter(name):
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # of the whole, if it is partitioned
                set_parameter(compressor, name, starting_adapter(name, shape, of_adapters))
    table_VD = compressor.encoder.tok_embeddings.weight
    if config.markers.init == "ones":
        start_1D = torch.ones(1, spec.backbone.hidden_size)
    else:
        ids = load_tokenizer(tokenizer_path(config.encoder)).encode(MARKER_TEXT)
        with gathered([table_VD]):
            start_1D = table_VD.detach()[ids[-1:]].to("cpu", torch.float32, copy=True)
    for prefix in _fresh_prefixes(spec, plan):
        fresh = build_bridge(spec, 0) if prefix == "bridge." else build_port(spec, int(prefix.split(".")[1]))
        for name, parameter in fresh.named_parameters():
            if name in MARKERS:
                parameter.data.copy_(start_1D)
        init_bridge(fresh, config.bridge.init, generator)
        for name, parameter in fresh.named_parameters():
            if name.startswith("adapters."):
                parameter.data.copy_(starting_adapter(name, tuple(parameter.shape), of_decoders))
        for name, parameter in fresh.named_parameters():
            set_parameter(compressor, f"{prefix}{name}", parameter.detach())
