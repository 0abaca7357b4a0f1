"""A single process forms a group of one. An error on one rank is raised on all ranks."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch

from arc_ds.errors import ArcError, ConfigError, DataError
from arc_ds.system import device, dist


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_rank(alone):
    assert (dist.rank(), dist.world_size(), dist.local_rank(), dist.local_world_size()) == (0, 1, 0, 1)
    assert dist.is_main()
    assert not dist.under_launcher()
    assert dist.gather_objects("x") == ["x"]
    assert dist.broadcast_object("x") == "x"


def test_error_of_the_only_rank_is_raised_as_it_is(alone):
    error = DataError("torn")
    with pytest.raises(DataError) as caught, dist.fail_together():
        raise error
    assert caught.value is error
    dist.raise_together(None)


def test_place_is_read_from_the_launchers_environment(monkeypatch, alone):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (dist.rank(), dist.world_size(), dist.local_rank(), dist.local_world_size()) == (5, 8, 1, 4)
    assert not dist.is_main()


@pytest.mark.parametrize(("number", "level", "passes"), [(0, 20, True), (1, 20, False), (1, 30, True)])
def test_only_rank_0_informs_and_every_rank_warns(monkeypatch, alone, number, level, passes):
    monkeypatch.setenv("RANK", str(number))
    record = logging.LogRecord("arc", level, "f", 1, "text", None, None)
    assert dist.passes_rank(record) is passes


def test_cpu_can_be_asked_for():
    assert device.select_device("cpu") == device.usable_device("cpu") == torch.device("cpu")
    assert device.backend_name(torch.device("cpu")) == "gloo"


def test_gpu_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.select_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no GPU"):
        device.select_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:97", torch.device("cuda", 97)])
def test_device_that_torch_cannot_use_is_an_error_in_words(name):
    """torch raises different exceptions for a build without CUDA, a machine without a GPU, and a missing GPU index."""
    with pytest.raises(ConfigError, match=f"device is '{name}', which torch cannot use here: .*arc-ds doctor"):
        device.usable_device(name)


def test_more_ranks_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="local rank 2"):
        device.select_device("auto", local_rank=2)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("AMD Instinct MI300X", 1307.4),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_is_that_of_the_very_device_or_not_known(name, tera):
    assert device.peak_bf16_flops_of(name) == (None if tera is None else pytest.approx(tera * 1e12))
    assert device.peak_bf16_flops(torch.device("cpu")) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is compared with a figure from Linux")
def test_peak_memory_is_counted_in_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert device.peak_memory_bytes(torch.device("cpu")) == pytest.approx(peak_kib * 1024, rel=0.01)


@pytest.mark.parametrize("cls", [ArcError, *ArcError.__subclasses__()])
def test_our_errors_survive_pickling_between_ranks(cls):
    assert str(pickle.loads(pickle.dumps(cls("text")))) == "text"
