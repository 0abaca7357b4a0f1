"""Load of the hosts of a run: processors, memory, disk, network and GPUs.

One process of each host samples it from a thread and appends to `RUN/system_metrics/HOST.jsonl`, in the format of
`metrics.jsonl`. The tracker of rank 0 sends all these files to MLflow. The names are those of MLflow's own system
metrics, with the host: `system/HOST/cpu_utilization_percentage`. The step of a point is its number in the file.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from arc_ds.errors import StorageError
from arc_ds.system.files import output
from arc_ds.tracking.metrics_log import MetricsLog, read_metrics

logger = logging.getLogger(__name__)

SYSTEM_FOLDER = "system_metrics"
_NOT_IN_A_NAME = re.compile(r"[^\w.\-]")
_MB = 1e6
# MLflow's names, and the factors to their units, by the names of nvidia-smi.
_GPU_FIGURES = {
    "memory.used": ("memory_usage_megabytes", 2**20 / _MB),
    "utilization.gpu": ("utilization_percentage", 1.0),
    "power.draw": ("power_usage_watts", 1.0),
    "temperature.gpu": ("temperature_celsius", 1.0),
}
_GPU_TIMEOUT_S = 10.0
_CLOSE_S = 2.0


class SystemMetrics:
    """Samples this host from a thread until it is closed."""

    def __init__(self, folder: Path, host: str, *, every_s: float) -> None:
        """Start to sample. Continues the host's file.

        folder: the run's folder.
        host: name of this host.
        every_s: seconds between samples.

        Raises StorageError if the file cannot be written.
        """
        self._host = _NOT_IN_A_NAME.sub("_", host)
        self._folder = folder
        path = folder / SYSTEM_FOLDER / f"{self._host}.jsonl"
        with output(path):
            self._log = MetricsLog(path, resumed_step=sys.maxsize)
        self._step = max((entry.step for entry in read_metrics(path)), default=0)
        self._every_s = every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="system metrics")
        self._thread.start()

    def close(self) -> None:
        """Stop sampling. Safe to call more than once."""
        self._closing.set()
        self._thread.join(timeout=_CLOSE_S)
        self._log.close()

    def _run(self) -> None:
        psutil.cpu_percent()  # utilization is that since the last call
        while not self._closing.wait(self._every_s):
            self._step += 1
            try:
                metrics = {f"system/{self._host}/{name}": value for name, value in _sample(self._folder)}
                self._log.append(self._step, metrics)
            except (OSError, StorageError, ValueError) as error:  # ValueError: closed meanwhile
                if not self._closing.is_set():
                    logger.warning("no more system metrics of %s: %s", self._host, error)
                return


def _sample(folder: Path) -> Iterator[tuple[str, float]]:
    """The load of this host by MLflow's names. Bytes of disk are those of the file system of `folder`."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(folder)), psutil.net_io_counters()
    yield "cpu_utilization_percentage", psutil.cpu_percent()
    yield "system_memory_usage_megabytes", memory.used / _MB
    yield "system_memory_usage_percentage", memory.percent
    yield "disk_usage_percentage", disk.percent
    yield "disk_available_megabytes", disk.free / _MB
    if network is not None:  # a host without network interfaces
        yield "network_receive_megabytes", network.bytes_recv / _MB
        yield "network_transmit_megabytes", network.bytes_sent / _MB
    yield from _sample_gpus()


def _sample_gpus() -> Iterator[tuple[str, float]]:
    """The load of this host's NVIDIA GPUs. Nothing without `nvidia-smi`; a figure that it does not know is left out."""
    query = [f"--query-gpu={','.join(_GPU_FIGURES)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=_GPU_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return
    for gpu_idx, line in enumerate(done.stdout.splitlines()):
        for (name, factor), text in zip(_GPU_FIGURES.values(), line.split(","), strict=False):
            with suppress(ValueError):  # "[N/A]"
                yield f"gpu_{gpu_idx}_{name}", float(text) * factor
