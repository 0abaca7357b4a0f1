"""The kernel tests run on the GPU where there is one, elsewhere on the CPU under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import arc_kernels


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    """All public functions take their Triton kernels (not the plain torch ones) within the test."""
    with arc_kernels.use("triton"):
        yield


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin hand out NaN (integers: the largest), so that an element never written shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def small_attention_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 packed query rows by 32 keys in every kernel."""
    from arc_kernels.attention import configs, kernels

    config = configs.Config(block_m=16, block_n=32, num_warps=4, num_stages=1)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: config)
