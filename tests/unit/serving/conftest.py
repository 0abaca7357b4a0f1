"""A tiny model and its server, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arc_ds import ArcModel
from arc_ds.export.formats import write_export
from tests.helpers.served import Served, served
from tests.helpers.tiny_export import tiny_trained, write_decoder


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export and its decoder."""
    folder = tmp_path_factory.mktemp("serving")
    write_export(tiny_trained(folder / "run"), folder / "export")
    write_decoder(folder / "decoder")
    return folder


@pytest.fixture(scope="package")
def model(folder: Path) -> ArcModel:
    return ArcModel.from_checkpoint(folder / "export", decoders=[folder / "decoder"])


@pytest.fixture(scope="package")
def server(model: ArcModel) -> Iterator[Served]:
    """A server with the usual settings, but small bodies and few documents."""
    with served(
        model, body_bytes=1 << 20, documents=8, document_tokens=400, request_tokens=800, max_tokens=300
    ) as found:
        yield found
