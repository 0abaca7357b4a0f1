"""Load a model from folders: exports of ARC-DS, checkpoints in the reference's ARC format, and decoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from arc_ds.batch.segments import MARKERS
from arc_ds.data.tasks.chat import LayoutName
from arc_ds.errors import ConfigError, TokenizerError, WeightsError
from arc_ds.inference.checksums import check_sizes
from arc_ds.inference.decoders import Implementation, OpenedDecoder, open_decoder
from arc_ds.inference.weight_samples import check_weights
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.compressor import Compressor, DecoderPort
from arc_ds.model.decoder import Decoder
from arc_ds.model.decoder_adapters import DecoderLora
from arc_ds.model.frozen_decoder import FrozenDecoder
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights import (
    SelectedTensors,
    TensorSource,
    check_fit,
    load_backbone,
    read_arc_checkpoint,
    use_memory_tokens,
)
from arc_ds.model.weights.arc_format import ArcCheckpoint
from arc_ds.model.weights.arc_spec import spec_of_params
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.hf_config import RopeScalingChoice
from arc_ds.model.weights.release import is_release
from arc_ds.model.weights.stores import SafetensorsStore
from arc_ds.tokenizers import Tokenizer, check_fits, find_tokenizer, ids_digest, load_tokenizer

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
    chat_template: `decoders[].chat_template` of the run; None if unknown.
    implementation: the one that computed it ("native" or "transformers"); "auto" if the folder does not record it.
    ids_digest: of its tokenizer (`tokenizers.ids_digest`), None if unknown.
    name: its name in the run, None if unknown.
    weights: samples of its weights (`weight_samples.sample_weights`), None if unknown.
    """

    rope_scaling: RopeScalingChoice
    implementation: Implementation = "auto"
    bos: bool = True
    chat_template: LayoutName | None = None
    ids_digest: str | None = None
    name: str | None = None
    weights: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ArcFolder:
    """An opened folder of compressor weights.

    spec: sizes and semantics of the compressor.
    tensors: the compressor's tensors.
    tokenizer: path of the encoder's tokenizer, or None.
    decoders: settings of each decoder in training.
    texts_apart: whether training tokenized the texts around a context separately, as the reference does.
    encoder_fingerprints: of the encoder's tokenizer: its file in training, and the one in the folder. Empty if unknown.
    max_context_tokens: length of the longest context in training; None if the folder does not record it.
    """

    spec: CompressorSpec
    tensors: TensorSource
    tokenizer: Path | None
    decoders: tuple[DecoderSettings, ...]
    texts_apart: bool = False
    encoder_fingerprints: tuple[str, ...] = ()
    max_context_tokens: int | None = None


def open_arc_folder(arc_dir: Path, encoder_backbone: Path | None = None) -> ArcFolder:
    """Open an export of ARC-DS or a checkpoint in the ARC format.

    The reference trains without rotary scaling even if the backbone has one, so its checkpoints are read without
    scaling. Folders written by ARC-DS record the setting.

    encoder_backbone: folder with sizes and tokenizer, which checkpoints of the reference do not contain.

    Raises WeightsError if the folder is neither, if sizes are missing, or if a weight file has another size than the
    export recorded.
    """
    config_file = arc_dir / EXPORT_CONFIG
    is_ours = config_file.is_file() and Fields.read(config_file).get("format") == EXPORT_FORMAT
    if not is_ours and not (arc_dir / "embedder").is_dir() and is_release(arc_dir):
        raise WeightsError(
            f"{arc_dir} is a released encoder as downloaded, which ARC-DS does not read directly. Import it first: "
            f"arc-ds import {arc_dir} OUT"
        )
    if config_file.is_file():
        folder = _open_export(arc_dir, Fields.read(config_file), encoder_backbone)
    elif (arc_dir / "params.json").is_file():
        folder = open_arc_checkpoint(arc_dir, encoder_backbone)
    else:
        raise WeightsError(
            f"{arc_dir} is neither an export of ARC-DS ({EXPORT_CONFIG}) nor an ARC checkpoint (params.json, "
            "embedder/, bridge_module/). Export a run with: arc-ds export RUN OUT"
        )
    check_sizes(arc_dir)
    return folder


