"""A checkpoint's record of the decoders that its compressor was trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from arc_ds.data.tasks.chat import LayoutName
from arc_ds.model.weights.hf_config import RopeScalingChoice


@dataclass(frozen=True, kw_only=True)
class TrainedFor:
    """A decoder that a compressor was trained for, and its settings in training.

    name: the decoder's name in the run.
    rope_scaling: "checkpoint" if the decoder's rotary scaling was applied, "none" if it was ignored.
    implementation: "native" or "transformers". Earlier checkpoints have native decoders only.
    bos: whether sequences began with the decoder's begin-of-text token.
    chat_template: `decoders[].chat_template` of the run. None if unknown: earlier checkpoints do not record it.
    """

    name: str
    rope_scaling: RopeScalingChoice
    implementation: Literal["native", "transformers"] = "native"
    bos: bool = True
    chat_template: LayoutName | None = None
