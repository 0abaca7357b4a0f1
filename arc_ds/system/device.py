"""The only place that names devices (cuda, cpu) and their backends (nccl, gloo) in code."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from arc_ds.errors import ConfigError, words_of
from arc_ds.system.processes import num_cores

GIB = 1 << 30
# Dense bf16 matrix products in teraFLOP/s, from vendor data sheets (NVIDIA's list twice as much, "with sparsity"). A
# row matches a device if the device name contains all words of the row. More specific rows come first.
PEAK_BF16 = {
    "A100": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "A10": 125.0,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "GB200": 2500.0,
    "MI250X": 191.5,  # one of its two dies; torch treats each die as a device
    "MI300X": 1307.4,
    "MI325X": 1307.4,
}
REQUESTS = ("auto", "cuda", "cpu")  # allowed values of `device`; auto uses a GPU if there is one


def select_device(request: str, local_rank: int = 0) -> torch.device:
    """Select the device of this rank. A GPU also becomes torch's current device.

    Raises ConfigError if this machine has no GPU for the request or for this rank.

    request: "auto" (a GPU if there is one), "cuda" or "cpu".
    local_rank: rank on this host; index of its GPU.
    """
    if wanted_kind(request) == "cpu":
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ConfigError(
            f"this host has {num_devices} GPUs, but local rank {local_rank} was started: start at most "
            f"{num_devices} processes on this host (--num-procs, or slots= in the hostfile)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def wanted_kind(request: str) -> str:
    """Resolve a request to "cpu" or "cuda" without using a GPU. Raises ConfigError like `select_device`."""
    if request == "cpu" or (request == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no GPU. `arc-ds doctor` lists the devices it finds; device=cpu uses a CPU."
        )
    return "cuda"


def usable_device(device: str | torch.device) -> torch.device:
    """Device for a torch name such as "cpu", "cuda" or "cuda:1". Raises ConfigError if this machine cannot use it."""
    try:
        wanted = torch.device(device)
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA asserts
        raise ConfigError(
            f"device is {str(device)!r}, which torch cannot use here: {words_of(error)}. `arc-ds doctor` "
            "lists the devices it finds; device cpu is always available."
        ) from error
    return wanted


def free_memory_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU in bytes; None on the CPU."""
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def usable_memory_bytes(device: torch.device) -> int:
    """Memory that new tensors may take: free memory of a GPU, half of this host's memory or of this process's limit."""
    free = free_memory_bytes(device)
    if free is not None:
        return free
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # `ulimit -v`
    return (host if limit == resource.RLIM_INFINITY else min(host, limit)) // 2


def local_gpus() -> tuple[torch.device, ...]:
    """The GPUs of this host that torch can use; empty if there are none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.device("cuda", idx) for idx in range(count))


def num_local_devices(request: str = "auto") -> int:
    """Number of processes that use all devices of this host: one per GPU, or 1 on the CPU."""
    return 1 if request == "cpu" else max(len(local_gpus()), 1)


def backend_name(device: torch.device) -> str:
    """The torch.distributed backend of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device. Used for timing; the step itself never calls it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_host_copy(x: Tensor) -> Callable[[], Tensor]:
    """Start copying a small tensor to the host. The returned function waits for the copy and returns it.

    Unlike `x.cpu()` at that later point, it does not wait for work queued on the device after the copy.
    """
    copies: dict[str, Tensor] = {}
    wait = start_host_copies({"x": x}, copies)

    def copy() -> Tensor:
        wait()
        return copies["x"]

    return copy


def start_host_copies(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> Callable[[], object]:
    """Start copying tensors into host memory. The returned function waits for the copies.

    Later work on the device does not change the copies, and the host does not wait for earlier work.

    tensors: on the device or on the host.
    buffers: the copies by name. A tensor without a buffer of its shape gets a new one, page-locked for a device.
    """
    devices = {x.device for x in tensors.values() if x.device.type != "cpu"}
    for name, x in tensors.items():
        if name not in buffers or buffers[name].shape != x.shape:
            buffers[name] = torch.empty_like(x, device="cpu", pin_memory=x.device in devices)
        buffers[name].copy_(x, non_blocking=True)
    if not devices:
        return lambda: None
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(devices.pop()))
    return copied.synchronize


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: allocated memory on a GPU, resident set size of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bf16_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of dense bf16 matrix products according to the vendor; None if unknown, as for any CPU."""
    return None if device.type == "cpu" else peak_bf16_flops_of(torch.cuda.get_device_properties(device).name)


def peak_bf16_flops_of(name: str) -> float | None:
    """Like `peak_bf16_flops`, for a device name. None for a slice of a GPU (MIG)."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((tera * 1e12 for row, tera in PEAK_BF16.items() if words.issuperset(row.split())), None)


def describe_device(device: torch.device) -> str:
    """Name, memory and compute capability of a GPU, or name of the CPU and number of cores this process may use."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, compute capability {capability}"
    return f"{_cpu_name()}, {num_cores()} cores"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
