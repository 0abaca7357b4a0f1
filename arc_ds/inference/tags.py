"""Prompts written as one text, with their contexts between tags."""

from __future__ import annotations

import re

from arc_ds.batch.segments import Marker
from arc_ds.errors import DataError
from arc_ds.inference.arc import Context

CONTEXT_TAG = re.compile(r"<context>(.*?)</context>", re.DOTALL)
_LONE_TAG = re.compile(r"</?context>")


def parse_prompt(text: str, marker: Marker | None = "cont") -> list[str | Context]:
    """Split a prompt into parts. `<context>…</context>` becomes a `Context`; other non-empty text stays text.

    Raises DataError for an unmatched tag or an empty context.
    """
    parts = CONTEXT_TAG.split(text)  # text, context, text, context, …, text
    for idx, part in enumerate(parts):
        if tag := _LONE_TAG.search(part):
            raise DataError(f"the prompt has an unmatched {tag.group()}: write <context>TEXT</context>")
        if idx % 2 and not part:
            raise DataError("the prompt has an empty <context></context>: remove it or add text")
    return [Context(part, marker) if idx % 2 else part for idx, part in enumerate(parts) if part]
