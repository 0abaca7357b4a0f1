"""Splice: place token embeddings and given rows in one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from arc_kernels._check import check_indices, check_same_device, check_shape, values_are_readable
from arc_kernels._dispatch import use_triton
from arc_kernels.splice.reference import splice_reference


def splice(
    table_VD: Tensor, ids_N: Tensor, text_rows_N: Tensor, given_ZD: Tensor | None, given_rows_Z: Tensor | None
) -> Tensor:
    """The decoder's input rows [R, D] with R = N + Z: table[ids] at text_rows, given at given_rows.

    table_VD: embedding table [V, D]. The Triton kernel accepts any row stride.
    ids_N: token ids, int64 [N].
    text_rows_N: output row of each token, int64 [N].
    given_ZD: other rows [Z, D]; None to splice nothing.
    given_rows_Z: output row of each given row, int64 [Z]; None to splice nothing. text_rows and given_rows together are
        a permutation of 0 … R - 1.

    The result has the dtype of the table. Gradients flow to `given` and, if it requires one, to the table.

    Raises ValueError if shapes, dtypes or devices do not fit, ids are outside the table, or the rows are not a
    permutation. Ids and rows on a GPU are read only under ARC_KERNELS_CHECK=1. Otherwise the kernel writes NaN for an
    invalid id and does not write to an invalid row. The kernel also raises ValueError for a table whose rows are not
    contiguous (a transposed one), because every call would have to copy it.
    """
    check_shape("table_VD", table_VD, (None, None))
    check_shape("ids_N", ids_N, (None,))
    check_shape("text_rows_N", text_rows_N, (ids_N.numel(),))
    if (given_ZD is None) != (given_rows_Z is None):
        raise ValueError("given_ZD and given_rows_Z must be given together: one of them is None")
    if given_ZD is not None and given_rows_Z is not None:
        check_shape("given_ZD", given_ZD, (given_rows_Z.numel(), table_VD.shape[1]))
    check_same_device(
        table_VD=table_VD, ids_N=ids_N, text_rows_N=text_rows_N, given_ZD=given_ZD, given_rows_Z=given_rows_Z
    )
    check_indices("ids_N", ids_N, table_VD.shape[0])
    _check_rows(text_rows_N, given_rows_Z)
    if use_triton(table_VD):
        from arc_kernels.splice.autograd import SpliceFunction

        _check_table(table_VD)
        return SpliceFunction.apply(table_VD, ids_N, text_rows_N, given_ZD, given_rows_Z)
    return splice_reference(table_VD, ids_N, text_rows_N, given_ZD, given_rows_Z)


def _check_table(table_VD: Tensor) -> None:
    if table_VD.shape[1] > 1 and table_VD.stride(1) != 1:
        raise ValueError(
            f"table_VD has strides {table_VD.stride()}; the Triton kernel needs contiguous rows: "
            "make the table contiguous once, or call under arc_kernels.use('reference')"
        )


def _check_rows(text_rows_N: Tensor, given_rows_Z: Tensor | None) -> None:
    num_rows = text_rows_N.numel() + (0 if given_rows_Z is None else given_rows_Z.numel())
    check_indices("text_rows_N", text_rows_N, num_rows)
    if given_rows_Z is not None:
        check_indices("given_rows_Z", given_rows_Z, num_rows)
    if values_are_readable(text_rows_N):
        rows_R = text_rows_N if given_rows_Z is None else torch.cat((text_rows_N, given_rows_Z))
        twice = torch.bincount(rows_R, minlength=num_rows).gt(1).nonzero()
        if twice.numel() > 0:
            raise ValueError(
                f"text_rows_N and given_rows_Z name row {int(twice[0])} more than once; expected each of 0 … "
                f"{num_rows - 1} once"
            )
