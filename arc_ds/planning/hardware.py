"""Data of GPUs and links: the vendors' figures, and the shares of them that programs reach.

Peaks are dense bfloat16 products with float32 sums, half of the figures "with sparsity". NVLink and PCIe are per
direction, half of the bidirectional figures. Sources of GPUS, looked up on 2026-11-30:

- Peaks, memory bandwidths and links: NVIDIA's data sheets, as public tables repeat them. pytorch/torchtitan
  (`tools/utils.py`) has the same peaks of A100, H100 PCIe, H100, H200, B200 and L40S. allenai/open-instruct#1441 has
  peak and bandwidth of H200.
- Bandwidth of B200: its bus of 7680 bits (pytorch/ao#4002). NVIDIA rounds it to 8 TB/s.
- GeForce 4090 and 3090: white papers of Ada and Ampere GA102.
- Memory: the figures of `nvidia-smi` (modal-labs/modal-client#2797: H100, A100, A10, L40S and L4). CUDA's figure for
  B200 (pytorch/ao#4002). Those of H200 and GeForce cards are from memory.
"""

from __future__ import annotations

from typing import NamedTuple

from arc_ds.errors import ConfigError
from arc_ds.system.device import PEAK_BF16

GIB = 1 << 30


class Gpu(NamedTuple):
    """A GPU.

    peak_tflops: dense bfloat16.
    memory_gib: memory of the device.
    memory_gbs: bandwidth of its memory, 1e9 bytes per second.
    link_gbs: bandwidth to another GPU of the host and direction, 1e9 bytes per second.
    link: name of that link.
    host_gbs: bandwidth to the memory of the host and direction, 1e9 bytes per second.
    """

    peak_tflops: float
    memory_gib: float
    memory_gbs: float
    link_gbs: float
    link: str
    host_gbs: float


_PCIE_4, _PCIE_5 = 32.0, 64.0  # 16 lanes
GPUS = {
    "h100-80": Gpu(PEAK_BF16["H100"], 79.6, 3350, 450, "NVLink 4", _PCIE_5),
    "h100-pcie": Gpu(PEAK_BF16["H100 PCIe"], 79.6, 2000, _PCIE_5, "PCIe 5 x16", _PCIE_5),
    "h200": Gpu(PEAK_BF16["H200"], 140.4, 4800, 450, "NVLink 4", _PCIE_5),
    "b200": Gpu(PEAK_BF16["B200"], 178.3, 7680, 900, "NVLink 5", _PCIE_5),
    "a100-80": Gpu(PEAK_BF16["A100"], 80.0, 2039, 300, "NVLink 3", _PCIE_4),
    "a100-40": Gpu(PEAK_BF16["A100"], 40.0, 1555, 300, "NVLink 3", _PCIE_4),
    "l40s": Gpu(PEAK_BF16["L40S"], 45.0, 864, _PCIE_4, "PCIe 4 x16", _PCIE_4),
    "l4": Gpu(PEAK_BF16["L4"], 22.5, 300, _PCIE_4, "PCIe 4 x16", _PCIE_4),
    "a10": Gpu(PEAK_BF16["A10"], 22.5, 600, _PCIE_4, "PCIe 4 x16", _PCIE_4),
    "4090": Gpu(165.2, 24.0, 1008, _PCIE_4, "PCIe 4 x16", _PCIE_4),
    "3090": Gpu(71.2, 24.0, 936, _PCIE_4, "PCIe 4 x16", _PCIE_4),
}

LINKS = {"8x400g": 400.0, "8x200g": 200.0, "8x100g": 100.0, "400g": 50.0, "200g": 25.0, "100g": 12.5, "25g": 3.125}
"""Between hosts: bandwidth of all network cards of a host and direction, 1e9 bytes per second. Eight cards of 400 Gb/s
are the usual build of a host with eight H100 or H200."""

