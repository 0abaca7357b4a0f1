"""Fixtures of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny_data import write_tiktoken


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
