"""Time and memory of building and checking shards from synthetic JSONL of several sizes.

    python tools/bench_shards.py --tokenizer MODEL --mb 100 1000 --workers 2

Prints CSV rows for each size. Memory is the sum over all processes of the command, sampled four times per second.
Pages shared by several processes count once. Memory must not grow with the input. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench_rows import write

import arc_ds

_PERIOD_S = 0.25
_WORDS = "the of a and to in was on that by stone tower lamp keeper island harbour weather winter light built "


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Time and memory of one command, summed over its processes.

    input_mb: size of the input in megabytes (10^6 bytes).
    peak_mib: peak memory including pages of mapped files. `check` maps one tar per worker; the system may drop these
        pages.
    peak_own_mib: peak memory without pages of mapped files.
    """

    command: str
    input_mb: float
    workers: int
    seconds: float
    cpu_s: float
    peak_mib: float
    peak_own_mib: float
    num_processes: int
    machine: str
    date: str
    version: str


def main() -> int:
    """Run the benchmark; return 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="tokenizer file or folder")
    parser.add_argument("--mb", type=float, nargs="+", default=[100.0, 1000.0], help="sizes of the inputs")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="folder for inputs and shards; both are removed at the end")
    args = parser.parse_args()
    is_first = True
    for size in args.mb:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            source, out = Path(folder) / "in.jsonl", Path(folder) / "out"
            write_jsonl(source, int(size * 1e6))
            common = ["--workers", str(args.workers)]
            build = ["build", str(source), "--out", str(out), "--tokenizer", args.tokenizer, *common]
            for words in (build, ["check", str(out), *common]):
                row = measure(words, input_mb=size, workers=args.workers)
                write(sys.stdout, [row], header=is_first)
                sys.stdout.flush()
                is_first = False
    return 0


def write_jsonl(path: Path, num_bytes: int) -> None:
    """Write documents of 0.2 to 6 KB with words in random order. The output is deterministic."""
    draw = random.Random(0)
    words = _WORDS.split()
    sentences = [" ".join(draw.choices(words, k=draw.randrange(4, 24))).capitalize() + "." for _ in range(5000)]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            text = " ".join(draw.choices(sentences, k=draw.randrange(3, 80)))
            written += file.write(json.dumps({"text": f"{written}. {text}"}) + "\n")


def measure(words: list[str], *, input_mb: float, workers: int) -> Row:
    """Run `arc-ds shards …` and measure it. Raises RuntimeError if the command fails."""
    start, cpu_start = time.perf_counter(), _children_cpu_s()
    process = subprocess.Popen([sys.executable, "-m", "arc_ds.cli", "shards", *words], stdout=subprocess.DEVNULL)
    watch = MemoryWatch(process.pid)
    watch.start()
    code = process.wait()
    watch.stop()
    if code != 0:
        raise RuntimeError(f"arc-ds shards {words[0]} ended with code {code}")
    return Row(
        command=words[0],
        input_mb=input_mb,
        workers=workers,
        seconds=round(time.perf_counter() - start, 1),
        cpu_s=round(_children_cpu_s() - cpu_start, 1),
        peak_mib=round(watch.peak.total / (1 << 20), 1),
        peak_own_mib=round(watch.peak.own / (1 << 20), 1),
        num_processes=watch.num_processes,
        machine=f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        version=arc_ds.__version__,
    )


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Memory(NamedTuple):
    """Memory in bytes, with and without pages of mapped files."""

    total: int = 0
    own: int = 0


class MemoryWatch(threading.Thread):
    """Samples the memory of a process and its descendants. num_processes: maximum number of concurrent processes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = Memory()
        self.num_processes = 0
        self._pid = pid
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_PERIOD_S):
            found = [_memory_of(pid) for pid in _descendants(self._pid)]
            total, own = sum(memory.total for memory in found), sum(memory.own for memory in found)
            self.peak = Memory(max(self.peak.total, total), max(self.peak.own, own))
            self.num_processes = max(self.num_processes, len(found))

    def stop(self) -> None:
        """Stop sampling and wait for the thread."""
        self._stopped.set()
        self.join()


def _descendants(pid: int) -> list[int]:
    """A process and its running descendants."""
    found = [pid]
    for parent in found:  # grows during iteration
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:  # the process has ended in the meantime
                continue
    return found


def _memory_of(pid: int) -> Memory:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return Memory()
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss")}
    return Memory(sizes.get("Pss:", 0), sizes.get("Pss_Anon:", 0))


if __name__ == "__main__":
    sys.exit(main())
