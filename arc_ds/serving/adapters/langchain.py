"""LangChain: a chat model whose documents are read in compressed form.

model = ArcChat(base_url="http://127.0.0.1:8000/v1")
model.invoke("Which lamp held?", documents=format_documents(retriever.invoke("lamp")))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from langchain_core.documents import Document
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.utils import convert_to_openai_messages
from langchain_core.outputs import ChatGeneration, ChatResult

from arc_ds.serving.adapters.client import ask


def format_documents(documents: Iterable[Document]) -> list[str]:
    """The texts of retrieved documents, as `ArcChat` takes them."""
    return [document.page_content for document in documents]


class ArcChat(BaseChatModel):
    """A chat model at `arc-ds serve`. `documents` is a keyword of a call or of `bind`; further keywords are options."""

    base_url: str = "http://127.0.0.1:8000/v1"
    api_key: str | None = None
    timeout_s: float = 300.0

    @property
    def _llm_type(self) -> str:
        return "arc-ds"

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **options: Any
    ) -> ChatResult:
        said = convert_to_openai_messages(messages)
        answer = ask(self.base_url, said, api_key=self.api_key, timeout_s=self.timeout_s, stop=stop, **options)
        return ChatResult(generations=[ChatGeneration(message=AIMessage(content=answer))])
