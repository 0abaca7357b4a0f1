"""Cheap digests of weights must distinguish models and must not depend on file paths."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from arc_ds.checkpoints.weight_digests import backbone_digest, files_digest
from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import RopeScaling
from tests.helpers.tiny_models import tiny_config

SIZE = 3 << 20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def test_a_copy_elsewhere_has_the_same_digest(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "folder" / "other_name.safetensors"
    copy.parent.mkdir()
    shutil.copy(weights, copy)
    assert files_digest([copy]) == files_digest([weights])


@pytest.mark.parametrize("place", [0, (1 << 20) - 1, 1 << 20, SIZE - 1], ids=["first", "head", "block", "last"])
def test_a_byte_that_is_looked_at_changes_the_digest(weights: Path, place: int) -> None:
    before = files_digest([weights])
    content = bytearray(weights.read_bytes())
    content[place] ^= 1
    weights.write_bytes(content)
    assert files_digest([weights]) != before


def test_another_length_changes_the_digest(weights: Path) -> None:
    before = files_digest([weights])
    weights.write_bytes(weights.read_bytes()[:-256])
    assert files_digest([weights]) != before
    assert files_digest([weights, weights]) != files_digest([weights])


def test_little_of_a_large_file_is_read(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.truncate(1 << 36)  # sparse; reading the whole file would take a minute
    assert files_digest([weights])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.gguf cannot be read"):
        files_digest([tmp_path / "gone.gguf"])


# Recorded with the version whose sizes had no fields of other families. Without them, no run of it could be resumed.
BEFORE = "331524b90a0ec25a4cca6f9d850b610b037c57f8835fc0235fbda58c34fef048"
BEFORE_SCALED = "cc08b89fe5b9b3f2b9c912bfc839a17d849ea957d984af619ae792688086fe9f"


def test_sizes_of_earlier_versions_keep_their_digests() -> None:
    scaling = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    assert backbone_digest(tiny_config(), []) == BEFORE
    assert backbone_digest(tiny_config(rope_scaling=scaling), []) == BEFORE_SCALED
    assert backbone_digest(tiny_config(qkv_bias=True), []) != BEFORE
