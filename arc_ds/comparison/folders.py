"""Runs in folders: `config.yaml`, `metrics.jsonl` and, for newer runs, `facts.json`."""

from __future__ import annotations

import json
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from arc_ds.comparison.runs import ComparedRun, Curve, make_curve
from arc_ds.config.load import flatten_tree
from arc_ds.errors import DataError
from arc_ds.system.user_files import read_user_text
from arc_ds.tracking.liveness import FACTS_NAME, life_of
from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics
from arc_ds.tracking.mlflow_server import DIGEST_CHARS, HELD_OUT

CONFIG_NAME = "config.yaml"
DIGEST = "digest"
_COMMIT = "mlflow.source.git.commit"


def find_run_folders(path: Path) -> list[Path]:
    """The run at a path, or else all runs in the folders directly in it, sorted by name.

    Raises DataError if there are none.
    """
    if is_run(path):
        return [path]
    found = sorted(each for each in path.iterdir() if each.is_dir() and is_run(each)) if path.is_dir() else []
    if not found:
        held = ", ".join(sorted(each.name for each in path.iterdir())[:5]) if path.is_dir() else "a file"
        raise DataError(
            f"{path} is no run and holds none: a run's folder has {METRICS_NAME}; found "
            f"{held or 'nothing'}. Give the run_dir of a run, or the folder that holds several."
        )
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: it has metrics, or the config of a run that has not logged any."""
    if (folder / METRICS_NAME).is_file():
        return True
    config = folder / CONFIG_NAME
    return config.is_file() and any(
        line.startswith("run_dir:") for line in config.read_text("utf-8", "replace").splitlines()
    )


def read_run_folder(folder: Path) -> ComparedRun:
    """Read a run. An incomplete last line of its metrics is left out; damage before it becomes a note.

    Raises DataError if its config cannot be read.
    """
    curves, clock, notes = read_curves(folder / METRICS_NAME)
    facts = _read_facts(folder / FACTS_NAME)
    config = _read_config(folder, facts)
    digests = [(Path(name).name or name, digest) for name, digest in _section(facts, "datasets").items()]
    if isinstance(held_out := facts.get("held_out"), str):
        digests.append((HELD_OUT, held_out))
    own_facts, inputs = split_tags(_section(facts, "tags"))
    life = life_of(folder)
    if life.status in ("DEAD", "SILENT"):
        notes.append(f"It was killed or lost: {life.words}")
    is_whole = len(clock.steps) > 0 and str(clock.steps[-1]) == config.get("steps")
    return ComparedRun(
        name=folder.resolve().name,
        source=str(folder),
        config={**config, **digests_by_name(digests), **inputs},
        curves=curves,
        clock=clock,
        facts={"status": "FINISHED" if is_whole and life.status == "STOPPED" else life.status, **own_facts},
        notes=tuple(notes),
    )


def split_tags(tags: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The tags of a run as facts, without those of MLflow and of the tracker, and as digests of its inputs."""
    commit = {"commit": tags[_COMMIT]} if _COMMIT in tags else {}
    own = {key: value for key, value in tags.items() if not key.startswith(("mlflow.", "changed.", "arc_ds."))}
    inputs = {key: own.pop(key) for key in list(own) if key.startswith(f"{DIGEST}.")}
    return {**commit, **own}, inputs


def digests_by_name(digests: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Keys of a config for digests of data. Different data of one name share a key.

    digests: name and digest of each dataset.
    """
    found: dict[str, list[str]] = {}
    for name, digest in digests:
        found.setdefault(f"{DIGEST}.{name}", []).append(digest[:DIGEST_CHARS])  # as in MLflow, which limits them
    return {key: " + ".join(sorted(each)) for key, each in found.items()}


def read_curves(path: Path) -> tuple[dict[str, Curve], Curve, list[str]]:
    """Read metrics, their clock (seconds since the epoch by step), and sentences about faults of the file.

    A step that occurs twice, as in files that were joined, counts once, with its last values.
    """
    steps: dict[str, array[int]] = defaultdict(lambda: array("q"))
    values: dict[str, array[float]] = defaultdict(lambda: array("d"))
    clock_steps, times = array("q"), array("d")
    end = 0
    if path.is_file():
        for entry in read_metrics(path):
            end = entry.end
            clock_steps.append(entry.step)
            times.append(entry.time)
            for name, value in entry.metrics.items():
                steps[name].append(entry.step)
                values[name].append(value)
    curves = {name: make_curve(np.asarray(steps[name]), np.asarray(values[name])) for name in sorted(steps)}
    clock = make_curve(np.asarray(clock_steps), np.asarray(times))
    notes = [] if curves else ["It has no metrics."]
    if path.is_file() and (lost := _lines_after(path, end)) > 0:
        notes.append(f"{METRICS_NAME} is damaged at byte {end:,}; {lost} later line(s) are left out.")
    return curves, clock, notes


def _lines_after(path: Path, start: int) -> int:
    """Complete lines from byte `start` on. An incomplete last line is not counted: the run may be writing it."""
    with path.open("rb") as file:
        file.seek(start)
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _section(facts: dict[str, Any], name: str) -> dict[str, str]:
    found = facts.get(name)
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _read_facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _read_config(folder: Path, facts: dict[str, Any]) -> dict[str, str]:
    """The flat config. The text of DeepSpeed's JSON replaces its path, if the file is known."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return {}
    text = read_user_text(path, DataError, remedy="Copy the run's folder again.")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Restore the file.") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds no config: expected keys and values. Restore the file.")
    written = facts.get("deepspeed")
    if written is None and isinstance(tree.get("deepspeed"), str):
        written = _read_facts(Path(tree["deepspeed"])) or None
    return as_text(tree, written)


def as_text(tree: dict[str, Any], deepspeed: dict[str, Any] | None) -> dict[str, str]:
    """A config by flat key, as text. deepspeed: DeepSpeed's JSON, or None if only its path is known."""
    tree = {**tree, "deepspeed": deepspeed} if deepspeed else tree
    return {key: "null" if value is None else str(value) for key, value in flatten_tree(tree).items()}
