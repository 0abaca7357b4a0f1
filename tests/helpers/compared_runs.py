"""Small runs to compare, as objects, as folders and in an MLflow store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from arc_ds.comparison.runs import ComparedRun, make_curve

START = 1_790_000_000.0
Points = Mapping[str, Mapping[int, float]]


def make_run(name: str, points: Points, config: Mapping[str, str] | None = None, **fields: Any) -> ComparedRun:
    """A run of points {metric: {step: value}}. A step takes 2 s."""
    steps = sorted({step for values in points.values() for step in values})
    return ComparedRun(
        name=name,
        source=fields.pop("source", f"runs/{name}"),
        config={"seed": "0"} if config is None else config,
        curves={metric: make_curve(values, values.values()) for metric, values in points.items()},
        clock=make_curve(steps, [START + 2.0 * step for step in steps]),
        **fields,
    )


def falling(start: float, num_steps: int = 100) -> dict[int, float]:
    """A loss that falls from `start` towards 1."""
    steps = np.arange(1, num_steps + 1)
    return dict(zip(steps.tolist(), (1 + (start - 1) * np.exp(-steps / 20)).tolist(), strict=True))


def write_run(folder: Path, points: Points, config: Mapping[str, Any]) -> Path:
    """Write a run's folder as training does, and return it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(folder), **config}, sort_keys=False))
    steps = sorted({step for values in points.values() for step in values})
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines_of(points, steps)))
    return folder


def lines_of(points: Points, steps: Iterable[int]) -> list[str]:
    """Lines of `metrics.jsonl` for some steps."""
    return [
        json.dumps(
            {
                "step": step,
                "time": START + 2.0 * step,
                "metrics": {metric: values[step] for metric, values in points.items() if step in values},
            }
        )
        for step in steps
    ]
