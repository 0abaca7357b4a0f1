"""Frozen weights of a checkpoint's encoder, read from the files that its run started from."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from arc_ds.checkpoints.frozen_source import FrozenSource
from arc_ds.checkpoints.weight_digests import backbone_digest, folder_digest
from arc_ds.errors import CheckpointError, WeightsError
from arc_ds.inference.load import open_arc_folder
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.weights import TensorSource, beyond_layers, open_backbone, read_backbone_config
from arc_ds.model.weights.lazy_tensor import LazyTensor, lazy_rows
from arc_ds.model.weights.locate import locate
from arc_ds.model.weights.selection import use_memory_tokens

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_frozen(
    names: Collection[str], source: FrozenSource, spec: CompressorSpec, moved: Path | None = None
) -> dict[str, LazyTensor]:
    """The frozen tensors of a compressor as float32, with the values that they had in the run. No values are read.

    names: names of the tensors.
    moved: folder of the files, if it is no longer the run's path.

    Raises CheckpointError if the files are missing or hold other weights.
    """
    path = moved or Path(source.path)
    remedy = "Give the folder that it started from to --encoder."
    place = f"the run did not train these weights of its encoder, so the checkpoint does not hold them: {min(names)}, …"
    try:
        if source.key == "encoder.backbone":
            sizes = read_backbone_config(path, source.rope_scaling)
            digest = backbone_digest(sizes, locate(path).files)
        else:
            digest = folder_digest(path)
        if digest != source.digest:
            raise CheckpointError(
                f"{place}. The run started from other weights ({source.key}={source.path}) than {path} holds now. "
                f"{remedy}"
            )
        tensors, prefix = _open(path, source, spec)
    except WeightsError as error:
        raise CheckpointError(f"{place}. They are read from {source.key} of the run: {error} {remedy}") from error
    dtype = _DTYPES[source.dtype]
    places = {name: name.removeprefix(prefix) for name in names}
    return {
        name: lazy_rows(tensors, place, dtype).to(torch.float32)
        for name, place in places.items()
        if place in tensors.shapes
    }


def _open(path: Path, source: FrozenSource, spec: CompressorSpec) -> tuple[TensorSource, str]:
    """The tensors of the files, and the prefix that their names lack."""
    if source.key == "encoder.backbone":
        return open_backbone(path, source.rope_scaling, is_unused=beyond_layers(spec.num_layers)), "encoder."
    backbone = Path(source.backbone)
    try:
        folder = open_arc_folder(path, backbone if backbone.exists() else None)
    except WeightsError as error:
        if backbone.exists():
            raise
        raise CheckpointError(
            f"{error} The run read them from encoder.backbone: put its config.json or params.json back at {backbone}."
        ) from error
    return use_memory_tokens(folder.tensors, spec.memory_tokens), ""
