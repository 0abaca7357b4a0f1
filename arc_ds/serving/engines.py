"""Request bodies for engines that run the decoder: vLLM's two APIs and SGLang's `/generate`.

`ArcModel.prompt_embeds` makes the rows. The bodies hold plain JSON values. Further keywords are added to the body as
they are: `max_tokens=64, temperature=0.0` for vLLM, and SGLang's own names for its `sampling_params`.

vLLM must run with `--enable-prompt-embeds`, SGLang with `--disable-radix-cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from arc_ds.inference.prompt_embeds import cache_salt, encode_tensor, on_cpu

__all__ = ["cache_salt", "encode_tensor", "sglang_generate", "vllm_chat", "vllm_completion"]

Message = Mapping[str, Any]


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
    return {"input_embeds": on_cpu(rows_RD).float().tolist(), "sampling_params": sampling_params}


def _content(parts: str | Sequence[str | Tensor]) -> str | list[dict[str, str]]:
    if isinstance(parts, str):
        return parts
    return [
        {"type": "prompt_embeds", "data": encode_tensor(part)}
        if isinstance(part, Tensor)
        else {"type": "text", "text": part}
        for part in parts
    ]
