# mypy: allow-untyped-defs
"""Linear cross-entropy: for each chunk of rows, two library matrix products with one Triton kernel between them.

The first product computes the logits of a chunk. The kernel replaces them in place by the gradient of the loss, which
the second product multiplies by the weight. A kernel that fused the products would compute the logits twice: once for
the sums and once for the gradient. Logits are stored in the dtype of the rows, as in a plain bfloat16 model. Sums and
differences are float32.

Shape letters: L rows, C rows of a chunk, V vocabulary, D width; in the kernels BV and BD columns of one block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arc_kernels._compile import LAUNCH_OPTIONS, CompileSpec, arguments_of
from arc_kernels._dispatch import warp_size
from arc_kernels._interpreter import narrow

# 1024 rows of 128256 bfloat16 logits. The tiles of both products then fill a GPU. Together with the rows' gradients
# this is a tenth of the memory of whole logits, their softmax and its gradient at 4096 rows.
CHUNK_BYTES = 1 << 28
ROW_TILE = 128  # tile of the library's matrix products; chunks are multiples of it
VOCAB_ALIGNMENT = 64  # elements; fast products need rows of logits aligned to 16 bytes


def choose_softmax(vocab_size: int, *, warp_size: int = 32) -> tuple[int, int]:
    """(columns that a program reads at once, its warps): 16 columns per thread, at most 1024 threads.

    A row is read twice. Only one program of 1024 threads with about 50 registers fits a processor, so most of its row
    is still in the L2 cache for the second read: 132 rows of 128256 in bfloat16 take 34 MB; an H100 has 50 MB of L2.
    """
    block = min(16384, max(16 * warp_size, triton.next_power_of_2(vocab_size)))
    return block, block // (16 * warp_size)


def choose_scale(width: int, *, warp_size: int = 32) -> tuple[int, int]:
    """(columns, warps) of a program. 16 columns per thread: two loads of 16 bytes in bfloat16."""
    block = min(4096, max(16 * warp_size, triton.next_power_of_2(width)))
    return block, block // (16 * warp_size)


@triton.jit
def _softmax_minus_label(
    p_logits, p_labels, p_nll, row_stride, vocab_size, WRITES_GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr
):
    """NLL of one row. WRITES_GRADIENT: overwrite its logits with softmax - onehot(label).

    For a label outside the vocabulary, nothing is read and loss and gradient are NaN.
    """
    i_l = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_l * row_stride
    label = tl.load(p_labels + i_l)
    known = (label >= 0) & (label < vocab_size)
    # Read the label's logit before any thread of the program can overwrite it.
    b_label = tl.load(p_row + label, mask=known, other=float("nan")).to(tl.float32)
    largest = float("-inf")
    b_sum = tl.zeros([BLOCK_V], tl.float32)  # one sum per column, reduced once at the end
    for start in range(0, vocab_size, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        b_a = tl.load(p_row + o_v, mask=o_v < vocab_size, other=float("-inf")).to(tl.float32)  # [BV]
        new_largest = tl.maximum(largest, tl.max(b_a, axis=0))
        b_sum = b_sum * tl.exp(largest - new_largest) + tl.exp(b_a - new_largest)
        largest = new_largest
    logsumexp = largest + tl.log(tl.sum(b_sum, axis=0))
    tl.store(p_nll + i_l, logsumexp - b_label)
    if WRITES_GRADIENT:
        for start in range(0, vocab_size, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            b_a = tl.load(p_row + o_v, mask=o_v < vocab_size, other=0.0).to(tl.float32)
            b_g = tl.exp(b_a - logsumexp)
            b_g = tl.where(known, tl.where(o_v == label, b_g - 1.0, b_g), float("nan"))
            tl.store(p_row + o_v, narrow(b_g, p_logits.dtype.element_ty), mask=o_v < vocab_size)


@triton.jit
def _scale_rows(p_x, p_scale, p_out, width, BLOCK_D: tl.constexpr):
    i_l = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_x = tl.load(p_x + i_l * width + o_d, mask=o_d < width, other=0.0).to(tl.float32)  # [BD]
    b_x *= tl.load(p_scale + i_l).to(tl.float32)
    tl.store(p_out + i_l * width + o_d, narrow(b_x, p_out.dtype.element_ty), mask=o_d < width)


def losses_and_gradient(
    h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, *, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """(NLL, gradient): float32 [L], and [L, D] in the dtype of h, or empty if not requested.

    h and labels are contiguous. Temporary memory is one buffer of at most CHUNK_BYTES (at least one row of logits).
    """
    (num_rows, width), vocab_size = h_LD.shape, weight_VD.shape[0]
    nll_L = h_LD.new_empty(num_rows, dtype=torch.float32)
    grad_LD = h_LD.new_empty((num_rows if wants_grad else 0, width))
    if num_rows == 0:
        return nll_L, grad_LD
    stride = triton.cdiv(vocab_size, VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT
    chunk = chunk_rows(num_rows, row_bytes=stride * h_LD.element_size())
    buffer_CV = h_LD.new_empty(min(chunk, num_rows), stride)[:, :vocab_size]
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        logits_CV = buffer_CV[: min(chunk, num_rows - start)]
        torch.mm(h_LD[rows], weight_VD.T, out=logits_CV)
        softmax_minus_label(logits_CV, labels_L[rows], nll_L[rows], writes_gradient=wants_grad)
        if wants_grad:
            torch.mm(logits_CV, weight_VD, out=grad_LD[rows])
    return nll_L, grad_LD


def chunk_rows(num_rows: int, *, row_bytes: int) -> int:
    """Rows per chunk: as even as whole tiles allow, within CHUNK_BYTES but at least one."""
    most = max(1, CHUNK_BYTES // row_bytes)
    if most >= ROW_TILE:
        most -= most % ROW_TILE
    even = triton.cdiv(num_rows, triton.cdiv(num_rows, most))
    return min(most, triton.cdiv(even, ROW_TILE) * ROW_TILE)


def softmax_minus_label(logits_CV: Tensor, labels_C: Tensor, nll_C: Tensor, *, writes_gradient: bool) -> None:
    """Write the NLL of each row to `nll` and the gradient to the logits, in place. Rows may have any stride."""
    block, num_warps = choose_softmax(logits_CV.shape[1], warp_size=warp_size())
    with torch.cuda.device_of(logits_CV):
        _softmax_minus_label[(logits_CV.shape[0],)](
            logits_CV,
            labels_C,
            nll_C,
            logits_CV.stride(0),
            logits_CV.shape[1],
            WRITES_GRADIENT=writes_gradient,
            BLOCK_V=block,
            num_warps=num_warps,
            **LAUNCH_OPTIONS,
        )


def scale_rows(x_LD: Tensor, scale_L: Tensor) -> Tensor:
    """x * scale[:, None] in the dtype of x, rounded once. Both are contiguous."""
    num_rows, width = x_LD.shape
    block, num_warps = choose_scale(width, warp_size=warp_size())
    out_LD = torch.empty_like(x_LD)
    if out_LD.numel() > 0:
        with torch.cuda.device_of(x_LD):
            _scale_rows[(num_rows, triton.cdiv(width, block))](
                x_LD, scale_L, out_LD, width, BLOCK_D=block, num_warps=num_warps, **LAUNCH_OPTIONS
            )
    return out_LD


def compile_specs() -> list[CompileSpec]:
    """The kernels as launched by the paper's models, for the offline compiler. The library does the products."""
    vocabularies = [("bf16", 128256), ("bf16", 32000), ("bf16", 49152), ("fp16", 128256), ("fp32", 128256)]
    widths = [("bf16", 4096), ("bf16", 3072), ("bf16", 576), ("fp32", 4096)]
    return [
        *(_softmax_spec(dtype, vocab, writes) for dtype, vocab in vocabularies for writes in (True, False)),
        *(_scale_spec(dtype, width) for dtype, width in widths),
    ]


