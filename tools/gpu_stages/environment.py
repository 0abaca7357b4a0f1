"""Stage "environment": the machine, the versions, the missing packages, and the ceilings of the device."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import partial

import torch
from rows import machine_name, version_of

from arc_ds.system.device import peak_bf16_flops
from gpu_stages.context import StageContext

# Packages that stages and comparisons use. Only those of the first line are required.
PACKAGES = {
    "torch triton numpy pyyaml safetensors tokenizers xxhash pytest hypothesis": "every stage",
    "pytest-xdist": "the tests run in one process without it",
    "deepspeed": "the step falls back on plain PyTorch, and the whole program is left out",
    "liger-kernel quack-kernels flash-attn-3": "their kernels are not compared with ours",
    "mlflow webdataset gguf": "no stage needs it",
}


def run(context: StageContext) -> None:
    """Append the rows of machine, packages and ceilings."""
    machine = partial(context.add, "machine")
    machine("name", machine_name())
    machine("python", platform.python_version())
    machine("driver", _driver() or "none")
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        machine("capability", f"{properties.major}.{properties.minor}")
        machine("memory", round(properties.total_memory / 2**30, 1), "GiB")
        machine("multiprocessors", properties.multi_processor_count)
        machine("stated bf16 rate", round((peak_bf16_flops(context.device) or 0) / 1e12, 1), "TFLOP/s")
    for names, purpose in PACKAGES.items():
        for name in names.split():
            found = version_of(name)
            context.add("package", name, found or "missing", note="" if found else purpose)
    ceilings = context.measure_ceilings()
    context.add("ceiling", "copy, read and written", round(ceilings.copy / 1e9, 1), "GB/s")
    context.add("ceiling", "bf16 product of random matrices", round(ceilings.matrix / 1e12, 3), "TFLOP/s")


def _driver() -> str:
    """The GPU driver's version as nvidia-smi states it; nothing without the program."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0]