def source_checkpoint(folder: Path) -> str | None:
    """Digest of the checkpoint that an export of ARC-DS was made of; None if the folder records none."""
    for name in (EXPORT_CONFIG, ARC_DECODERS):
        if (folder / name).is_file() and isinstance(digest := Fields.read(folder / name).get("checkpoint"), str):
            return digest
    return None


def load_compressor(spec: CompressorSpec, source: TensorSource, device: torch.device, dtype: torch.dtype) -> Compressor:
    """Build a compressor of the given spec with the source's tensors. Raises WeightsError if they do not fit."""
    compressor = empty_compressor(spec, source.path)
    load_backbone(compressor, source, dtype=dtype, device=device)
    return compressor


def check_runs_elsewhere(spec: CompressorSpec, decoder: int) -> None:
    """Raise ConfigError if a decoder has adapters, which another engine does not know. decoder: index of its port."""
    if spec.adapters_of(decoder) is not None:
        raise ConfigError(
            f"decoder {decoder} has adapters (decoders[].lora), so another engine would answer with the wrong weights. "
            "Let ARC-DS run it: use `generate`, and leave out --upstream, `server` and prompt_embeds."
        )


def add_adapters_of_ports(ports: Iterable[nn.Module], decoders: Iterable[FrozenDecoder]) -> None:
    """Add the adapters of ports, if any, to the weights of the loaded decoders."""
    for port, decoder in zip(ports, decoders, strict=False):
        if isinstance(port, DecoderPort) and port.adapters is not None:
            assert isinstance(decoder, Decoder), "`open_trained_decoders` refuses others"
            decoder.use_adapters(port.adapters.spec, port.adapters())
            decoder.use_no_adapters(merged=True)


def check_compressor(spec: CompressorSpec, source: TensorSource) -> None:
    """Raise WeightsError if `load_compressor` would. Reads names and shapes only."""
    check_fit(empty_compressor(spec, source.path), source)


def empty_compressor(spec: CompressorSpec, path: Path) -> Compressor:
    """Build a compressor on "meta". Raises WeightsError, which names the path of the spec, if the spec is invalid."""
    try:
        with torch.device("meta"):
            return build_compressor(spec)
    except ValueError as error:
        raise WeightsError(f"{path} describes an invalid compressor: {error}. Export it again.") from error


def open_trained_decoders(
    paths: Sequence[Path],
    folder: ArcFolder,
    arc_dir: str | Path,
    *,
    trust_remote_code: bool = False,
    force: bool = False,
) -> list[OpenedDecoder]:
    """Open the decoders that a compressor was trained for, in the order of the ports, before any weights are read.

    trust_remote_code: see `open_decoder`.
    force: whether a decoder may be another model than the one of training. A warning names it.

    Raises WeightsError if there are too many, one has another width than its port or is another model, its layers do
    not fit the adapters of its port, and like `open_decoder`.
    """
    widths = folder.spec.decoder_sizes
    if len(paths) > len(widths):
        raise WeightsError(f"{arc_dir} serves {len(widths)} decoders; {len(paths)} were given. Remove the rest.")
    opened = [
        open_decoder(
            path,
            settings.rope_scaling,
            # A decoder that was native then may need transformers here: vectors have the same meaning in both.
            implementation="transformers" if settings.implementation == "transformers" else "auto",
            trust_remote_code=trust_remote_code,
        )
        for path, settings in zip(paths, folder.decoders, strict=False)
    ]
    for path, width, decoder in zip(paths, widths, opened, strict=False):
        found = decoder.sizes.hidden_size
        if found != width:
            raise WeightsError(
                f"decoder {path} has width {found}; the bridge in {arc_dir} maps to width {width}. Use the decoders "
                "that it was trained for, in the same order."
            )
    for path, settings, decoder in zip(paths, folder.decoders, opened, strict=False):
        check_weights(decoder, settings.weights, path, arc_dir, force=force)
    for idx, (path, decoder) in enumerate(zip(paths, opened, strict=True)):
        lora, sizes = folder.spec.adapters_of(idx), decoder.sizes
        if lora is None:
            continue
        if not isinstance(sizes, BackboneConfig) or lora != DecoderLora.of(sizes, rank=lora.rank, scale=lora.scale):
            raise WeightsError(
                f"the adapters in {arc_dir} do not fit the layers of decoder {path}. Give the decoder of the training, "
                "in a form that our own transformer reads."
            )
    return opened


