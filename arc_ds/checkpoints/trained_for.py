"""What a checkpoint says of the decoders that its compressor was trained for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainedFor:
    """A decoder that a compressor was trained for, and how it was read.

    name: in the run. rope_scaling: whether its rotary scaling was heeded. bos: whether its sequences began with its
    begin-of-text token.
    """

    name: str
    rope_scaling: Literal["checkpoint", "none"]
    bos: bool = True
