"""Time and memory of `arc-ds export` on a random checkpoint, next to `cp` of the same bytes.

    python tools/bench_export.py --gb 2 --world-size 4 --csv tools/bench_export.csv

Writes a checkpoint of ZeRO-3 shards with Adam's moments (three times the weights), exports it in a process of its own,
and prints CSV rows. Memory is the peak resident set above the one after all imports. `cp` is synced to disk, like the
export. Every file is in the page cache. Linux only.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_rows import append, megabytes_of, memory_bytes, origin, reset_peak_memory, write

from arc_ds.batch.groups import GroupRule
from arc_ds.checkpoints.checkpoint import TRAINER_NAME, TrainerState
from arc_ds.checkpoints.manifest import Manifest, seal_file, write_manifest
from arc_ds.checkpoints.shards import COUNTERS, MASTER, EngineState, piece_numel, write_shards
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.spec import CompressorSpec, build_compressor

_MB = 1e6
_VOCABULARY = 64_000
Piece = Callable[[str, int, int], torch.Tensor]
_PACKAGES = ("torch", "safetensors", "numpy", "xxhash")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One export.

    weights_mb: float32 weights in megabytes (10^6 bytes).
    largest_mb: largest tensor, in the dtype of the export.
    shards_mb: files of one checkpoint.
    exported_mb: files of the export.
    seconds: wall time of the export in its process, without imports.
    peak_above_base_mb: peak resident set above the one after the imports.
    peak_over_largest: the same as a multiple of the largest tensor.
    cp_export_s: time of `cp` and `sync` of the exported files.
    cp_shards_s: time of `cp` and `sync` of the checkpoint's files, all of which the export verifies first.
    """

    world_size: int
    format: str
    dtype: str
    average: int
    weights_mb: float
    largest_mb: float
    shards_mb: float
    exported_mb: float
    seconds: float
    peak_above_base_mb: float
    peak_over_largest: float
    cp_export_s: float
    cp_shards_s: float
    machine: str
    date: str
    commit: str
    versions: str
    command: str


def main() -> int:
    """Run the benchmark; return 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="float32 weights in gigabytes (default 2)")
    parser.add_argument("--width", type=int, default=2048, help="of the encoder and its decoder (default 2048)")
    parser.add_argument("--world-size", type=int, nargs="+", default=[4], help="ranks that wrote the checkpoint")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--format", nargs="+", default=["arc-ds", "arc"])
    parser.add_argument("--average", type=int, nargs="+", default=[1], help="checkpoints per mean (copies of one)")
    parser.add_argument("--csv", type=Path, help="file to which the rows are appended")
    parser.add_argument("--export", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        return _export_here(args.export)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_export_", dir=Path.cwd()) as folder:
        for world_size in args.world_size:
            run = Path(folder) / f"run{world_size}"
            spec = spec_of_size(args.gb * 1e9, args.width)
            for step in range(1, max(args.average) + 1):
                write_random_checkpoint(run, spec, world_size, step=step)
            for average in args.average:
                for export_format in args.format:
                    for dtype in args.dtype:
                        rows.append(_measure(run, Path(folder) / "out", export_format, dtype, average, spec))
                        write(sys.stdout, rows[-1:], header=len(rows) == 1)
                        sys.stdout.flush()
    if args.csv is not None:
        append(args.csv, rows)
    return 0


def spec_of_size(num_bytes: float, width: int) -> CompressorSpec:
    """A spec of a width, with as many layers as make its float32 weights at least this large."""
    for num_layers in range(2, 200):
        backbone = BackboneConfig(
            family="llama",
            hidden_size=width,
            num_layers=num_layers,
            num_heads=16,
            num_kv_heads=8,
            head_dim=width // 16,
            ffn_size=4 * width,
            vocab_size=_VOCABULARY,
            rope_theta=500_000.0,
            norm_eps=1e-5,
        )
        spec = CompressorSpec(
            backbone=backbone, num_layers=num_layers - 1, rules=(GroupRule("factor", 8),), decoder_sizes=(width,)
        )
        if 4 * sum(math.prod(shape) for shape in shapes_of(spec).values()) >= num_bytes:
            return spec
    raise ValueError(f"{num_bytes} bytes are too many")


def shapes_of(spec: CompressorSpec) -> dict[str, torch.Size]:
    """Shape of every parameter of a compressor by name."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in build_compressor(spec).named_parameters()}


def write_random_checkpoint(run: Path, spec: CompressorSpec, world_size: int, *, step: int = 1) -> Path:
    """`write_checkpoint` with random weights, which differ from step to step."""

    def piece(name: str, numel: int, rank: int) -> torch.Tensor:
        seed = zlib.crc32(f"{name} {rank} {step}".encode())
        return torch.empty(numel).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))

    return write_checkpoint(run, spec, world_size, piece, step=step)


