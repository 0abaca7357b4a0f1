"""Fixtures shared by tests of whole runs: inputs and uninterrupted runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_run import write_inputs


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny run, next to all files that it reads."""
    return write_inputs(tmp_path_factory.mktemp("tiny"))
