"""arc_kernels: the hot path of a context compressor, as functions on packed tensors.

Needs torch; knows nothing of `arc_ds`. Each function stands in a folder of its own: `reference` in plain torch (the
oracle, and the path on CPU) and the public function that checks its arguments and dispatches.

    attention_varlen       softmax attention over packed segments, q and k of different lengths, GQA
    group_pool, pool_norm  ragged groups of rows to one row each; with the norms that follow
    rms_norm, layer_norm   and, with the residual addition before them, add_rms_norm, add_layer_norm
    rotary, swiglu
    splice                 token embeddings and given rows into one sequence
    linear_cross_entropy   NLL of labelled rows against a frozen head
    use                    context that chooses the implementation: "auto", "triton" or "reference"
    use_attention          context that chooses attention's alone, among them PyTorch's FlashAttention: "flash"

ARC_KERNELS and ARC_ATTENTION in the environment are the choices outside any context; importing this package does not
import triton.
ARC_KERNELS_CHECK=1 has the values of boundaries, ids and labels checked on a GPU too (it synchronises); 0: nowhere.
"""

from arc_kernels._dispatch import use
from arc_kernels.attention import attention_varlen, use_attention
from arc_kernels.cross_entropy import linear_cross_entropy
from arc_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from arc_kernels.pooling import POOL_KINDS, PoolNorm, group_pool, pool_norm
from arc_kernels.rotary import rotary
from arc_kernels.splice import splice
from arc_kernels.swiglu import swiglu

__all__ = [
    "POOL_KINDS",
    "PoolNorm",
    "add_layer_norm",
    "add_rms_norm",
    "attention_varlen",
    "group_pool",
    "layer_norm",
    "linear_cross_entropy",
    "pool_norm",
    "rms_norm",
    "rotary",
    "splice",
    "swiglu",
    "use",
    "use_attention",
]
