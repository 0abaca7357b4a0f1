"""A checkpoint's record of the weights that its run does not train. It does not hold these weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arc_ds.model.weights.hf_config import RopeScalingChoice


@dataclass(frozen=True, kw_only=True)
class FrozenSource:
    """The files from which a run loaded the frozen weights of its encoder.

    key: config key of the path.
    path: path of the files.
    digest: see `weight_digests`.
    backbone: `encoder.backbone` of the run.
    rope_scaling: `encoder.rope_scaling` of the run.
    dtype: dtype of the frozen weights in the run.
    """

    key: Literal["encoder.backbone", "encoder.init_from"]
    path: str
    digest: str
    backbone: str
    rope_scaling: RopeScalingChoice
    dtype: Literal["float32", "bfloat16"]
