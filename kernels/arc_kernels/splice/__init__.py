"""Splice: token embeddings and given rows written into one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from arc_kernels._check import check_indices, check_same_device, check_shape, values_are_readable
from arc_kernels._dispatch import use_triton
from arc_kernels.splice.reference import splice_reference


def splice(
    table_VD: Tensor, ids_N: Tensor, text_rows_N: Tensor, given_ZD: Tensor | None, given_rows_Z: Tensor | None
) -> Tensor:
    """The decoder's input rows [R, D], R = N + Z: table[ids] at `text_rows`, `given` at `given_rows`.

    table [V, D]; ids, text_rows int64 [N]; given [Z, D], given_rows int64 [Z] (both None where nothing is spliced).
    The rows together are a permutation of 0 … R - 1. The result has the dtype of the table; gradients go to `given`
    and, where it wants one, to the table. ValueError on shapes, dtypes or devices that do not fit, ids outside the
    table, or rows that are no permutation. Ids and rows on a GPU are read only under ARC_KERNELS_CHECK=1; there the
    kernel makes the row of a wrong id NaN and writes nothing to a wrong row. It takes table rows at any distance from
    each other; a table whose values of a row are apart (a transposed one) is a ValueError there: every call would have
    to copy it.
    """
    check_shape("table_VD", table_VD, (None, None))
    check_shape("ids_N", ids_N, (None,))
    check_shape("text_rows_N", text_rows_N, (ids_N.numel(),))
    if (given_ZD is None) != (given_rows_Z is None):
        raise ValueError("given_ZD and given_rows_Z come together: one of them is None")
    if given_ZD is not None and given_rows_Z is not None:
        check_shape("given_ZD", given_ZD, (given_rows_Z.numel(), table_VD.shape[1]))
    check_same_device(
        table_VD=table_VD, ids_N=ids_N, text_rows_N=text_rows_N, given_ZD=given_ZD, given_rows_Z=given_rows_Z
    )
    check_indices("ids_N", ids_N, table_VD.shape[0])
    _check_rows(text_rows_N, given_rows_Z)
    if use_triton(table_VD):
        from arc_kernels.splice.autograd import splice_triton

        _check_table(table_VD)
        return splice_triton(table_VD, ids_N, text_rows_N, given_ZD, given_rows_Z)
    return splice_reference(table_VD, ids_N, text_rows_N, given_ZD, given_rows_Z)


def _check_table(table_VD: Tensor) -> None:
    if table_VD.shape[1] > 1 and table_VD.stride(1) != 1:
        raise ValueError(
            f"table_VD has strides {table_VD.stride()}; the Triton kernel wants each row's values side by side: "
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


__all__ = ["splice", "splice_reference"]
