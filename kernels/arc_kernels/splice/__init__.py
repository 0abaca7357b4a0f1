"""Splice: token embeddings and given rows written into one sequence."""

from __future__ import annotations

from torch import Tensor

from arc_kernels._check import check_same_device, check_shape
from arc_kernels.splice.reference import splice_reference


def splice(
    table_VD: Tensor, ids_N: Tensor, text_rows_N: Tensor, given_ZD: Tensor | None, given_rows_Z: Tensor | None
) -> Tensor:
    """The decoder's input rows [R, D], R = N + Z: table[ids] at `text_rows`, `given` at `given_rows`.

    table [V, D]; ids, text_rows int64 [N]; given [Z, D], given_rows int64 [Z] (both None where nothing is spliced).
    The rows together are a permutation of 0 … R - 1 (not checked: they are on the device). The result has the dtype of
    the table; gradients go to `given` and, where it wants one, to the table. ValueError on shapes that do not fit.
    """
    check_shape("text_rows_N", text_rows_N, (ids_N.numel(),))
    if (given_ZD is None) != (given_rows_Z is None):
        raise ValueError("given_ZD and given_rows_Z come together: one of them is None")
    if given_ZD is not None and given_rows_Z is not None:
        check_shape("given_ZD", given_ZD, (given_rows_Z.numel(), table_VD.shape[1]))
    check_same_device(table_VD=table_VD, ids_N=ids_N, text_rows_N=text_rows_N, given_ZD=given_ZD)
    return splice_reference(table_VD, ids_N, text_rows_N, given_ZD, given_rows_Z)


__all__ = ["splice", "splice_reference"]
