"""Load a model from folders: exports of ARC-DS, checkpoints in the reference's ARC format, and decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from arc_ds.batch.segments import MARKERS
from arc_ds.errors import ConfigError, WeightsError
from arc_ds.inference.arc import ArcModel
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import (
    TensorSource,
    find_tokenizer,
    load_backbone,
    open_backbone,
    read_arc_checkpoint,
    read_backbone_config,
)
from arc_ds.model.weights.arc_spec import spec_of_params
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.hf_config import RopeScalingChoice
from arc_ds.model.weights.stores import SafetensorsStore
from arc_ds.tokenizers import Tokenizer, check_fits, load_tokenizer

EXPORT_FORMAT = "arc-ds"
EXPORT_CONFIG = "config.json"
EXPORT_WEIGHTS = "model.safetensors"
EXPORT_VERSION = 1
ARC_DECODERS = "decoders.json"  # our addition: the ARC format does not record the decoders' settings


@dataclass(frozen=True, kw_only=True)
class DecoderReading:
    """Settings of a decoder in training.

    rope_scaling: "checkpoint" if its rotary scaling was applied, "none" if it was ignored.
    bos: whether sequences began with its begin-of-text token.
    """

    rope_scaling: RopeScalingChoice
    bos: bool = True


@dataclass(frozen=True, kw_only=True)
class ArcSourceFolder:
    """An opened folder of compressor weights.

    spec: sizes and semantics of the compressor.
    tensors: the compressor's tensors.
    tokenizer: path of the encoder's tokenizer, or None.
    decoders: settings of each decoder in training.
    texts_apart: whether training tokenized the texts around a context separately, as the reference does.
    """

    spec: CompressorSpec
    tensors: TensorSource
    tokenizer: Path | None
    decoders: tuple[DecoderReading, ...]
    texts_apart: bool = False


def load_arc_model(
    arc_dir: Path,
    decoders: Sequence[Path],
    *,
    encoder_backbone: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    pooling_factor: int | None,
) -> ArcModel:
    """See `ArcModel.from_checkpoint`."""
    source = open_arc_folder(arc_dir, encoder_backbone)
    spec = source.spec if pooling_factor is None else _with_factor(source.spec, pooling_factor)
    _check_widths(decoders, source, arc_dir)
    compressor = load_compressor(spec, source.tensors, device, dtype)
    loaded = [
        load_decoder(path, reading.rope_scaling, device, dtype)
        for path, reading in zip(decoders, source.decoders, strict=False)
    ]
    encoder_tokenizer = None if source.tokenizer is None else load_tokenizer(source.tokenizer)
    if encoder_tokenizer is not None:
        check_fits(encoder_tokenizer, spec.backbone.vocab_size, f"the encoder in {arc_dir}")
    return ArcModel(
        spec,
        compressor,
        loaded,
        encoder_tokenizer=encoder_tokenizer,
        decoder_tokenizers=[_decoder_tokenizer(path, d) for path, d in zip(decoders, loaded, strict=True)],
        decoder_bos=[reading.bos for reading in source.decoders],
        texts_apart=source.texts_apart,
    )


def open_arc_folder(arc_dir: Path, encoder_backbone: Path | None = None) -> ArcSourceFolder:
    """Open an export of ARC-DS or a checkpoint in the ARC format.

    The reference trains without rotary scaling even if the backbone has one, so its checkpoints are read without
    scaling. Folders written by ARC-DS record the setting.

    encoder_backbone: folder with sizes and tokenizer, which checkpoints of the reference do not contain.

    Raises WeightsError if the folder is neither, or if sizes are missing.
    """
    config_file = arc_dir / EXPORT_CONFIG
    if config_file.is_file():
        return _open_export(arc_dir, Fields.read(config_file))
    if not (arc_dir / "params.json").is_file():
        raise WeightsError(
            f"{arc_dir} is neither an export of ARC-DS ({EXPORT_CONFIG}) nor an ARC checkpoint (params.json, "
            "embedder/, bridge_module/). Export a run with: arc-ds export RUN OUT"
        )
    return _open_arc_checkpoint(arc_dir, encoder_backbone)


def load_compressor(spec: CompressorSpec, source: TensorSource, device: torch.device, dtype: torch.dtype) -> Compressor:
    """Build a compressor of the given spec with the source's tensors. Raises WeightsError if they do not fit."""
    try:
        with torch.device("meta"):
            compressor = build_compressor(spec)
    except ValueError as error:
        raise WeightsError(f"{source.path} describes an invalid compressor: {error}. Export it again.") from error
    load_backbone(compressor, source, dtype=dtype, device=device, allow_unused=_is_marker_left_out(spec))
    return compressor


def load_decoder(
    path: Path, rope_scaling: RopeScalingChoice, device: torch.device, dtype: torch.dtype, **options: Any
) -> Decoder:
    """Load a frozen decoder from a weights folder or a .gguf file, one tensor at a time.

    options: those of `open_decoder`.

    Raises WeightsError if a tensor is missing or has the wrong shape.
    """
    decoder, source = open_decoder(path, rope_scaling, **options)
    load_backbone(decoder, source, dtype=dtype, device=device)
    return decoder.eval()


def open_decoder(
    path: Path,
    rope_scaling: RopeScalingChoice,
    *,
    activation_checkpointing: bool = False,
    max_positions: int | None = None,
) -> tuple[Decoder, TensorSource]:
    """Build a decoder on "meta" with the sizes of a weights folder or a .gguf file, and open its tensors.

    max_positions: length of the longest sequence that it will read.

    Raises WeightsError if the sizes cannot be read.
    """
    source = open_backbone(path, rope_scaling, max_positions=max_positions)
    with torch.device("meta"):
        return Decoder(source.config, activation_checkpointing=activation_checkpointing), source


