"""The only place that names devices (cuda, cpu) and their backends (nccl, gloo) in code."""

from __future__ import annotations

import platform
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from arc_ds.errors import ConfigError
from arc_ds.system.processes import num_cores

GIB = 1 << 30
# Dense bf16 products in FLOP/s, from the makers' data sheets (NVIDIA's print twice as much, "with sparsity"). A row is
# for the devices whose name has all its words; the narrower row comes first.
_PEAK_BF16: tuple[tuple[frozenset[str], float], ...] = tuple(
    (frozenset(words.split()), tera * 1e12)
    for words, tera in (
        ("A100", 312.0),
        ("A30", 165.0),
        ("A40", 149.7),
        ("A10", 125.0),
        ("L4", 121.0),
        ("L40", 181.05),
        ("L40S", 362.05),
        ("H100 PCIe", 756.0),
        ("H100 NVL", 835.5),
        ("H100", 989.4),
        ("H200 NVL", 835.5),
        ("H200", 989.4),
        ("GH200", 989.4),
        ("B200", 2250.0),
        ("GB200", 2500.0),
        ("MI250X", 191.5),  # one of its two dies, which torch takes for a device each
        ("MI300X", 1307.4),
        ("MI325X", 1307.4),
    )
)
REQUESTS = ("auto", "cuda", "cpu")  # what a user may ask for; auto is a GPU where there are any


def select_device(request: str, local_rank: int = 0) -> torch.device:
    """The device of this rank; a GPU becomes torch's current one.

    request: "auto" (a GPU where there are any), "cuda" or "cpu". ConfigError where a GPU is asked for that this
    machine or this rank does not have.
    """
    if wanted_kind(request) == "cpu":
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ConfigError(
            f"this host has {num_devices} GPUs, but local rank {local_rank} was started: start at most "
            f"{num_devices} processes on it (--num-procs, or slots= in the hostfile)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def wanted_kind(request: str) -> str:
    """"cpu" or "cuda", what a request means on this machine; no GPU is touched. ConfigError as in `select_device`."""
    if request not in REQUESTS:
        raise ConfigError(f"device is {request!r}; expected one of {', '.join(REQUESTS)}")
    if request == "cpu" or (request == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no GPU. `arc-ds doctor` shows what it finds; device=cpu runs on the CPU."
        )
    return "cuda"


def usable_device(device: str | torch.device) -> torch.device:
    """A device by torch's name, such as "cpu", "cuda" or "cuda:1". ConfigError where this machine cannot use it."""
    try:
        wanted = torch.device(device)
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA asserts
        raise ConfigError(
            f"device is {str(device)!r}, which torch cannot use here: {str(error).splitlines()[0]}. `arc-ds doctor` "
            "shows what it finds; the device cpu is always there."
        ) from error
    return wanted


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that nobody uses yet; None on the CPU, where it is not asked for."""
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def local_gpus() -> tuple[torch.device, ...]:
    """The GPUs of this host that torch can use; none is no error."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(torch.device("cuda", idx) for idx in range(count))


def num_local_devices(request: str = "auto") -> int:
    """How many processes fill this host: its GPUs, or 1 on the CPU."""
    return 1 if request == "cpu" else max(len(local_gpus()), 1)


def backend_name(device: torch.device) -> str:
    """The collective backend of a device."""
    return "nccl" if device.type == "cuda" else "gloo"


def accelerator_name(device: torch.device) -> str:
    """DeepSpeed's name of the device's kind (its DS_ACCELERATOR variable)."""
    return device.type


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on the device (for timing; the step itself never calls it)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_host_copy(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a small tensor to the host; what comes back waits for that copy alone and returns it.

    Work that is queued on the device later is not waited for, as `x.cpu()` in its place would.
    """
    if x.device.type == "cpu":
        return lambda: x
    copy = x.to("cpu", non_blocking=True)  # page-locked, so that it is a copy beside the host's work
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated on the GPU, or this process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bf16_flops(device: torch.device) -> float | None:
    """FLOP/s of dense bf16 matrix products that the maker states; None where it is not known, as for any CPU."""
    return None if device.type == "cpu" else peak_bf16_flops_of(torch.cuda.get_device_properties(device).name)


def peak_bf16_flops_of(name: str) -> float | None:
    """The same by the device's name; a slice of a GPU (MIG) is not known."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:
        return None
    return next((peak for needed, peak in _PEAK_BF16 if needed <= words), None)


def describe_device(device: torch.device) -> str:
    """In words: the GPU's name, memory and compute capability, or the CPU's name and the cores this process may use."""
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
