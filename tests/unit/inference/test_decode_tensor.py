"""Prompt embeddings of an unknown program: the rows that went in, or one refusal without code, and little memory."""

from __future__ import annotations

import base64
import io
import os
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from arc_ds.errors import DataError
from arc_ds.inference.prompt_embeds import decode_tensor, encode_tensor

ROWS = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back(dtype: torch.dtype) -> None:
    assert torch.equal(decode_tensor(encode_tensor(ROWS.to(dtype)), 48), ROWS.to(dtype))


def saved(value: Any, **options: Any) -> str:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def deflated(text: str) -> str:
    """The same archive, compressed: a megabyte of zeros takes a kilobyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(text))) as old, zipfile.ZipFile(buffer, "w", 8) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return base64.b64encode(buffer.getvalue()).decode()


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("/tmp/arc_ds_must_not_exist",)


WRONG = {
    "no base64": "§",
    "no archive": base64.b64encode(b"x" * 100).decode(),
    "cut": encode_tensor(ROWS)[:-400],
    "old format": saved(ROWS, _use_new_zipfile_serialization=False),
    "compressed": deflated(encode_tensor(torch.zeros(5000, 48))),
    "width": saved(torch.ones(3, 47)),
    "vector": saved(torch.ones(48)),
    "no rows": saved(torch.ones(0, 48)),
    "whole numbers": saved(torch.ones(3, 48, dtype=torch.int64)),
    "list": saved([1.0]),
    "sparse": saved(torch.eye(48).to_sparse()),
    "one value as many": saved(torch.zeros(1, 1).expand(10**9, 48)),
    "nan": saved(torch.full((2, 48), torch.nan)),
    "code": saved(Evil()),
}


@pytest.mark.parametrize("fault", WRONG)
def test_anything_else_is_refused(fault: str) -> None:
    with pytest.raises(DataError, match=r"expected base64 of torch.save of a floating-point tensor \[rows, 48\]"):
        decode_tensor(WRONG[fault], 48)
    assert not os.path.exists("/tmp/arc_ds_must_not_exist")
