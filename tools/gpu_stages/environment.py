"""Stage "environment": the machine, the versions, the missing packages, and the ceilings of the device."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu_timing import measure_ceilings
from rows import Row, machine_name

from arc_ds.system.device import peak_bf16_flops
from gpu_stages.context import CEILINGS, StageContext

# Packages that stages and comparisons use. Only those of the first line are required.
PACKAGES = {
    "torch triton numpy pyyaml safetensors tokenizers xxhash pytest hypothesis": "every stage",
    "pytest-xdist": "the tests run in one process without it",
    "deepspeed": "the step falls back on plain PyTorch, and the whole program is left out",
    "liger-kernel quack-kernels flash-attn-3": "their kernels are not compared with ours",
    "mlflow webdataset gguf": "no stage needs it",
}


def run(context: StageContext) -> None:
    """Append what the machine is and has."""
    row = _row(context)
    context.add(row("machine", "name", machine_name()), row("machine", "python", platform.python_version()))
    context.add(row("machine", "driver", _driver() or "none"))
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        context.add(
            row("machine", "capability", f"{properties.major}.{properties.minor}"),
            row("machine", "memory", round(properties.total_memory / 2**30, 1), "GiB"),
            row("machine", "multiprocessors", properties.multi_processor_count),
            row("machine", "stated bf16 rate", round((peak_bf16_flops(context.device) or 0) / 1e12, 1), "TFLOP/s"),
        )
    for names, purpose in PACKAGES.items():
        for name in names.split():
            found = _version(name)
            context.add(row("package", name, found or "missing", note="" if found else purpose))
    sizes = {"copy_bytes": 1 << 20, "matrix_size": 64} if context.rehearse else {}
    ceilings = measure_ceilings(context.device, **sizes)
    (context.out / CEILINGS).write_text(json.dumps(ceilings._asdict()))
    context.add(
        row("ceiling", "copy, read and written", round(ceilings.copy / 1e9, 1), "GB/s"),
        row("ceiling", "bf16 product of random matrices", round(ceilings.matrix / 1e12, 3), "TFLOP/s"),
    )


def _row(context: StageContext):  # type: ignore[no-untyped-def]
    def make(subject: str, metric: str, value: float | str, unit: str = "", note: str = "") -> Row:
        return Row(stage=context.stage, subject=subject, metric=metric, value=value, unit=unit, note=note)

    return make


def _driver() -> str:
    """The GPU driver's version as nvidia-smi states it; nothing without the program."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
