"""The points of runs in MLflow.

MLflow's client makes one request for each metric of each run and one object for each point, which takes minutes for a
hundred runs. The points of an sqlite store are therefore read by SQL, from the table that MLflow 2 and 3 share. A
server gives the history of one metric for a hundred runs at once. MLflow's page of charts uses the same request, but
the client lacks it.
"""

from __future__ import annotations

import math
import sqlite3
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from arc_ds.comparison.runs import Curve, Floats, Steps, make_curve
from arc_ds.tracking.uris import sqlite_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LARGEST = np.finfo(np.float64).max  # MLflow stores it in place of infinity
_OF_HOSTS = "system/"  # MLflow's metrics of hosts count samples, not steps
_SQL = (
    "SELECT key, step, CASE WHEN is_nan THEN NULL ELSE value END, timestamp FROM metrics "
    f"WHERE run_uuid = ? AND key NOT LIKE '{_OF_HOSTS}%'"
)
_ROWS_AT_ONCE = 500
_BULK = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
_RUNS_PER_REQUEST, _POINTS_PER_REQUEST = 100, 25_000  # limits of MLflow's server
_BULK_TIMEOUT_S = 60.0


class History(NamedTuple):
    """The points of one metric of a run, in any order. stamps: milliseconds since the epoch."""

    steps: Steps
    values: Floats
    stamps: Steps


class Points(NamedTuple):
    """The points of a run: a curve for each metric, and the clock (seconds since the epoch by step)."""

    curves: dict[str, Curve]
    clock: Curve


def read_points(client: MlflowClient, uri: str, runs: Sequence[Run], pool: Executor, bar: tqdm) -> list[Points]:
    """The points of each run.

    uri: of the store.
    pool: makes the requests to a server.
    bar: moves on by one for each run.

    Raises the errors of MLflow, of sqlite and of the network.
    """
    database = sqlite_database(uri)
    if database is not None:
        found = []
        for run in runs:
            found.append(_points(_by_sql(database, run.info.run_id)))
            bar.update()
        return found
    keys = {run.info.run_id: [key for key in run.data.metrics if not key.startswith(_OF_HOSTS)] for run in runs}
    histories: dict[str, dict[str, History]] = {run_id: {} for run_id in keys}
    num_left = {run_id: len(own) for run_id, own in keys.items()}
    bar.update(sum(not num for num in num_left.values()))
    for run_id, key, history in _from_server(client, uri, keys, pool):
        histories[run_id][key] = history
        num_left[run_id] -= 1
        bar.update(num_left[run_id] == 0)
    return [_points(histories[run.info.run_id]) for run in runs]


def _by_sql(database: Path, run_id: str) -> dict[str, History]:
    keys: list[str] = []
    steps, values, stamps = array("q"), array("d"), array("q")
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        cursor = connection.execute(_SQL, (run_id,))
        # In small parts: millions of rows at once would keep Python's garbage collector busy.
        while rows := cursor.fetchmany(_ROWS_AT_ONCE):
            part_keys, part_steps, part_values, part_stamps = zip(*rows, strict=True)
            keys += part_keys
            steps.extend(part_steps)
            values.extend(math.nan if value is None else value for value in part_values)
            stamps.extend(part_stamps)
    idx_of = {key: idx for idx, key in enumerate(sorted(set(keys)))}
    key_N = np.fromiter(map(idx_of.__getitem__, keys), np.int64, len(keys))
    columns = [np.asarray(column) for column in (steps, values, stamps)]
    order = np.argsort(key_N, kind="stable")
    ends = np.searchsorted(key_N[order], np.arange(len(idx_of) + 1))
    return {
        key: History(*(column[order[ends[idx] : ends[idx + 1]]] for column in columns)) for key, idx in idx_of.items()
    }


