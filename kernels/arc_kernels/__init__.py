"""arc_kernels: the hot path of a context compressor, as functions on packed tensors.

Requires torch and does not depend on `arc_ds`. Each function has its own folder with a public function, which checks
its arguments and dispatches, and a `reference` in plain torch, which serves as test oracle and runs on the CPU.

    attention_varlen       softmax attention over packed segments, with GQA and a sliding window; lengths of q and k may
                           differ
    group_pool, pool_norm  reduce ragged groups of rows to one row each; pool_norm also computes the following norms
    rms_norm, layer_norm   norms; add_rms_norm and add_layer_norm add a residual first
    rotary, swiglu
    splice                 place token embeddings and given rows in one sequence
    linear_cross_entropy   NLL of labelled rows with a frozen head
    use                    context that chooses the implementation: "auto", "triton" or "reference"
    use_attention          context that chooses attention's implementation, such as PyTorch's FlashAttention ("flash")

Outside any context, the environment variables ARC_KERNELS and ARC_ATTENTION decide. Importing this package does not
import triton. ARC_KERNELS_CHECK=1 checks the values of boundaries, ids and labels on a GPU too, which synchronises;
ARC_KERNELS_CHECK=0 disables these checks.
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
