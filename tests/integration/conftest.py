"""What the tests of whole runs share: the inputs, and runs that nobody has interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_run import write_inputs


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny run, with everything that it reads beside it."""
    return write_inputs(tmp_path_factory.mktemp("tiny"))