def _softmax_spec(dtype: str, vocab_size: int, writes_gradient: bool) -> CompileSpec:
    block, num_warps = choose_softmax(vocab_size)
    _, hip_num_warps = choose_softmax(vocab_size, warp_size=64)
    constexprs = {"WRITES_GRADIENT": writes_gradient, "BLOCK_V": block}
    types = {"p_labels": "*i64", "p_nll": "*fp32"}
    return CompileSpec(
        name=f"softmax_minus_label {dtype} V={vocab_size} {'gradient' if writes_gradient else 'loss only'}",
        fn=_softmax_minus_label,
        **arguments_of(_softmax_minus_label, dtype, constexprs, types=types),
        num_warps=num_warps,
        hip_num_warps=hip_num_warps,
    )


def _scale_spec(dtype: str, width: int) -> CompileSpec:
    block, num_warps = choose_scale(width)
    _, hip_num_warps = choose_scale(width, warp_size=64)
    constexprs = {"BLOCK_D": block}
    return CompileSpec(
        name=f"scale_rows {dtype} D={width}",
        fn=_scale_rows,
        **arguments_of(_scale_rows, dtype, constexprs, types={"p_scale": "*fp32"}),
        num_warps=num_warps,
        hip_num_warps=hip_num_warps,
    )
