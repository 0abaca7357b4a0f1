"""Fixtures of the kernel tests. They run on a GPU if there is one, and otherwise under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import arc_kernels


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the kernels: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    """Make all public functions use their Triton kernels during the test."""
    with arc_kernels.use("triton"):
        yield


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill torch.empty and similar tensors with NaN (integers: the maximum), so that unwritten elements are visible."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def small_attention_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use tiles of 16 packed query rows by 32 keys in every kernel."""
    from arc_kernels.attention import configs, kernels

    config = configs.Config(block_m=16, block_n=32, num_warps=4, num_stages=1)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: config)