def _from_server(
    client: MlflowClient, uri: str, keys: Mapping[str, Sequence[str]], pool: Executor
) -> Iterator[tuple[str, str, History]]:
    """Run, metric and history of all metrics. keys: names of the metrics of each run."""
    runs_of = defaultdict[str, list[str]](list)
    for run_id in sorted(keys):
        for key in keys[run_id]:
            runs_of[key].append(run_id)
    jobs = [
        (key, run_ids[start : start + _RUNS_PER_REQUEST])
        for key, run_ids in sorted(runs_of.items())
        for start in range(0, len(run_ids), _RUNS_PER_REQUEST)
    ]
    for (key, _), found in zip(jobs, pool.map(lambda job: _in_bulk(client, uri, *job), jobs), strict=True):
        for run_id, history in found.items():
            yield run_id, key, history


def _in_bulk(client: MlflowClient, uri: str, key: str, run_ids: Sequence[str]) -> dict[str, History]:
    """The history of a metric for runs, sorted by id. A full answer ends within a run, which is asked for again."""
    found: dict[str, History] = {}
    waiting = list(run_ids)
    while waiting:
        points = _request(uri, key, waiting)
        if points is None:
            return found | {run_id: _one(client, run_id, key) for run_id in waiting}
        is_full = len(points) >= _POINTS_PER_REQUEST
        whole = waiting[: waiting.index(points[-1]["run_id"])] if is_full else waiting
        if not whole:  # the first run alone has more points than an answer
            found[waiting[0]] = _one(client, waiting[0], key)
            waiting = waiting[1:]
            continue
        by_run = {run_id: list(own) for run_id, own in groupby(points, key=lambda point: point["run_id"])}
        for run_id in whole:
            rows = by_run.get(run_id, [])
            found[run_id] = _history([(point["step"], point["value"], point["timestamp"]) for point in rows])
        waiting = waiting[len(whole) :]
    return found


def _request(uri: str, key: str, run_ids: Sequence[str]) -> list[dict[str, Any]] | None:
    """Points of a metric by run and then by time, as many as one answer holds; None if the store gives no answer."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    if not uri.startswith(("http:", "https:")):
        return None
    wanted = [("metric_key", key), ("max_results", str(_POINTS_PER_REQUEST)), *(("run_id", each) for each in run_ids)]
    response = http_request(get_default_host_creds(uri), _BULK, "GET", params=wanted, timeout=_BULK_TIMEOUT_S)
    if response.status_code != 200:
        return None
    try:
        return list(response.json()["metrics"])
    except (ValueError, KeyError, TypeError):  # the page of a proxy
        return None


def _one(client: MlflowClient, run_id: str, key: str) -> History:
    points = client.get_metric_history(run_id, key)
    return _history([(point.step, point.value, point.timestamp) for point in points])


def _history(rows: Sequence[tuple[int, float, int]]) -> History:
    """rows: step, value and stamp of each point."""
    steps, values, stamps = zip(*rows, strict=True) if rows else ((), (), ())
    return History(np.array(steps, np.int64), np.array(values, np.float64), np.array(stamps, np.int64))


def _points(histories: Mapping[str, History]) -> Points:
    curves = {}
    for key, (step_N, value_N, stamp_N) in sorted(histories.items()):
        order = np.argsort(stamp_N, kind="stable")
        curves[key] = make_curve(step_N[order], _with_infinities(value_N)[order])
    step_N, stamp_N = (
        np.concatenate([getattr(each, name) for each in histories.values()] or [np.zeros(0, np.int64)])
        for name in ("steps", "stamps")
    )
    # The first point of a step tells when it was done. An evaluation of its checkpoint may come days later.
    order = np.argsort(stamp_N, kind="stable")[::-1]
    return Points(curves, make_curve(step_N[order], stamp_N[order] / 1000))


def _with_infinities(value_N: Floats) -> Floats:
    """Values with the infinities for which MLflow stores the largest numbers."""
    return np.where(np.abs(value_N) >= _LARGEST, np.copysign(np.inf, value_N), value_N)
