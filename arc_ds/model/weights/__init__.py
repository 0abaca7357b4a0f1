"""Read and write weights: backbones of several families, and ARC checkpoints of the reference implementation."""

from arc_ds.model.weights.arc_format import read_arc_checkpoint, write_arc_checkpoint
from arc_ds.model.weights.load import TensorSource, check_fit, copy_into, gathered, load_backbone, set_parameter
from arc_ds.model.weights.names import beyond_layers, permute_rotary
from arc_ds.model.weights.selection import SelectedTensors, use_memory_tokens
from arc_ds.model.weights.source import BackboneSource, open_backbone, read_backbone_config

__all__ = [
    "BackboneSource",
    "SelectedTensors",
    "TensorSource",
    "beyond_layers",
    "check_fit",
    "copy_into",
    "gathered",
    "load_backbone",
    "open_backbone",
    "permute_rotary",
    "read_arc_checkpoint",
    "read_backbone_config",
    "set_parameter",
    "use_memory_tokens",
    "write_arc_checkpoint",
]
