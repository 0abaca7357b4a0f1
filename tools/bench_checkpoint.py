"""Cost of a save for the steps around it: in the background, waiting, and with the files of earlier versions.

    python tools/bench_checkpoint.py --million 25 --csv tools/bench_checkpoint.csv

Trains a stack of linear layers under ZeRO-3 on one rank, half of which are frozen, and saves every few steps. The three
ways take turns in one process, so that they share its load. Earlier versions wrote, synced, hashed and renamed
DeepSpeed's files, as here, before the next step began.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_rows import append, megabytes_of, origin, write
from torch import nn

from arc_ds.checkpoints.checkpoint import TrainerState
from arc_ds.checkpoints.manifest import Manifest, seal_file, write_manifest
from arc_ds.checkpoints.writer import CheckpointWriter
from arc_ds.system import dist
from arc_ds.system.device import select_device, synchronize
from arc_ds.training.optim import ParamGroup, PortAdamW

_MB = 1e6
_WIDTH = 1024
_PACKAGES = ("torch", "deepspeed", "safetensors", "xxhash")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to save.

    way: deepspeed (earlier versions), waiting (`checkpoint.asynchronous: false`) or background.
    trained_mb: trained parameters in float32, in megabytes (10^6 bytes); as many are frozen.
    checkpoint_mb: files of one checkpoint.
    step_s: median time of a step without a save.
    blocked_s: median time from the start of a save to the next step.
    slowdown_s: median of the time of a save and the steps after it, less the time of as many steps without a save.
    saves: number of saves.
    """

    way: str
    device: str
    trained_mb: float
    checkpoint_mb: float
    step_s: float
    blocked_s: float
    slowdown_s: float
    saves: int
    machine: str
    date: str
    commit: str
    versions: str
    command: str


def main() -> int:
    """Run the benchmark; return 0 on success."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=float, default=25.0, help="trained parameters in millions (default 25)")
    parser.add_argument("--every", type=int, default=8, help="steps between saves (default 8)")
    parser.add_argument("--saves", type=int, default=5, help="saves of each way (default 5)")
    parser.add_argument("--tokens", type=int, default=512, help="rows of a step's batch (default 512)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path, help="file to which the rows are appended")
    args = parser.parse_args()
    device = select_device(args.device)
    dist.init_distributed(device)
    num_layers = max(round(args.million * 1e6 / _WIDTH**2), 1)
    engine = _engine(num_layers, device)
    x_TD = torch.randn(args.tokens, _WIDTH, device=device)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_", dir=Path.cwd()) as folder:
        ways, finish = _ways(engine, Path(folder))
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for number in range(1, args.saves + 2):
            for way, save in ways.items():

                def steps() -> list[float]:
                    return [_timed(device, lambda: _step(engine, x_TD)) for _ in range(args.every)]

                blocked = _timed(device, lambda save=save, number=number: save(number))  # type: ignore[misc]
                total = blocked + sum(steps())
                finish()
                undisturbed = steps()
                found[way].append((statistics.median(undisturbed), blocked, total - sum(undisturbed)))
        for way, times in found.items():
            (checkpoint,) = (Path(folder) / way).glob("step_*")
            step_s, blocked_s, slowdown_s = (statistics.median(column) for column in zip(*times[1:], strict=True))
            rows.append(
                Row(
                    way=way,
                    device=device.type,
                    trained_mb=round(4 * num_layers * _WIDTH**2 / _MB, 1),
                    checkpoint_mb=round(megabytes_of(checkpoint), 1),
                    step_s=round(step_s, 4),
                    blocked_s=round(blocked_s, 4),
                    slowdown_s=round(slowdown_s, 4),
                    saves=args.saves,
                    **origin(_PACKAGES),
                    command=shlex.join(["python", "tools/bench_checkpoint.py", *sys.argv[1:]]),
                )
            )
    write(sys.stdout, rows, header=True)
    if args.csv is not None:
        append(args.csv, rows)
    return 0


def _engine(num_layers: int, device: torch.device) -> Any:
    import deepspeed

    net = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(2 * num_layers))).to(device)
    net[:num_layers].requires_grad_(False)
    trained = tuple(param for param in net.parameters() if param.requires_grad)
    group = ParamGroup(name="encoder", params=trained, port=None, peak_lr=1e-5, weight_decay=0.0)
    config = {"train_batch_size": 1, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 3}}
    optimizer = PortAdamW([group], betas=(0.9, 0.95), eps=1e-8, fused=device.type != "cpu")
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    return engine


def _ways(engine: Any, folder: Path) -> tuple[dict[str, Callable[[int], object]], Callable[[], None]]:
    """The ways to save, and a function that waits for the save in the background."""
    writers = {
        way: CheckpointWriter(folder / way, keep_last=1, keep_every=0, asynchronous=way == "background")
        for way in ("waiting", "background")
    }

    def state(step: int) -> TrainerState:
        return TrainerState(step=step, data_position=0, data_fingerprint="", config_hash="")

    def deepspeed(step: int) -> None:
        directory, name = folder / "deepspeed", f"step_{step:06d}"
        engine.save_checkpoint(str(directory), tag=f".tmp-{name}", save_latest=False)
        temporary = directory / f".tmp-{name}"
        files = tuple(seal_file(temporary, path) for path in sorted(temporary.iterdir()))
        write_manifest(temporary, Manifest(step=step, world_size=1, files=files))
        for earlier in directory.glob("step_*"):
            shutil.rmtree(earlier)
        temporary.rename(directory / name)

    ways = {
        "deepspeed": deepspeed,
        "waiting": lambda step: writers["waiting"].save(engine, state(step)),
        "background": lambda step: writers["background"].save(engine, state(step)),
    }
    return ways, writers["background"].finish


def _step(engine: Any, x_TD: torch.Tensor) -> None:
    engine.backward(engine(x_TD).square().mean())
    engine.step()


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
