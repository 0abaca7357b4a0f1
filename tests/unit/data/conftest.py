"""Fixtures of the data tests."""

from __future__ import annotations

import pytest

from arc_ds.tokenizers import load_tokenizer
from tests.helpers.tiny_data import write_json_tokenizer, write_tiktoken
from tests.helpers.tiny_mixture import TinyMixture
from tests.unit.data.examples import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Tokenizers of the encoder and the decoder, of different kinds. For the encoder, a letter is a token."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return load_tokenizer(write_tiktoken(folder / "t.model")), load_tokenizer(write_json_tokenizer(folder / "json"))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    """A mixture whose files no test changes."""
    return TinyMixture.write(tmp_path_factory.mktemp("mixture"))
