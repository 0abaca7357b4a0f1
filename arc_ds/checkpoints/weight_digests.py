"""Cheap digests of a run's weights, independent of file paths. Hosts compare them, and so does a resumed run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from arc_ds.config.schema import EncoderConfig
from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import FIRST_FIELDS, FIRST_SCALING_FIELDS, BackboneConfig, RopeScaling
from arc_ds.model.frozen_decoder import DecoderSizes
from arc_ds.model.weights.locate import locate

_HEAD_BYTES = 1 << 20  # the header of a safetensors file, and most of a GGUF file's
_BLOCK_BYTES = 4096
_NUM_BLOCKS = 64
_SUFFIXES = (".safetensors", ".pth", ".gguf", ".bin")


def weight_digests(
    encoder: EncoderConfig, sizes: BackboneConfig, decoders: Mapping[int, tuple[Sequence[Path], DecoderSizes]]
) -> dict[str, str]:
    """sha256 of each backbone, and of `encoder.init_from` if it is set, by config key.

    sizes: sizes of the encoder's backbone, included in its digest.
    decoders: files of each decoder's backbone, and its sizes, which are included in its digest, by the decoder's index
        in the config.

    Files are hashed by `files_digest`. The encoder backbone's files are hashed only if training starts from them.
    Raises WeightsError if a file cannot be read.
    """
    encoder_files = locate(Path(encoder.backbone)).files if encoder.init_from is None else ()
    digests = {"encoder.backbone": backbone_digest(sizes, encoder_files)}
    if encoder.init_from is not None:
        digests["encoder.init_from"] = folder_digest(Path(encoder.init_from))
    for idx, (decoder_files, decoder_sizes) in decoders.items():
        digests[f"decoders.{idx}.backbone"] = backbone_digest(decoder_sizes, decoder_files)
    return digests


def backbone_digest(sizes: DecoderSizes, files: Sequence[Path]) -> str:
    """sha256 of a backbone's sizes and files. Raises WeightsError if a file cannot be read."""
    content = json.dumps([_plain(sizes), files_digest(files)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 of the weight files in a folder such as `encoder.init_from`. Raises WeightsError if there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    if not files:
        raise WeightsError(f"{folder} holds no weights.")
    return files_digest(files)


def files_digest(files: Sequence[Path]) -> str:
    """sha256 over each file's size, its first MiB, and 64 blocks of 4 KiB at even distances up to its end.

    This takes milliseconds per file. It detects another model, training or precision, because these differ nearly
    everywhere. It misses changes between the blocks (single rows edited in place). The same tensors in another split or
    format have another digest. File and folder names are not hashed. Raises WeightsError if a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(f"{size};".encode() + file.read(_HEAD_BYTES))
                for number in range(_NUM_BLOCKS):
                    rest = max(size - _HEAD_BYTES - _BLOCK_BYTES, 0)
                    file.seek(_HEAD_BYTES + rest * number // (_NUM_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
        except OSError as error:
            raise WeightsError(
                f"{path} cannot be read: {error.strerror}. Check the file and its permissions."
            ) from error
    return digest.hexdigest()


def _plain(sizes: DecoderSizes) -> dict[str, Any]:
    """The fields of sizes, without newer ones that have their defaults, so digests of earlier versions stay valid."""
    if not isinstance(sizes, BackboneConfig):
        return asdict(sizes)
    plain = _without_defaults(sizes, FIRST_FIELDS)
    if sizes.rope_scaling is not None:
        plain["rope_scaling"] = _without_defaults(sizes.rope_scaling, FIRST_SCALING_FIELDS)
    return plain


def _without_defaults(values: BackboneConfig | RopeScaling, kept: Sequence[str]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(values)}
    return {name: value for name, value in asdict(values).items() if name in kept or value != defaults[name]}
