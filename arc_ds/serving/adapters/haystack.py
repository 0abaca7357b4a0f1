"""Haystack: a generator that sends the retrieved documents as documents, not as a part of the prompt.

pipeline.add_component("generator", ArcGenerator("http://127.0.0.1:8000/v1"))
pipeline.connect("retriever.documents", "generator.documents")
"""

from __future__ import annotations

from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from arc_ds.serving.adapters.client import ask


@component
class ArcGenerator:
    """Answers by `arc-ds serve`. `options` are further fields of the requests, such as max_tokens."""

    def __init__(self, base_url: str, api_key: str | None = None, **options: Any) -> None:
        self.base_url, self.api_key, self.options = base_url, api_key, options

    @component.output_types(replies=list[str])
    def run(self, query: str, documents: list[Document] | None = None) -> dict[str, list[str]]:
        texts = [document.content for document in documents or [] if document.content]
        messages = [{"role": "user", "content": query}]
        return {"replies": [ask(self.base_url, messages, texts, api_key=self.api_key, **self.options)]}

    def to_dict(self) -> dict[str, Any]:
        """The component in a pipeline's file, without the key. ARC_API_KEY gives it to the loaded pipeline."""
        return default_to_dict(self, base_url=self.base_url, **self.options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ArcGenerator:
        return default_from_dict(cls, data)