def write_checkpoint(
    run: Path,
    spec: CompressorSpec,
    world_size: int,
    piece: Piece,
    *,
    step: int = 1,
    frozen: tuple[str, ...] = (),
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write `run/checkpoints/step_NNNNNN` with Adam's moments, as a run writes it, and a tokenizer.

    Holds the files of one rank in memory.

    piece: returns a rank's part of a parameter as float32, from its name, the number of values and the rank. It has
        ceil(n / world_size) values; the last ones are padded.
    frozen: beginnings of the names of parameters that are not trained.
    extra: more of `TrainerState.extra`.
    """
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    shapes = {name: tuple(shape) for name, shape in shapes_of(spec).items() if not name.startswith(frozen)}
    by_part = [
        {name: shape for name, shape in shapes.items() if name.startswith("ports.") is is_port}
        for is_port in (False, True)
    ]
    groups = [group for group in by_part if group]
    files = []
    for rank in range(world_size):
        tensors: dict[str, torch.Tensor] = {}
        for idx, group in enumerate(groups):
            pieces = [piece(name, piece_numel(math.prod(shape), world_size), rank) for name, shape in group.items()]
            flat = torch.cat(pieces)
            moments = {"exp_avg": 0.1 * flat, "exp_avg_sq": flat.square(), "step": torch.tensor(float(step))}
            tensors |= {f"{idx}.{state}": tensor for state, tensor in {MASTER: flat, **moments}.items()}
        state = EngineState(sub_groups=groups, counters=dict.fromkeys(COUNTERS, step), tensors=tensors)
        files += write_shards(folder, rank, state)
    (folder / TRAINER_NAME).write_text(json.dumps(asdict(state_of(run, spec, step, extra or {}))))
    files.append(seal_file(folder, folder / TRAINER_NAME))
    write_manifest(folder, Manifest(step=step, world_size=world_size, files=tuple(files)))
    return folder


def state_of(run: Path, spec: CompressorSpec, step: int, extra: Mapping[str, Any]) -> TrainerState:
    """The state of a trainer whose encoder reads bytes. extra: more of its `extra`."""
    tokenizer = run / "tokenizer.model"
    if not tokenizer.exists():
        tokenizer.write_text("".join(f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)))
    decoders = [{"name": f"decoder{idx}", "rope_scaling": "checkpoint"} for idx in range(len(spec.decoder_sizes))]
    described = {"compressor": spec.to_json(), "encoder_tokenizer": str(tokenizer), "decoders": decoders, **extra}
    return TrainerState(step=step, data_position=step, data_fingerprint="random", config_hash="random", extra=described)


def _export_here(arguments: list[str]) -> int:
    """Export in this process and print time and memory as JSON."""
    from arc_ds.cli import main as cli
    from arc_ds.commands import export  # noqa: F401  # its imports belong to the base

    torch.empty(1).bfloat16().float()
    reset_peak_memory()
    base, started = memory_bytes("VmRSS"), time.perf_counter()
    code = cli(["export", *arguments])
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": (memory_bytes("VmHWM") - base) / _MB}))
    return code


def _measure(run: Path, out: Path, export_format: str, dtype: str, average: int, spec: CompressorSpec) -> Row:
    options = ["--format", export_format, "--dtype", dtype, "--average", str(average)]
    os.sync()  # pending writes of the checkpoint or the last row would slow this one down
    command = [sys.executable, __file__, "--export", str(run), str(out), *options]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    numels = [math.prod(shape) for shape in shapes_of(spec).values()]
    largest = max(numels) * getattr(torch, dtype).itemsize / _MB
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    row = Row(
        world_size=len(list(checkpoint.glob("shard_*.safetensors"))),
        format=export_format,
        dtype=dtype,
        average=average,
        weights_mb=round(4 * sum(numels) / _MB, 1),
        largest_mb=round(largest, 1),
        shards_mb=round(megabytes_of(checkpoint), 1),
        exported_mb=round(megabytes_of(out), 1),
        seconds=round(found["seconds"], 2),
        peak_above_base_mb=round(found["peak"], 1),
        peak_over_largest=round(found["peak"] / largest, 3),
        cp_export_s=round(_time_of_cp(out), 2),
        cp_shards_s=round(_time_of_cp(checkpoint), 2),
        **origin(_PACKAGES),
        command=shlex.join(["python", "tools/bench_export.py", *sys.argv[1:]]),
    )
    subprocess.run(["rm", "-r", str(out)], check=True)
    return row


def _time_of_cp(folder: Path) -> float:
    target = folder.parent / f"{folder.name}.copy"
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder), str(target)], check=True)
    subprocess.run(["sync", *(str(path) for path in target.rglob("*"))], check=True)
    seconds = time.perf_counter() - started
    subprocess.run(["rm", "-r", str(target)], check=True)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
