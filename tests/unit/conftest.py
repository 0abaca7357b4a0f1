"""A tiny export with its decoder, shared by the tests that only use them."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds import ArcModel
from arc_ds.export.formats import write_export
from tests.helpers.tiny_export import tiny_trained, write_decoder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export and its decoder."""
    folder = tmp_path_factory.mktemp("tiny")
    write_export(tiny_trained(folder / "run"), folder / "export")
    write_decoder(folder / "decoder")
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> ArcModel:
    return ArcModel.from_checkpoint(folder / "export", decoders=[folder / "decoder"])
