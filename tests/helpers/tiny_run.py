"""A complete tiny run: random backbones, tokenizers, shards and a config, and `arc-ds train` on them.

Two decoders with different widths and tokenizers alternate. Batches mix both tasks, and a step has two micro-batches.
Everything runs on the CPU in float32.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import torch
import yaml

from arc_ds.checkpoints.checkpoint import list_checkpoints, step_of
from arc_ds.config.load import load_config
from arc_ds.system import dist
from arc_ds.system.processes import die_with_parent
from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_data import numbered_texts, write_json_tokenizer, write_shards, write_tiktoken
from tests.helpers.tiny_models import random_tensors, tiny_config, write_hf
from tests.helpers.waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
EVERY = 8
# Overrides of runs that only train.
PLAIN = (
    "checkpoint.every=0",
    "validation.every=0",
    "data.validation=null",
    "data.num_workers=0",
    "tracking.mlflow=false",
)
# The other metrics are times, which differ between equal runs.
NUMERIC = ("train/", "lr/", "validation/", "data/")
TIMED = ("validation/seconds",)


def write_inputs(folder: Path) -> Path:
    """Write all inputs of a tiny run and return its config, whose `run_dir` is `folder/run` unless overridden."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = _write_backbone(folder / "encoder", seed=0)
    write_json_tokenizer(encoder)
    write_json_tokenizer(_write_backbone(folder / "wide", seed=1, hidden_size=48, head_dim=12))
    # A tiktoken tokenizer has 256 special tokens in addition to those in its file.
    write_tiktoken(_write_backbone(folder / "other", seed=2, vocab_size=560) / "tokenizer.model")
    texts = numbered_texts(72)
    write_shards(folder / "train", encoder, texts[:48], shard_bytes=1 << 14)
    write_shards(folder / "held_out", encoder, texts[48:], shard_bytes=1 << 14)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(folder)))
    return config


def _write_backbone(folder: Path, *, seed: int, **changes: Any) -> Path:
    config = tiny_config(**{"vocab_size": 352, **changes})
    return write_hf(folder, config, random_tensors(config, seed))


def _config(folder: Path) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "steps": STEPS,
        "precision": "fp32",
        "device": "cpu",
        "micro_batches": 2,
        "log_every": 1,
        "decoder_schedule": "alternate",
        "deepspeed": str(ROOT / "ds_configs" / "cpu.json"),
        "encoder": {"backbone": str(folder / "encoder"), "num_layers": 2},
        "pooling": {"factors": [4]},
        "bridge": {"hidden_size": 24},
        "decoders": [
            {"name": "wide", "backbone": str(folder / "wide")},
            {"name": "other", "backbone": str(folder / "other")},
        ],
        "data": {
            "sources": [{"path": str(folder / "train")}],
            "validation": str(folder / "held_out"),
            "batch_size": 8,
            "reconstruction_share": 0.5,
            "max_context_tokens": 24,
            "max_prefix_tokens": 16,
            "max_continuation_tokens": 24,
            "num_workers": 1,
        },
        "optimizer": {"encoder_lr": 1e-3, "markers_lr": 1e-3, "bridge_lr": 3e-3, "warmup_steps": 4},
        "checkpoint": {"every": EVERY, "keep_last": 4},
        "validation": {"every": EVERY, "num_samples": 8, "batch_size": 4},
    }


def start_training(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    num_ranks: int = 1,
    env: Mapping[str, str] | None = None,
    hold_after: int | None = None,
) -> subprocess.Popen[str]:
    """Start `arc-ds train CONFIG ...` as a process. `stdout` contains its whole console output.

    hold_after: the step after which the ranks wait until they are stopped or killed.
    """
    module = "arc_ds.cli" if hold_after is None else "tests.helpers.held_train"
    command = [sys.executable, "-m", module, "train", str(config), f"--num-procs={num_ranks}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOLD_AFTER": str(hold_after), **(env or {})}
    environment.pop("MLFLOW_TRACKING_URI", None)
    # Runs must end with the tests, even if the tests crash.
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
    )


def train(config: Path, overrides: Sequence[str] = (), *, num_ranks: int = 1) -> tuple[int, str]:
    """Run `arc-ds train CONFIG ...` to its end and return exit code and console output."""
    process = start_training(config, overrides, num_ranks=num_ranks)
    console, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, console


def train_on_ranks(
    config: Path, overrides: Sequence[str] = (), *, num_ranks: int = 2, stop_after: int | None = None
) -> tuple[int, str]:
    """As `train`, but on the shared ranks, which saves the seconds of a start. Without data workers and MLflow.

    stop_after: the step after which rank 0 gets a stop signal. The run ends at the next step.
    """
    words = (*overrides, "data.num_workers=0", "tracking.mlflow=false")
    results = run_on_ranks(_train_on_rank, str(config), words, stop_after, num_ranks=num_ranks)
    (code,) = {code for code, _ in results}
    return code, results[0][1]


def _train_on_rank(config: str, overrides: tuple[str, ...], stop_after: int | None) -> tuple[int, str]:
    from arc_ds.train import train
    from arc_ds.training.build import build_run
    from arc_ds.training.hooks import Hook

    class SignalAfter(Hook):
        def after_step(self, run: Any, batch: Any, result: Any) -> None:
            if run.step == stop_after and dist.is_main():
                os.kill(os.getpid(), signal.SIGTERM)

    loaded, messages = load_config(config, overrides), BufferingHandler(capacity=10**6)
    logger = logging.getLogger("arc_ds")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(messages)
    try:
        code = train(loaded, build_run(loaded, torch.device("cpu")), [SignalAfter()])
    finally:
        logger.removeHandler(messages)
        logger.setLevel(level)
    return code, "\n".join(record.getMessage() for record in messages.buffer)


def numbers_by_step(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of each step in `metrics.jsonl`, except times. A duplicate key in a step is an error."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in read_metrics(run / METRICS_NAME):
        found = by_step.setdefault(entry.step, {})
        assert not found.keys() & entry.metrics.keys(), f"step {entry.step} was logged twice"
        found.update({k: v for k, v in entry.metrics.items() if k.startswith(NUMERIC) and k not in TIMED})
    return by_step


def losses(run: Path) -> list[float]:
    """The loss of each step from the first on. A missing step is an error."""
    by_step = {step: numbers["train/loss"] for step, numbers in numbers_by_step(run).items() if "train/loss" in numbers}
    assert sorted(by_step) == list(range(1, len(by_step) + 1)), f"steps are missing: {sorted(by_step)}"
    return [by_step[step] for step in sorted(by_step)]


def last_logged_step(run: Path) -> int:
    """The newest step in `metrics.jsonl`, or 0 if there is none yet."""
    path = run / METRICS_NAME
    return max((entry.step for entry in read_metrics(path)), default=0) if path.exists() else 0


def last_saved_step(run: Path) -> int:
    """The step of the newest checkpoint, or 0 if there is none."""
    return max((step_of(path) for path in list_checkpoints(run / "checkpoints")), default=0)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