def _used_tensors(checkpoint: ArcCheckpoint, spec: CompressorSpec) -> TensorSource:
    """The tensors of an ARC checkpoint that its settings use.

    The reference writes markers that the settings leave out, and it can use fewer memory tokens than the file holds.
    """
    ports, width = range(len(spec.decoder_sizes)), spec.backbone.hidden_size
    left_out = {f"ports.{n}.{marker}" for n in ports for marker in MARKERS if marker not in spec.markers}
    unused = {name for name in left_out & checkpoint.shapes.keys() if checkpoint.shapes[name] == (1, width)}
    used: TensorSource = checkpoint
    if unused:
        used = SelectedTensors(source=checkpoint, names={n: n for n in checkpoint.shapes if n not in unused})
    return use_memory_tokens(used, spec.memory_tokens) if spec.memory_tokens else used


def load_encoder_tokenizer(folder: ArcFolder, arc_dir: str | Path) -> Tokenizer | None:
    """The encoder's tokenizer; None if there is none. TokenizerError if it does not fit or is not that of training."""
    if folder.tokenizer is None:
        return None
    tokenizer = load_tokenizer(folder.tokenizer)
    check_fits(tokenizer, folder.spec.backbone.vocab_size, f"the encoder in {arc_dir}")
    remedy = "Restore the file, or export the checkpoint again."
    check_encoder_tokenizer(tokenizer, folder.encoder_fingerprints, folder.tokenizer, remedy=remedy)
    return tokenizer


def load_decoder_tokenizer(
    path: Path, decoder: OpenedDecoder, settings: DecoderSettings, *, force: bool = False
) -> Tokenizer | None:
    """The tokenizer of a decoder; None if there is none. TokenizerError if it does not fit or is not that of training.

    path: the decoder's folder or .gguf file.
    settings: of the decoder in training.
    force: whether the decoder may be another model, with its own tokenizer.
    """
    found = find_tokenizer(path)
    if found is None:
        return None
    tokenizer = load_tokenizer(found)
    bos_ids = (tokenizer.bos_id,) if settings.bos and tokenizer.bos_id is not None else ()
    check_fits(tokenizer, decoder.sizes.vocab_size, f"decoder {path}", bos_ids)
    if not force:
        check_decoder_tokenizer(tokenizer, settings, found)
    return tokenizer


def check_encoder_tokenizer(
    tokenizer: Tokenizer, fingerprints: Sequence[str], path: str | Path, *, remedy: str
) -> None:
    """Raise TokenizerError if an encoder was trained with another tokenizer, so its ids have another meaning.

    fingerprints: of the tokenizer in training; empty if unknown, which passes.
    path: of the tokenizer.
    remedy: last sentence of the error.
    """
    if fingerprints and tokenizer.fingerprint not in fingerprints:
        raise TokenizerError(
            f"tokenizer {path} is not the one that the encoder was trained with: its fingerprint is "
            f"{tokenizer.fingerprint[:12]}, expected {fingerprints[0][:12]}. The same ids may mean other "
            f"tokens. {remedy}"
        )


def check_decoder_tokenizer(tokenizer: Tokenizer, settings: DecoderSettings, path: Path, *, remedy: str = "") -> None:
    """Raise TokenizerError if a port was trained for a decoder whose tokenizer gives other ids.

    The file may have another format: a .gguf file may replace a Hugging Face folder.

    remedy: last sentence of the error.
    """
    if settings.ids_digest is not None and ids_digest(tokenizer) != settings.ids_digest:
        raise TokenizerError(
            f"tokenizer {path} gives other ids than the one that this decoder had in training: it has changed, or the "
            "decoder is another model. Restore the tokenizer, or give the decoder that the encoder was trained for. "
            f"{remedy}".rstrip()
        )


