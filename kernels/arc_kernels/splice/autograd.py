"""The splice kernels as torch operators with gradients.

Shape letters: R rows, N text rows, Z given rows, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arc_kernels._layout import contiguous
from arc_kernels.splice.kernels import gather_rows, splice_forward, sum_rows_by_id


class SpliceFunction(torch.autograd.Function):
    """`splice` with the Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        table_VD: Tensor,
        ids_N: Tensor,
        text_rows_N: Tensor,
        given_ZD: Tensor | None,
        given_rows_Z: Tensor | None,
    ) -> Tensor:
        wants_table, _, _, wants_given, _ = ctx.needs_input_grad
        # Only the gradient of a trained table needs ids. Backward never needs the values of table or given rows.
        ctx.save_for_backward(
            ids_N if wants_table else None, text_rows_N if wants_table else None, given_rows_Z if wants_given else None
        )
        ctx.vocab_size, ctx.table_dtype = table_VD.shape[0], table_VD.dtype
        ctx.given_dtype = None if given_ZD is None else given_ZD.dtype
        return _splice(table_VD, ids_N, text_rows_N, given_ZD, given_rows_Z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        ids_N, text_rows_N, given_rows_Z = ctx.saved_tensors
        dtable_VD = dgiven_ZD = None
        if ids_N is not None:
            dtable_VD = _splice_table_gradient(grads[0], ids_N, text_rows_N, ctx.vocab_size, ctx.table_dtype)
        if given_rows_Z is not None:
            dgiven_ZD = _splice_given_gradient(grads[0], given_rows_Z, ctx.given_dtype)
        return dtable_VD, None, None, dgiven_ZD, None


@torch.library.custom_op("arc_kernels::splice", mutates_args=())
def _splice(
    table_VD: Tensor, ids_N: Tensor, text_rows_N: Tensor, given_ZD: Tensor | None, given_rows_Z: Tensor | None
) -> Tensor:
    return splice_forward(
        table_VD,
        ids_N.contiguous(),
        text_rows_N.contiguous(),
        contiguous(given_ZD),
        contiguous(given_rows_Z),
    )


@_splice.register_fake
def _(
    table_VD: Tensor, ids_N: Tensor, text_rows_N: Tensor, given_ZD: Tensor | None, given_rows_Z: Tensor | None
) -> Tensor:
    num_given = 0 if given_ZD is None else given_ZD.shape[0]
    return table_VD.new_empty(ids_N.shape[0] + num_given, table_VD.shape[1])


@torch.library.custom_op("arc_kernels::splice_given_gradient", mutates_args=())
def _splice_given_gradient(grad_RD: Tensor, given_rows_Z: Tensor, dtype: torch.dtype) -> Tensor:
    return gather_rows(grad_RD.contiguous(), given_rows_Z.contiguous(), dtype)


@_splice_given_gradient.register_fake
def _(grad_RD: Tensor, given_rows_Z: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_RD.new_empty(given_rows_Z.shape[0], grad_RD.shape[1], dtype=dtype)


@torch.library.custom_op("arc_kernels::splice_table_gradient", mutates_args=())
def _splice_table_gradient(
    grad_RD: Tensor, ids_N: Tensor, text_rows_N: Tensor, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    return sum_rows_by_id(grad_RD.contiguous(), ids_N.contiguous(), text_rows_N, vocab_size, dtype)


@_splice_table_gradient.register_fake
def _(grad_RD: Tensor, ids_N: Tensor, text_rows_N: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    return grad_RD.new_empty(vocab_size, grad_RD.shape[1], dtype=dtype)
