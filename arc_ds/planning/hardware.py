"""GPUs and links as data: what their vendors state, and the shares of it that programs reach.

Sources of GPUS: NVIDIA's data sheets of H100, H200, B200, A100, L40S, L4 and A10, and the white papers of Ada and
Ampere. Peaks are dense bfloat16 products with float32 sums (half of the figures "with sparsity"). Memory is what
`nvidia-smi` shows. NVLink and PCIe are per direction, half of the bidirectional figures.
"""

from __future__ import annotations

from typing import NamedTuple

from arc_ds.errors import ConfigError

GIB = 1 << 30


class Gpu(NamedTuple):
    """A GPU.

    peak_tflops: dense bfloat16.
    memory_gib: memory of the device.
    memory_gbs: bandwidth of its memory, 1e9 bytes per second.
    link_gbs: bandwidth to another GPU of the host and direction, 1e9 bytes per second.
    link: name of that link.
    """

    peak_tflops: float
    memory_gib: float
    memory_gbs: float
    link_gbs: float
    link: str


GPUS = {
    "h100-80": Gpu(989, 79.6, 3350, 450, "NVLink 4"),
    "h200": Gpu(989, 140.4, 4800, 450, "NVLink 4"),
    "b200": Gpu(2250, 179.1, 8000, 900, "NVLink 5"),
    "a100-80": Gpu(312, 80.0, 2039, 300, "NVLink 3"),
    "a100-40": Gpu(312, 40.0, 1555, 300, "NVLink 3"),
    "l40s": Gpu(362, 45.0, 864, 32, "PCIe 4 x16"),
    "l4": Gpu(121, 22.5, 300, 32, "PCIe 4 x16"),
    "a10": Gpu(125, 22.5, 600, 32, "PCIe 4 x16"),
    "4090": Gpu(165, 24.0, 1008, 32, "PCIe 4 x16"),
    "3090": Gpu(71, 24.0, 936, 32, "PCIe 4 x16"),
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
"""Python, autograd and the launch of one operation. The GPU's work hides it unless the batch is small. Not measured."""
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

    Raises ConfigError if a name is unknown, or if hosts would have different numbers of GPUs.
    """
    for option, name, known in (("--gpu", gpu, GPUS), ("--interconnect", interconnect, LINKS)):
        if name not in known:
            raise ConfigError(f"{option} is {name!r}; expected one of {', '.join(known)}.")  # type: ignore[arg-type]
    if num_gpus < 1 or (num_hosts is not None and num_hosts < 1):
        raise ConfigError(f"--gpus is {num_gpus} and --hosts is {num_hosts}; expected at least one of each.")
    hosts = num_hosts or hosts_of(num_gpus)
    if num_gpus % hosts:
        raise ConfigError(
            f"{num_gpus} GPUs on {hosts} hosts; expected the same number on every host. Set --gpus to a multiple of "
            "--hosts."
        )
    return Machine(gpu, num_gpus, hosts, interconnect)


def hosts_of(num_gpus: int, gpus_per_host: int = 8) -> int:
    """The number of hosts of a number of GPUs, if each has at most `gpus_per_host` and all have the same number."""
    return next(hosts for hosts in range(max(-(-num_gpus // gpus_per_host), 1), num_gpus + 1) if num_gpus % hosts == 0)
