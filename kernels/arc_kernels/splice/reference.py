"""Splice in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def splice_reference(
    table_VD: Tensor, ids_N: Tensor, text_rows_N: Tensor, given_ZD: Tensor | None, given_rows_Z: Tensor | None
) -> Tensor:
    """See `splice`."""
    tokens_ND = F.embedding(ids_N, table_VD)
    rows, values = text_rows_N, tokens_ND
    if given_ZD is not None and given_rows_Z is not None:
        rows = torch.cat((text_rows_N, given_rows_Z))
        values = torch.cat((tokens_ND, given_ZD.to(table_VD.dtype)))
    return values.new_empty(values.shape).index_put((rows,), values)
