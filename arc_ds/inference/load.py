"""Load a model from folders: exports of ARC-DS, checkpoints in the reference's ARC format, and decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from arc_ds.batch.segments import MARKERS
from arc_ds.errors import WeightsError
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import (
    TensorSource,
    find_tokenizer,
    load_backbone,
    open_backbone,
    read_arc_checkpoint,
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
class DecoderSettings:
    """Settings of a decoder in training.

    rope_scaling: "checkpoint" if its rotary scaling was applied, "none" if it was ignored.
    bos: whether sequences began with its begin-of-text token.
    """

    rope_scaling: RopeScalingChoice
    bos: bool = True


@dataclass(frozen=True, kw_only=True)
class ArcFolder:
    """An opened folder of compressor weights.

    spec: sizes and semantics of the compressor.
    tensors: the compressor's tensors.
    tokenizer: path of the encoder's tokenizer, or None.
    decoders: settings of each decoder in training.
    texts_apart: whether training tokenized the texts around a context separately, as the reference does.
    max_context_tokens: length of the longest context in training; None if the folder does not record it.
    """

    spec: CompressorSpec
    tensors: TensorSource
    tokenizer: Path | None
    decoders: tuple[DecoderSettings, ...]
    texts_apart: bool = False
    max_context_tokens: int | None = None


def open_arc_folder(arc_dir: Path, encoder_backbone: Path | None = None) -> ArcFolder:
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


def open_trained_decoders(
    paths: Sequence[Path], folder: ArcFolder, arc_dir: str | Path
) -> list[tuple[Decoder, TensorSource]]:
    """Open the decoders that a compressor was trained for, in the order of the ports, before any weights are read.

    Raises WeightsError if there are too many or one has another width than its port, and like `open_decoder`.
    """
    widths = folder.spec.decoder_sizes
    if len(paths) > len(widths):
        raise WeightsError(f"{arc_dir} serves {len(widths)} decoders; {len(paths)} were given. Remove the rest.")
    opened = [open_decoder(path, settings.rope_scaling) for path, settings in zip(paths, folder.decoders, strict=False)]
    for path, width, (decoder, _) in zip(paths, widths, opened, strict=False):
        found = decoder.config.hidden_size
        if found != width:
            raise WeightsError(
                f"decoder {path} has width {found}; the bridge in {arc_dir} maps to width {width}. Use the decoders "
                "that it was trained for, in the same order."
            )
    return opened


def _is_marker_left_out(spec: CompressorSpec) -> Callable[[str], bool]:
    """Predicate for markers that the spec does not use. The reference writes them to the file."""
    left_out = [marker for marker in MARKERS if marker not in spec.markers]
    return frozenset(f"ports.{n}.{marker}" for n in range(len(spec.decoder_sizes)) for marker in left_out).__contains__


def load_decoder_tokenizer(path: Path, decoder: Decoder) -> Tokenizer | None:
    """The tokenizer in a decoder's folder; None if there is none. Raises TokenizerError if it does not fit."""
    found = find_tokenizer(path)
    if found is None:
        return None
    tokenizer = load_tokenizer(found)
    check_fits(tokenizer, decoder.config.vocab_size, f"decoder {path}")
    return tokenizer


def _open_export(folder: Path, config: Fields) -> ArcFolder:
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
    if not (folder / EXPORT_WEIGHTS).is_file():
        raise WeightsError(f"{folder} has no {EXPORT_WEIGHTS}: the export was copied incompletely; copy it again")
    compressor = config.get("compressor")
    spec = CompressorSpec.from_json(compressor if isinstance(compressor, dict) else {})
    return ArcFolder(
        spec=spec,
        tensors=SafetensorsStore(folder / EXPORT_WEIGHTS),
        tokenizer=find_tokenizer(folder),
        decoders=_decoder_settings(config, len(spec.decoder_sizes)),
        max_context_tokens=_max_context_tokens(config),
    )


def _open_arc_checkpoint(folder: Path, encoder_backbone: Path | None) -> ArcFolder:
    checkpoint = read_arc_checkpoint(folder, encoder_backbone)
    spec = spec_of_params(checkpoint.params, checkpoint.backbone, checkpoint.num_ports)
    settings = (DecoderSettings(rope_scaling="none"),) * len(spec.decoder_sizes)
    is_ours, max_context_tokens = (folder / ARC_DECODERS).is_file(), None
    if is_ours:
        ours = Fields.read(folder / ARC_DECODERS)
        settings, max_context_tokens = _decoder_settings(ours, len(spec.decoder_sizes)), _max_context_tokens(ours)
    return ArcFolder(
        spec=spec,
        tensors=checkpoint,
        tokenizer=find_tokenizer(folder) or (None if encoder_backbone is None else find_tokenizer(encoder_backbone)),
        decoders=settings,
        texts_apart=not is_ours,
        max_context_tokens=max_context_tokens,
    )


def _max_context_tokens(plain: Fields) -> int | None:
    """Length of the longest context in training. Earlier exports do not record it."""
    return None if plain.get("max_context_tokens") is None else plain.integer("max_context_tokens")


def _decoder_settings(plain: Fields, num_decoders: int) -> tuple[DecoderSettings, ...]:
    """Read each decoder's settings in training from the list `decoders` of an export's file."""
    decoders = plain.get("decoders")
    entries = [entry for entry in decoders if isinstance(entry, dict)] if isinstance(decoders, list) else []
    settings = [
        DecoderSettings(rope_scaling=entry["rope_scaling"], bos=entry.get("bos", True))
        for entry in entries
        if entry.get("rope_scaling") in get_args(RopeScalingChoice) and isinstance(entry.get("bos", True), bool)
    ]
    if len(settings) != num_decoders or len(entries) != num_decoders:
        raise WeightsError(
            f"{plain.where}: expected `decoders` to give the rope_scaling ({' or '.join(get_args(RopeScalingChoice))}) "
            f"and bos (true or false) of {num_decoders} decoders; got {decoders!r}. Export the checkpoint again."
        )
    return tuple(settings)
