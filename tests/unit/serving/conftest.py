"""A server of a tiny model, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from arc_ds import ArcModel
from tests.helpers.served import Served, served


@pytest.fixture(scope="package")
def server(model: ArcModel) -> Iterator[Served]:
    """A server with the usual settings, but small bodies and few documents."""
    with served(
        model, body_bytes=1 << 20, documents=8, document_tokens=400, request_tokens=800, max_tokens=300
    ) as found:
        yield found
