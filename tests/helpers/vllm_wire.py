"""vLLM's side of its wire format: how it decodes prompt embeddings.

The checks are those of `safe_load_prompt_embeds` in vLLM's renderers: strict base64, `torch.load` of weights only, with
checks of sparse tensors, two dimensions, the model's hidden size, a floating dtype; then a cast to the model's dtype.
"""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor


def decode_prompt_embeds(data: str, hidden_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows [n, hidden_size] of a request. Raises ValueError on anything that vLLM refuses."""
    with torch.sparse.check_sparse_tensor_invariants():
        buffer = io.BytesIO(base64.b64decode(data.encode("ascii"), validate=True))
        tensor = torch.load(buffer, weights_only=True, map_location=torch.device("cpu"))
        if not isinstance(tensor, Tensor):
            raise ValueError(f"a {type(tensor).__name__} instead of a tensor")
        tensor = tensor.to_dense()
    if tensor.dim() > 2:
        tensor = tensor.squeeze(0)
    if tensor.dim() != 2 or tensor.shape[1] != hidden_size:
        raise ValueError(f"shape {tuple(tensor.shape)}; expected (rows, {hidden_size})")
    if not tensor.is_floating_point():
        raise ValueError(f"dtype {tensor.dtype}")
    return tensor.to(dtype)