def _is_marker_left_out(spec: CompressorSpec) -> Callable[[str], bool]:
    """Predicate for markers that the spec does not use. The reference writes them to the file."""
    left_out = [marker for marker in MARKERS if marker not in spec.markers]
    return frozenset(f"ports.{n}.{marker}" for n in range(len(spec.decoder_sizes)) for marker in left_out).__contains__


def _decoder_tokenizer(path: Path, decoder: Decoder) -> Tokenizer | None:
    found = find_tokenizer(path)
    if found is None:
        return None
    tokenizer = load_tokenizer(found)
    check_fits(tokenizer, decoder.config.vocab_size, f"decoder {path}")
    return tokenizer


def _with_factor(spec: CompressorSpec, factor: int) -> CompressorSpec:
    if factor < 1 or not spec.rules:
        raise ConfigError(
            f"pooling_factor is {factor}; expected at least 1 and a compressor with pooled layers (this one has "
            f"{spec.memory_tokens} memory tokens)"
        )
    return dataclasses.replace(spec, rules=(*spec.rules[:-1], *group_rules(spec.strategy, (factor,))))


def _check_widths(decoders: Sequence[Path], source: ArcSourceFolder, arc_dir: Path) -> None:
    """Compare the decoders' widths with the ports' before any weights are read."""
    widths, readings = source.spec.decoder_sizes, source.decoders
    if len(decoders) > len(widths):
        raise WeightsError(f"{arc_dir} serves {len(widths)} decoders; {len(decoders)} were given. Remove the rest.")
    for path, width, reading in zip(decoders, widths, readings, strict=False):
        found = read_backbone_config(path, reading.rope_scaling).hidden_size
        if found != width:
            raise WeightsError(
                f"decoder {path} has width {found}; the bridge in {arc_dir} maps to width {width}. Use the decoders "
                "that it was trained for, in the same order."
            )


def _open_export(folder: Path, config: Fields) -> ArcSourceFolder:
    if config.get("format") != EXPORT_FORMAT:
        raise WeightsError(
            f"{folder} is not an export of ARC-DS: `format` in {EXPORT_CONFIG} is {config.get('format')!r}, expected "
            f"{EXPORT_FORMAT!r}. Use a folder that `arc-ds export` wrote."
        )
    if config.get("version") != EXPORT_VERSION:
        raise WeightsError(
            f"{folder} is an export of version {config.get('version')!r}; this ARC-DS reads version {EXPORT_VERSION}. "
            "Export the checkpoint again with this one."
        )
    compressor = config.get("compressor")
    spec = CompressorSpec.from_json(compressor if isinstance(compressor, dict) else {})
    return ArcSourceFolder(
        spec=spec,
        tensors=_ExportSource(folder),
        tokenizer=find_tokenizer(folder),
        decoders=_decoder_readings(config, len(spec.decoder_sizes)),
    )


def _open_arc_checkpoint(folder: Path, encoder_backbone: Path | None) -> ArcSourceFolder:
    """Sizes in the checkpoint take precedence over `encoder_backbone`, because they describe the training."""
    checkpoint = read_arc_checkpoint(folder)
    backbone = checkpoint.backbone
    if backbone is None and encoder_backbone is not None:
        backbone = read_backbone_config(encoder_backbone, "none")
    tensors = checkpoint.source(backbone)
    spec = spec_of_params(checkpoint.params, tensors.backbone, checkpoint.num_ports)
    readings = (DecoderReading(rope_scaling="none"),) * len(spec.decoder_sizes)
    is_ours = (folder / ARC_DECODERS).is_file()
    if is_ours:
        readings = _decoder_readings(Fields.read(folder / ARC_DECODERS), len(spec.decoder_sizes))
    return ArcSourceFolder(
        spec=spec,
        tensors=tensors,
        tokenizer=find_tokenizer(folder) or (None if encoder_backbone is None else find_tokenizer(encoder_backbone)),
        decoders=readings,
        texts_apart=not is_ours,
    )


def _decoder_readings(plain: Fields, num_decoders: int) -> tuple[DecoderReading, ...]:
    """Read each decoder's settings in training from the list `decoders` of an export's file."""
    decoders = plain.get("decoders")
    entries = [entry for entry in decoders if isinstance(entry, dict)] if isinstance(decoders, list) else []
    readings = [
        DecoderReading(rope_scaling=entry["rope_scaling"], bos=entry.get("bos", True))
        for entry in entries
        if entry.get("rope_scaling") in get_args(RopeScalingChoice) and isinstance(entry.get("bos", True), bool)
    ]
    if len(readings) != num_decoders or len(entries) != num_decoders:
        raise WeightsError(
            f"{plain.where}: expected `decoders` to give the rope_scaling ({' or '.join(get_args(RopeScalingChoice))}) "
            f"and bos (true or false) of {num_decoders} decoders; got {decoders!r}. Export the checkpoint again."
        )
    return tuple(readings)


class _ExportSource:
    """The tensors of an export, by internal name."""

    def __init__(self, folder: Path) -> None:
        if not (folder / EXPORT_WEIGHTS).is_file():
            raise WeightsError(f"{folder} has no {EXPORT_WEIGHTS}: the export was copied incompletely; copy it again")
        self.path = folder
        self._store = SafetensorsStore(folder / EXPORT_WEIGHTS)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._store.names()))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._store.shape(name)

    def tensor(self, name: str) -> Tensor:
        return self._store.read(name)
