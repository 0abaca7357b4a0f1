"""Request bodies for engines that run the decoder: vLLM's two APIs and SGLang's `/generate`.

`ArcModel.prompt_embeds` makes the rows. The bodies hold plain JSON values. Further keywords are added to the body as
they are: `max_tokens=64, temperature=0.0` for vLLM, and SGLang's own names for its `sampling_params`.

vLLM must run with `--enable-prompt-embeds`, SGLang with `--disable-radix-cache`.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Message = Mapping[str, Any]


def encode_tensor(rows_RD: Tensor) -> str:
    """A tensor as vLLM reads it: base64 of `torch.save`, floating point, [rows, hidden size]."""
    buffer = io.BytesIO()
    torch.save(_plain(rows_RD), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def cache_salt(tensors: Sequence[Tensor]) -> str:
    """A salt for vLLM's prefix cache that differs if any row differs.

    vLLM leaves prompt embeddings out of the key of its prefix cache (vLLM issue 56655). Without a salt, two prompts of
    equal length and different vectors could share a prefix.
    """
    digest = hashlib.sha256()
    for tensor in map(_plain, tensors):
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def vllm_completion(rows_RD: Tensor, model: str, **options: Any) -> dict[str, Any]:
    """A body for vLLM's `POST /v1/completions`. The rows are the whole prompt, with template and begin-of-text."""
    return {
        "model": model,
        "prompt_embeds": encode_tensor(rows_RD),
        "cache_salt": cache_salt([rows_RD]),
        **options,
    }


def vllm_chat(messages: Sequence[Message], model: str, **options: Any) -> dict[str, Any]:
    """A body for vLLM's `POST /v1/chat/completions`. vLLM writes its chat template around the messages.

    messages: with "role" and "content". A content is a text, or a list of texts and tensors of compressed vectors.
    """
    tensors = [part for message in messages for part in message["content"] if isinstance(part, Tensor)]
    written = [{**message, "content": _content(message["content"])} for message in messages]
    salt = {"cache_salt": cache_salt(tensors)} if tensors else {}
    return {"model": model, "messages": written, **salt, **options}


def sglang_generate(rows_RD: Tensor, **sampling_params: Any) -> dict[str, Any]:
    """A body for SGLang's `POST /generate`: the rows as nested lists of numbers."""
    return {"input_embeds": _plain(rows_RD).float().tolist(), "sampling_params": sampling_params}


def _content(parts: str | Sequence[str | Tensor]) -> str | list[dict[str, str]]:
    if isinstance(parts, str):
        return parts
    return [
        {"type": "prompt_embeds", "data": encode_tensor(part)}
        if isinstance(part, Tensor)
        else {"type": "text", "text": part}
        for part in parts
    ]


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU with a storage of its own: `torch.save` writes the whole storage of a slice."""
    return tensor.detach().to("cpu", copy=True).contiguous()