def _open_export(folder: Path, config: Fields, encoder_backbone: Path | None) -> ArcFolder:
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
        tokenizer=_find_tokenizer(folder, encoder_backbone),
        decoders=_decoder_settings(config, len(spec.decoder_sizes)),
        encoder_fingerprints=_encoder_fingerprints(folder, config),
        max_context_tokens=_max_context_tokens(config),
    )


def open_arc_checkpoint(folder: Path, encoder_backbone: Path | None = None) -> ArcFolder:
    """Open a checkpoint in the ARC format, like `open_arc_folder`, even if the folder is an export of ARC-DS too."""
    ours = Fields.read(folder / ARC_DECODERS) if (folder / ARC_DECODERS).is_file() else None
    listed = [] if ours is None else ours.get("decoders", [])
    num_decoders = len(listed) if isinstance(listed, list) else 0
    checkpoint = read_arc_checkpoint(folder, encoder_backbone, num_decoders=num_decoders)
    spec = spec_of_params(checkpoint.params, checkpoint.backbone, checkpoint.num_ports)
    found = ArcFolder(
        spec=spec,
        tensors=_used_tensors(checkpoint, spec),
        tokenizer=_find_tokenizer(folder, encoder_backbone),
        decoders=(DecoderSettings(rope_scaling="none"),) * len(spec.decoder_sizes),
        texts_apart=True,
    )
    if ours is None:
        return found
    return replace(
        found,
        decoders=_decoder_settings(ours, len(spec.decoder_sizes)),
        texts_apart=ours.flag("texts_apart", False),
        encoder_fingerprints=_encoder_fingerprints(folder, ours),
        max_context_tokens=_max_context_tokens(ours),
    )


def _find_tokenizer(folder: Path, encoder_backbone: Path | None) -> Path | None:
    return find_tokenizer(folder) or (None if encoder_backbone is None else find_tokenizer(encoder_backbone))


def _encoder_fingerprints(folder: Path, plain: Fields) -> tuple[str, ...]:
    """Fingerprints of the encoder's tokenizer. Earlier exports record none, but contain the tokenizer."""
    recorded = plain.get("encoder_tokenizer")
    if isinstance(recorded, list):
        return tuple(map(str, recorded))
    found = find_tokenizer(folder)
    return () if found is None else (load_tokenizer(found).fingerprint,)


def _max_context_tokens(plain: Fields) -> int | None:
    """Length of the longest context in training. Earlier exports do not record it."""
    return None if plain.get("max_context_tokens") is None else plain.integer("max_context_tokens")


def _decoder_settings(plain: Fields, num_decoders: int) -> tuple[DecoderSettings, ...]:
    """Read each decoder's settings in training from the list `decoders` of an export's file."""
    decoders = plain.get("decoders")
    entries = [entry for entry in decoders if isinstance(entry, dict)] if isinstance(decoders, list) else []
    names = [field.name for field in fields(DecoderSettings)]
    settings = [
        DecoderSettings(**{name: entry[name] for name in names if name in entry})
        for entry in entries
        if entry.get("rope_scaling") in get_args(RopeScalingChoice)
        and entry.get("implementation", "auto") in get_args(Implementation)
        and isinstance(entry.get("bos", True), bool)
        and entry.get("chat_template") in (None, *get_args(LayoutName))
    ]
    if len(settings) != num_decoders or len(entries) != num_decoders:
        raise WeightsError(
            f"{plain.where}: expected `decoders` to give the rope_scaling ({' or '.join(get_args(RopeScalingChoice))}) "
            f"and bos (true or false) of {num_decoders} decoders, and, if any, an implementation "
            f"({' or '.join(get_args(Implementation))}) and a chat_template ({' or '.join(get_args(LayoutName))}); got "
            f"{decoders!r}. Export the checkpoint again."
        )
    return tuple(settings)
