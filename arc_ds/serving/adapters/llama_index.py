"""LlamaIndex: a response synthesizer that sends the retrieved chunks as documents, not as a part of the prompt.

engine = RetrieverQueryEngine(retriever, response_synthesizer=ArcSynthesizer("http://127.0.0.1:8000/v1"))
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.llms import MockLLM
from llama_index.core.response_synthesizers import BaseSynthesizer

from arc_ds.serving.adapters.client import ask


class ArcSynthesizer(BaseSynthesizer):
    """Answers by `arc-ds serve`. `options` are further fields of the requests, such as max_tokens."""

    def __init__(self, base_url: str, api_key: str | None = None, **options: Any) -> None:
        super().__init__(llm=MockLLM())  # the base class wants one; none is asked
        self._base_url, self._options = base_url, {"api_key": api_key, **options}

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> str:
        return ask(self._base_url, [{"role": "user", "content": query_str}], text_chunks, **self._options)

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> str:
        return await asyncio.to_thread(self.get_response, query_str, text_chunks)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        """There are none: the server writes the prompt."""
