"""Time and memory of `arc-ds compare` on synthetic runs, from folders, from one MLflow database, and from a server.

    python tools/bench_compare.py --runs 100 --steps 2000 --metrics 30 --server

Writes the runs to a temporary folder and to an sqlite store there, and compares each set in a process of its own. The
runs are a sweep: learning rates and batch sizes, three seeds each.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from arc_ds.config.load import flatten_tree

_START = 1_790_000_000.0
_STEP_S = 0.8
_RATES = (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3)
_BATCHES = (64, 128, 256, 512, 1024)
_SEEDS = 3
_FIRST = (
    "train/loss",
    "train/loss/llama/pretraining",
    "train/loss/mistral/pretraining",
    "train/grad_norm",
    "train/mfu",
    "lr/encoder",
    "lr/bridge.0",
    "speed/encoder_tokens_per_s",
    "speed/decoder_rows_per_s",
    "speed/step_s",
    "memory/peak_gib",
    "validation/llama/continuation/nll_compressed",
    "validation/llama/continuation/gap_closed",
    "eval/squad/f1",
    "eval/squad/em",
)


def sweep(num_runs: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Name, config and index of each run."""
    for idx in range(num_runs):
        cell, seed = divmod(idx, _SEEDS)
        rate, batch = _RATES[cell % len(_RATES)], _BATCHES[cell // len(_RATES) % len(_BATCHES)]
        name = f"lr{rate:g}_b{batch}_s{seed}"
        config = {
            "run_dir": f"/data/runs/sweep/{name}",
            "steps": 2000,
            "seed": seed,
            "deepspeed": {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 100000 * batch}},
            "decoders": [{"name": "llama", "backbone": "/models/Llama-3.1-8B"}],
            "data": {"batch_size": batch, "sources": [{"path": "/data/shards/wikipedia-2026/train", "weight": 1.0}]},
            "optimizer": {"encoder_lr": rate, "bridge_lr": 3 * rate, "betas": [0.9, 0.95]},
            "tracking": {"experiment": "sweep", "run_name": name},
        }
        yield name, config, idx


def metric_columns(config: dict[str, Any], idx: int, num_steps: int, num_metrics: int) -> dict[str, np.ndarray]:
    """Values of each metric at the steps 1 to `num_steps`; NaN where a metric is not logged."""
    random = np.random.default_rng(idx)
    rate, batch = config["optimizer"]["encoder_lr"], config["data"]["batch_size"]
    step = np.arange(1, num_steps + 1)
    floor = 2.0 + 0.12 * np.log(rate / 5e-4) ** 2 + 0.05 * (10 - np.log2(batch)) + 0.01 * random.standard_normal()
    loss = floor + 6 * np.exp(-step * rate * 12) + random.standard_normal(num_steps) * 1.6 / np.sqrt(batch)
    names = [*_FIRST, *(f"network/all_gather_mib/layer_{n}" for n in range(num_metrics))][:num_metrics]
    columns = {}
    for name in names:
        noise = random.standard_normal(num_steps)
        if name.startswith("train/loss"):
            values = loss + 0.03 * noise + 0.05 * len(name) / 10
        elif name.startswith("validation") or name.startswith("eval"):
            better = 1 - (loss - 2) / 8
            values = {"f1": 100 * better, "em": 60 * better, "gap_closed": better}.get(name.split("/")[-1], loss)
            values = np.where(step % 100 == 0, values, np.nan)
        elif name.startswith("lr/"):
            values = rate * np.minimum(step / 100, 1) * (1 - step / (num_steps + 1))
        elif name == "speed/step_s":
            values = _STEP_S * (1 + 0.05 * np.abs(noise))
        elif name.startswith("speed/"):
            values = 900 * batch * (1 + 0.03 * noise)
        elif name == "train/mfu":
            values = 0.45 + 0.01 * noise
        elif name.startswith("memory"):
            values = np.full(num_steps, 20 + batch / 40)
        else:
            values = 100 + noise
        columns[name] = values
    return columns


def write_folders(folder: Path, num_runs: int, num_steps: int, num_metrics: int) -> None:
    """Write each run as a folder with `config.yaml` and `metrics.jsonl`."""
    for name, config, idx in sweep(num_runs):
        run = folder / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        columns = metric_columns(config, idx, num_steps, num_metrics)
        with (run / "metrics.jsonl").open("w") as file:
            for row in range(num_steps):
                metrics = {key: float(values[row]) for key, values in columns.items() if values[row] == values[row]}
                entry = {"step": row + 1, "time": _START + _STEP_S * (row + 1), "metrics": metrics}
                file.write(json.dumps(entry) + "\n")


def write_store(database: Path, num_runs: int, num_steps: int, num_metrics: int) -> None:
    """Write the runs into one MLflow database. Points go in by SQL: MLflow itself would need minutes."""
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    experiment = client.create_experiment("sweep", artifact_location=(database.parent / "artifacts").as_uri())
    for name, config, idx in sweep(num_runs):
        run_id = client.create_run(experiment, run_name=name).info.run_id
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flatten_tree(config).items()])
        client.set_terminated(run_id)
        columns = metric_columns(config, idx, num_steps, num_metrics)
        points, last = [], []
        for key, values in columns.items():
            rows = [
                (key, float(value), round(1000 * (_START + _STEP_S * (row + 1))), row + 1, False, run_id)
                for row, value in enumerate(values)
                if value == value
            ]
            points += rows
            last += rows[-1:]
        with closing(sqlite3.connect(database)) as connection, connection:
            wanted = "(key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, ?, ?, ?)"
            connection.executemany(f"INSERT INTO metrics {wanted}", points)
            connection.executemany(f"INSERT INTO latest_metrics {wanted}", last)


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run `arc-ds compare` and return its seconds and its peak memory in MiB."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "arc_ds.cli", "compare", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


@contextmanager
def serving(database: Path) -> Iterator[str]:
    """Address of an MLflow server on a database, which ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "arc_ds.cli", "ui", str(database), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert server.stdout is not None and server.stdout.readline(), "the server did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Write the runs, compare them, and print a line for each origin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--metrics", type=int, default=30)
    parser.add_argument("--server", action="store_true", help="also read the database through an MLflow server")
    parser.add_argument("--keep", type=Path, help="write the runs and pages there, and keep them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="arc_ds_bench_") as made:
        folder = args.keep or Path(made)
        sizes = (args.runs, args.steps, args.metrics)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "runs").exists():
            write_folders(folder / "runs", *sizes)
            write_store(folder / "mlflow.db", *sizes)
        database = folder.resolve() / "mlflow.db"
        with serving(database) if args.server else nullcontext() as address:
            origins = {"folders": [str(folder / "runs")], "mlflow.db": _experiment(f"sqlite:///{database}")}
            origins |= {"server": _experiment(address)} if address else {}
            for name, where in origins.items():
                seconds, peak_mib = measure([*where, f"--out={folder / f'page_{name}'}"])
                print(
                    f"{name:10s} {args.runs} runs x {args.steps} steps x {args.metrics} metrics: "
                    f"{seconds:.1f} s, peak of all so far {peak_mib:.0f} MiB"
                )


def _experiment(uri: str) -> list[str]:
    return [f"--tracking-uri={uri}", "--experiment=sweep"]


if __name__ == "__main__":
    main()
