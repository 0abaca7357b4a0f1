"""Prompt embeddings as vLLM reads and writes them in JSON: base64 of `torch.save`, [rows, hidden size]."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Sequence

import torch
from torch import Tensor

from arc_ds.errors import DataError

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def encode_tensor(rows_RD: Tensor) -> str:
    """A tensor as vLLM reads it: base64 of `torch.save`, floating point, [rows, hidden size]."""
    buffer = io.BytesIO()
    torch.save(on_cpu(rows_RD), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_tensor(text: str, hidden_size: int) -> Tensor:
    """The tensor of `encode_tensor`, from a program that is not trusted: [rows, hidden size], floating point.

    No code runs (`weights_only`). Memory is bounded by the text: the archive must not be compressed, and the tensor
    must be dense and contiguous.

    Raises DataError on anything else.
    """
    expected = f"expected base64 of torch.save of a floating-point tensor [rows, {hidden_size}]"
    try:
        raw = base64.b64decode(text.encode("ascii"), validate=True)
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(raw) or any(entry.compress_type for entry in entries):
            raise DataError(f"the archive is compressed; {expected}")
        with torch.sparse.check_sparse_tensor_invariants():  # a forged one could write out of bounds
            rows = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # damaged archives and pickles raise errors of many classes
        raise DataError(f"a damaged tensor ({type(error).__name__}); {expected}") from error
    if not isinstance(rows, Tensor) or rows.layout != torch.strided or rows.is_quantized:
        raise DataError(f"a {type(rows).__name__} that is no dense tensor; {expected}")
    if rows.dim() != 2 or rows.shape[1] != hidden_size or not len(rows) or rows.dtype not in _DTYPES:
        raise DataError(f"a tensor {list(rows.shape)} of {rows.dtype}; {expected}")
    if not rows.is_contiguous() or not bool(torch.isfinite(rows).all()):
        raise DataError(f"a tensor that is not contiguous, or has values that are not finite; {expected}")
    return rows.detach()


def cache_salt(tensors: Sequence[Tensor]) -> str:
    """A salt for vLLM's prefix cache that differs if any row differs.

    vLLM leaves prompt embeddings out of the key of its prefix cache (vLLM issue 56655). Without a salt, two prompts of
    equal length and different vectors could share a prefix.
    """
    digest = hashlib.sha256()
    for tensor in map(on_cpu, tensors):
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU with a storage of its own: `torch.save` writes the whole storage of a slice."""
    return tensor.detach().to("cpu", copy=True).contiguous()
