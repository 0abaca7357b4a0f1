"""Common parts of the benchmark programs: options, documents, origin, memory and CSV rows of a measurement."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import torch

import arc_ds
from arc_ds.demo.inputs import speeches
from arc_ds.errors import ArcError, DataError
from arc_ds.system.device import describe_device
from arc_ds.system.user_paths import path_argument


def origin(packages: Sequence[str]) -> dict[str, str]:
    """Machine, date, commit and versions of a row, by its field. Outside a checkout the commit is arc_ds's version."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = arc_ds.__version__
    versions = {name: metadata.version(name) for name in packages} | {"python": platform.python_version()}
    return {
        "machine": describe_device(torch.device("cpu")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
    }


def reset_peak_memory() -> None:
    """Let VmHWM start again. Linux only. `ru_maxrss` would include the parent's peak from before the start."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(key: str) -> int:
    """Resident set size of this process: VmRSS now, VmHWM the highest since the last reset. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def megabytes_of(folder: Path) -> float:
    """Size of all files in a folder, in megabytes (10^6 bytes)."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def write(file: TextIO, rows: Sequence[Any], *, header: bool) -> None:
    """Write rows, instances of one dataclass, as CSV."""
    writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
    if header:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)


def append(path: Path, rows: Sequence[Any]) -> None:
    """Append rows to a CSV file. A new file starts with a header."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        write(file, rows, header=is_new)


def model_parser(doc: str, *, characters: int) -> argparse.ArgumentParser:
    """The options of a program that measures an export and its decoder with documents of a text.

    doc: of the program. Its first line becomes the description.
    characters: default length of a document.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--model", type=path_argument, required=True, help="an export")
    parser.add_argument("--decoder", type=path_argument, required=True, help="its decoder")
    parser.add_argument("--text", type=path_argument, help="text file to take documents from (default: speeches)")
    parser.add_argument("--characters", type=int, default=characters, help=f"of a document (default {characters})")
    parser.add_argument("--dtype", default="float32", help="dtype of weights (default float32)")
    parser.add_argument("--out", type=path_argument, help="CSV file to append the rows to")
    return parser


def cut_documents(args: argparse.Namespace, number: int) -> list[str]:
    """So many documents: parts of `--text` or of the State of the Union speeches. DataError if there are fewer."""
    files = [args.text] if args.text else chain(*speeches())
    text = " ".join(" ".join(file.read_text(encoding="utf-8") for file in files).split())
    documents = [text[start : start + args.characters] for start in range(0, len(text), args.characters)]
    if len(documents) < number:
        raise DataError(f"the text gives {len(documents)} documents of {number}; give a longer one, or ask for fewer")
    return documents[:number]


def run(measure: Callable[[argparse.Namespace], Sequence[Any]], args: argparse.Namespace) -> int:
    """Measure, and append the rows to `--out`. Returns the exit code; 2 after an error, which is printed."""
    try:
        rows = measure(args)
    except ArcError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return 2
    if args.out is not None:
        append(args.out, rows)
    return 0


def command_line() -> str:
    """The command of this process, with the names of files and folders in place of their paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *words])