MATRIX_SHARE = 0.80
"""Products reach this share of the peak: 790 of 989 TFLOP/s, as other programs measured on an H200
(`tools/roofline.py`)."""
COPY_SHARE = 0.90
"""A copy reaches this share of the memory bandwidth: 4.3 of 4.8 TB/s, as other programs measured on an H200
(`tools/roofline.py`)."""
LINK_SHARE = 0.80
"""NCCL's large gathers reach this share of a link: about 360 of 450 GB/s on NVLink 4 (nccl-tests, "busbw")."""
HOP_S = 5e-6
"""One message through a network card and a switch. A ring sends one for each host in turn."""
LAUNCH_S = 20e-6
"""Python, autograd and the launch of one operation. It runs while the GPU computes, and decides if the
batch is small. Not measured."""
UNUSABLE_SHARE = 0.05
"""Of the memory: gaps between the allocator's blocks. Not measured."""
UNUSABLE_GIB = 1.5
"""CUDA's context (about 0.5 GiB), workspaces of cuBLAS, and buffers of NCCL for two groups. Not measured."""


class Machine(NamedTuple):
    """The hardware of a run.

    gpu: name of the GPU in GPUS.
    num_gpus: number of GPUs of all hosts.
    num_hosts: hosts of equal size.
    interconnect: name of the link between hosts in LINKS.
    """

    gpu: str
    num_gpus: int
    num_hosts: int = 1
    interconnect: str = "8x400g"

    @property
    def gpus_per_host(self) -> int:
        return self.num_gpus // self.num_hosts

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that tensors can use."""
        return (GPUS[self.gpu].memory_gib * (1 - UNUSABLE_SHARE) - UNUSABLE_GIB) * GIB

    def product_s(self, flops: float) -> float:
        """Seconds of matrix products on one GPU."""
        return flops / (GPUS[self.gpu].peak_tflops * 1e12 * MATRIX_SHARE)

    def copy_s(self, num_bytes: float) -> float:
        """Seconds to read and write these bytes on one GPU."""
        return num_bytes / (GPUS[self.gpu].memory_gbs * 1e9 * COPY_SHARE)

    def host_s(self, num_bytes: float) -> float:
        """Seconds to move these bytes between one GPU and the memory of its host."""
        return num_bytes / (GPUS[self.gpu].host_gbs * 1e9 * LINK_SHARE)

    def ring_s(self, full_bytes: float, calls: int, num_ranks: int) -> float:
        """Seconds of all-gathers or reduce-scatters over the first `num_ranks` GPUs; the slowest link decides.

        Every GPU receives all but its own part. A host receives all but its own GPUs' parts through its network cards.
        """
        if num_ranks == 1:
            return 0.0
        hosts = max(num_ranks // self.gpus_per_host, 1)
        within = full_bytes * (num_ranks - 1) / num_ranks / (GPUS[self.gpu].link_gbs * 1e9)
        between = full_bytes * (hosts - 1) / hosts / (LINKS[self.interconnect] * 1e9)
        return max(within if num_ranks > hosts else 0.0, between) / LINK_SHARE + calls * hosts * HOP_S


def check_machine(gpu: str, num_gpus: int, num_hosts: int | None, interconnect: str) -> Machine:
    """A machine from a command's options. Without `num_hosts`, a host has at most eight GPUs.

    Raises ConfigError if a number is below 1, or if hosts would have different numbers of GPUs.
    """
    for option, number in (("--gpus", num_gpus), ("--hosts", num_hosts)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} is {number}; expected at least 1.")
    hosts = num_hosts or hosts_of(num_gpus)
    if num_gpus % hosts:
        raise ConfigError(
            f"{num_gpus} GPUs on {hosts} hosts; expected the same number on every host. Set --gpus to a multiple of "
            "--hosts."
        )
    return Machine(gpu, num_gpus, hosts, interconnect)


def hosts_of(num_gpus: int, gpus_per_host: int = 8) -> int:
    """The number of hosts of a number of GPUs, if each has at most `gpus_per_host` and all have the same number."""
    return next(hosts for hosts in range(-(-num_gpus // gpus_per_host), num_gpus + 1) if num_gpus % hosts == 0)
