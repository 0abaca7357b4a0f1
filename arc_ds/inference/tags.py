"""Prompts written as one text, with their contexts between tags."""

from __future__ import annotations

import re

from arc_ds.batch.segments import Marker
from arc_ds.errors import DataError
from arc_ds.inference.arc import Context

_TAG = re.compile(r"(</?context>)")


def parse_prompt(text: str, marker: Marker | None = "cont") -> list[str | Context]:
    """Split a prompt into parts. `<context>…</context>` becomes a `Context`; other non-empty text stays text.

    Raises DataError for an unmatched tag or an empty context.
    """
    pieces = _TAG.split(text)  # text, tag, context, tag, text, …
    parts, tags = pieces[::2], pieces[1::2]
    for idx, tag in enumerate(tags):
        if tag != ("</context>" if idx % 2 else "<context>") or (idx + 1 == len(tags) and idx % 2 == 0):
            raise DataError(f"the prompt has an unmatched {tag}: write <context>TEXT</context>")
    if not all(parts[1::2]):
        raise DataError("the prompt has an empty <context></context>: remove it or add text")
    return [Context(part, marker) if idx % 2 else part for idx, part in enumerate(parts) if part]
