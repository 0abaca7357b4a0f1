"""What the weights of a run are, wherever their files lie: cheap digests that hosts and a resume compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from arc_ds.config.schema import RunConfig
from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.weights.locate import locate

_HEAD_BYTES = 1 << 20  # the header of a safetensors file, and most of a GGUF file's
_BLOCK_BYTES = 4096
_NUM_BLOCKS = 64
_SUFFIXES = (".safetensors", ".pth", ".gguf", ".bin")


def weight_digests(config: RunConfig, encoder: BackboneConfig, decoders: Sequence[BackboneConfig]) -> dict[str, str]:
    """sha256 of each backbone, and of `encoder.init_from` where it is set, by their keys in the config.

    encoder, decoders: their sizes as read, which are part of the digests. Of the files counts what `files_digest`
    reads; of the encoder's only where training starts from them. WeightsError where a file cannot be read.
    """
    init_from = config.encoder.init_from
    digests = {"encoder.backbone": _digest(encoder, config.encoder.backbone if init_from is None else None)}
    if init_from is not None:
        found = sorted(path for path in Path(init_from).rglob("*") if path.suffix in _SUFFIXES)
        digests["encoder.init_from"] = files_digest(found)
    for idx, (decoder, sizes) in enumerate(zip(config.decoders, decoders, strict=True)):
        digests[f"decoders.{idx}.backbone"] = _digest(sizes, decoder.backbone)
    return digests


def files_digest(files: Sequence[Path]) -> str:
    """sha256 of each file's size, its first MiB, and 64 blocks of 4 KiB at even distances up to its end.

    So it takes milliseconds a file, and tells another model, another training or another precision, which differ
    nearly everywhere. It cannot see a change between the blocks (single rows edited in place); and it takes the same
    tensors in another split or format for others. Names and folders do not count. WeightsError where a file cannot be
    read.
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


def _digest(sizes: BackboneConfig, path: str | None) -> str:
    """Of sizes, and of the files at a path where there is one."""
    files = () if path is None else locate(Path(path)).files
    content = json.dumps([asdict(sizes), files_digest(files)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
