"""The adapters of RAG frameworks send documents to a real server and get the answer of `ArcModel.generate`.

The frameworks need not be in this environment: ARC_RAG_PYTHON names a Python that has them. It needs no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from arc_ds import ArcModel
from arc_ds.errors import StorageError
from arc_ds.serving.adapters.client import ask
from tests.helpers.served import Served, served
from tests.helpers.waiting import LIMIT_S
from tests.unit.serving.test_server import DOCUMENT, QUESTION, expected

PYTHON = os.environ.get("ARC_RAG_PYTHON", sys.executable)
PROGRAMS = {
    "langchain_core": """
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage
from arc_ds.serving.adapters.langchain import ArcChat, format_documents

model = ArcChat(base_url=URL)
documents = format_documents([Document(page_content=DOCUMENT)])
first = model.invoke([HumanMessage(QUESTION)], documents=documents, max_tokens=24).content
bound = model.bind(documents=documents, max_tokens=24)
assert bound.invoke(QUESTION).content == first
assert (bound | (lambda message: message.content)).batch([QUESTION] * 2) == [first] * 2
assert model.invoke([SystemMessage("Be brief."), HumanMessage(QUESTION)], max_tokens=24).content != first
print(first)
""",
    "llama_index": """
from llama_index.core import QueryBundle
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from arc_ds.serving.adapters.llama_index import ArcSynthesizer

class Retriever(BaseRetriever):
    def _retrieve(self, query: QueryBundle):
        return [NodeWithScore(node=TextNode(text=DOCUMENT), score=1.0)]

engine = RetrieverQueryEngine(Retriever(), response_synthesizer=ArcSynthesizer(URL, max_tokens=24))
print(engine.query(QUESTION).response)
""",
    "haystack": """
from haystack import Document, Pipeline
from arc_ds.serving.adapters.haystack import ArcGenerator

pipeline = Pipeline()
pipeline.add_component("generator", ArcGenerator(URL, max_tokens=24))
pipeline = Pipeline.from_dict(pipeline.to_dict(), allowed_modules=[ArcGenerator.__module__])
inputs = {"query": QUESTION, "documents": [Document(content=DOCUMENT)]}
print(pipeline.run({"generator": inputs})["generator"]["replies"][0])
""",
}


@pytest.mark.parametrize("framework", PROGRAMS)
def test_a_framework_gets_the_answer_of_generate(server: Served, model: ArcModel, framework: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "HAYSTACK_TELEMETRY_ENABLED": "0"}
    if subprocess.run([PYTHON, "-c", f"import {framework}"], env=environment, capture_output=True).returncode:
        pytest.skip(f"{PYTHON} has no {framework}; ARC_RAG_PYTHON may name another Python")
    values = f"URL, DOCUMENT, QUESTION = {server.url + '/v1'!r}, {DOCUMENT!r}, {QUESTION!r}\n"
    no_torch = "import sys\nassert 'torch' not in sys.modules\n"
    command = [PYTHON, "-c", values + PROGRAMS[framework] + no_torch]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_S)
    assert found.returncode == 0, found.stderr
    assert found.stdout.removesuffix("\n") == expected(model)


def test_the_client_passes_on_the_words_of_the_server(model: ArcModel) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    with served(model, api_key="key") as found:
        assert ask(f"{found.url}/v1/", messages, [DOCUMENT], api_key="key", max_tokens=24) == expected(model)
        with pytest.raises(StorageError, match="answered 401: the API key is missing or wrong"):
            ask(f"{found.url}/v1", messages)
        with pytest.raises(StorageError, match="`max_tokens`"):
            ask(f"{found.url}/v1", messages, api_key="key", max_tokens=0)
    with pytest.raises(StorageError, match="Check that `arc-ds serve` runs there"):
        ask(f"{found.url}/v1", messages)
