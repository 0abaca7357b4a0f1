"""`transformers.generate` from prompts, and from input rows with the padding that `prompt_embeds` needs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def continue_rows(
    model: Any, rows: Sequence[Tensor], max_new_tokens: int, stop_ids: Sequence[int] = ()
) -> list[list[int]]:
    """Greedy new tokens after each sequence of rows [n, D], as one batch that is padded on the left."""
    longest = max(map(len, rows))
    padded = [torch.nn.functional.pad(line, (0, 0, longest - len(line), 0)) for line in rows]
    mask = [torch.arange(longest) >= longest - len(line) for line in rows]
    out = model.generate(
        inputs_embeds=torch.stack(padded),
        attention_mask=torch.stack(mask).long(),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
    )
    return [_before_first(line, stop_ids) for line in out.tolist()]


@torch.no_grad()
def continue_prompts(
    model: Any, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: Sequence[int] = ()
) -> list[list[int]]:
    """Greedy new tokens after each prompt of ids, one prompt at a time. Only `stop_ids` end a line."""
    model.generation_config.eos_token_id = None
    lines = []
    for ids in prompts:
        given = torch.tensor([ids])
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
        )
        lines.append(_before_first(out[0, len(ids) :].tolist(), stop_ids))
    return lines


def _before_first(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[: min((ids.index(stop) for stop in stop_ids if stop in ids), default=len(ids))]
