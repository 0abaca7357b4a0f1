"""Runs in MLflow: an sqlite store or a server.

MLflow's client makes one request for each metric of each run and one object for each point, which takes minutes for
a hundred runs. The points of an sqlite store are therefore read by SQL, from the table that MLflow 2 and 3 share.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import yaml
from tqdm import tqdm

from arc_ds.comparison.folders import DIGEST, as_text
from arc_ds.comparison.runs import ComparedRun, Curve, Floats, Steps, make_curve
from arc_ds.errors import DataError, StorageError
from arc_ds.system.packages import require
from arc_ds.tracking.database import for_mlflow, home, set_environment
from arc_ds.tracking.faults import remedy, words_of
from arc_ds.tracking.uris import sqlite_database, without_secret

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_RUNS_PER_PAGE = 1000
_THREADS = 8
_LARGEST = np.finfo(np.float64).max  # MLflow stores it in place of infinity
_DEEPSPEED, _CONFIG = "deepspeed.json", "config.yaml"
_OF_HOSTS = "system/"  # MLflow's metrics of hosts count samples, not steps
_POINTS = (
    "SELECT key, step, CASE WHEN is_nan THEN NULL ELSE value END, timestamp FROM metrics "
    f"WHERE run_uuid = ? AND key NOT LIKE '{_OF_HOSTS}%'"
)
_ROWS_AT_ONCE = 500


class Store(NamedTuple):
    """A tracking store. uri: its address, as MLflow takes it."""

    uri: str
    client: MlflowClient


def open_store(uri: str) -> Store:
    """Connect to a tracking store.

    uri: of a server or of a database.

    Raises StorageError if it does not answer, and if an sqlite file does not exist (MLflow would create it).
    """
    require("mlflow")
    database = sqlite_database(uri)
    if database is not None and not database.is_file():
        raise StorageError(
            f"{database}, the MLflow database to read, does not exist. Give the one of your runs with --tracking-uri, "
            "for example sqlite:///runs/mlflow.db, or compare the folders of the runs."
        )
    set_environment()
    with home():
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    store = Store(uri, MlflowClient(tracking_uri=for_mlflow(uri)))
    try:
        store.client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise StorageError(
            f"the MLflow store {without_secret(uri)} does not answer: {words_of(error)}. {remedy(error, uri)}".rstrip()
        ) from error
    return store


def runs_of_experiment(store: Store, name: str) -> list[Run]:
    """All runs of an experiment that were not deleted, oldest first.

    Raises DataError if the experiment does not exist, was deleted, or has no run.
    """
    found = store.client.get_experiment_by_name(name)
    if found is None:
        names = [each.name for each in store.client.search_experiments()]
        raise DataError(
            f"{without_secret(store.uri)} has no experiment {name!r}. {_nearest(name, names, 'experiments')}"
        )
    if found.lifecycle_stage != "active":
        raise DataError(
            f"the experiment {name!r} was deleted. Restore it: mlflow experiments restore --experiment-id "
            f"{found.experiment_id}"
        )
    runs = _search(store, [found.experiment_id])
    if not runs:
        raise DataError(
            f"the experiment {name!r} has no runs (deleted runs do not count). Train with tracking.experiment={name}, "
            "or name another experiment."
        )
    return runs[::-1]


def find_run(store: Store, text: str) -> Run:
    """The run with this id or this name.

    Raises DataError if there is none, if it was deleted, or if several runs have the name.
    """
    from mlflow.exceptions import MlflowException

    if _RUN_ID.fullmatch(text):
        try:
            run = store.client.get_run(text)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise DataError(
                f"{without_secret(store.uri)} has no run {text}: it was deleted for good, or belongs to another store. "
                "Give that store with --tracking-uri, or the folder of the run."
            ) from error
        if run.info.lifecycle_stage != "active":
            raise DataError(
                f"the run {text} was deleted. Restore it (mlflow runs restore --run-id {text}), or leave it out."
            )
        return run
    experiments = [each.experiment_id for each in store.client.search_experiments()]
    quoted = text.replace("'", "\\'")
    found = _search(store, experiments, f"attributes.run_name = '{quoted}'")
    if not found:
        names = [run.info.run_name for run in _search(store, experiments)]
        raise DataError(
            f"{text!r} is neither a folder here nor a run in {without_secret(store.uri)}. "
            f"{_nearest(text, names, 'runs')} A deleted run can be restored by its id: mlflow runs restore --run-id ID."
        )
    if len(found) > 1:
        listed = ", ".join(run.info.run_id for run in found[:5])
        raise DataError(f"{len(found)} runs have the name {text!r}. Give the ids of those that you mean: {listed}.")
    return found[0]


def read_runs(store: Store, runs: Sequence[Run]) -> list[ComparedRun]:
    """Read configs and all points of runs, with a progress bar. Raises StorageError if the store fails."""
    from mlflow.exceptions import MlflowException

    inputs = {run.info.run_id: run for run in runs}
    database = sqlite_database(store.uri)
    bar = tqdm(total=len(inputs), desc="read runs", unit="run", disable=None, leave=False)
    try:
        with bar, ThreadPoolExecutor(_THREADS) as pool:
            texts = dict(zip(inputs, pool.map(lambda run: _artifacts(store, run), runs), strict=True))
            if database is not None:
                return [_compared(run, texts[key], *_sqlite_points(database, key, bar)) for key, run in inputs.items()]
            return [_compared(run, texts[key], *_client_points(store, run, pool, bar)) for key, run in inputs.items()]
    except (MlflowException, sqlite3.Error, OSError) as error:
        raise StorageError(
            f"the MLflow store {without_secret(store.uri)} cannot be read: {words_of(error)}. "
            f"{remedy(error, store.uri)}Or compare the folders of the runs."
        ) from error


def log_files(store: Store, run_id: str, paths: Sequence[Path], name: str) -> None:
    """Log files as artifacts of a run, in the artifact folder `name`.

    Raises StorageError if the artifact store does not take them.
    """
    from mlflow.exceptions import MlflowException

    try:
        for path in paths:
            store.client.log_artifact(run_id, str(path), name)
    except (MlflowException, OSError) as error:
        raise StorageError(
            f"the comparison is whole, but the run {run_id} cannot store it: {words_of(error)}. Let this host write to "
            "the artifact store of that experiment, or log to a run of another one."
        ) from error


def _search(store: Store, experiments: list[str], filter_string: str = "") -> list[Run]:
    found: list[Run] = []
    token = None
    while True:
        page = store.client.search_runs(experiments, filter_string, max_results=_RUNS_PER_PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _nearest(wanted: str, names: Iterable[str], kind: str) -> str:
    """A sentence with the names nearest to the wanted one."""
    known = sorted(set(names))
    near = get_close_matches(wanted, known, n=5, cutoff=0.4) or known[:5]
    return f"Nearest {kind}: {', '.join(near)}." if near else f"It has no {kind}."


def _artifacts(store: Store, run: Run) -> dict[str, str]:
    """Texts of the run's config and of DeepSpeed's JSON, by file name. Missing ones are left out."""
    from mlflow.exceptions import MlflowException

    place = urlsplit(run.info.artifact_uri or "")
    found = {}
    for name in (_CONFIG, _DEEPSPEED):
        try:
            if place.scheme in ("", "file"):
                found[name] = (Path(unquote(place.path)) / name).read_text(encoding="utf-8")
                continue
            with tempfile.TemporaryDirectory(prefix="arc_ds_compare_") as folder:
                found[name] = Path(store.client.download_artifacts(run.info.run_id, name, folder)).read_text("utf-8")
        except (MlflowException, OSError, UnicodeDecodeError):
            continue  # the parameters hold the config, too
    return found


def _compared(run: Run, texts: Mapping[str, str], curves: dict[str, Curve], clock: Curve) -> ComparedRun:
    tags = run.data.tags
    inputs = [] if run.inputs is None else run.inputs.dataset_inputs
    digests = {f"{DIGEST}.{each.dataset.name}": each.dataset.digest for each in inputs}
    commit = {"commit": tags["mlflow.source.git.commit"]} if "mlflow.source.git.commit" in tags else {}
    own = {key: value for key, value in tags.items() if not key.startswith(("mlflow.", "changed.", "arc_ds."))}
    return ComparedRun(
        name=run.info.run_name or run.info.run_id[:8],
        source=run.info.run_id,
        config={**_config(run, texts), **digests},
        curves=curves,
        clock=clock,
        facts={"status": run.info.status, **commit, **own},
        notes=() if curves else ("It has no metrics.",),
    )


def _config(run: Run, texts: Mapping[str, str]) -> dict[str, str]:
    """The config of a run: its artifact, which is whole, or else its parameters, which MLflow limits in length."""
    deepspeed = _parsed(texts.get(_DEEPSPEED, ""), json.loads)
    tree = _parsed(texts.get(_CONFIG, ""), yaml.safe_load)
    if tree:
        return as_text(tree, deepspeed)
    changed = {key[8:]: value for key, value in run.data.tags.items() if key.startswith("changed.")}
    flat = {**run.data.params, **changed}
    if deepspeed:
        flat.pop("deepspeed", None)
    own = {key: "null" if value == "None" else value for key, value in flat.items()}
    return {**own, **(as_text({}, deepspeed) if deepspeed else {})}


def _parsed(text: str, parse: Any) -> dict[str, Any] | None:
    try:
        content = parse(text) if text else None
    except (ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _sqlite_points(database: Path, run_id: str, bar: tqdm) -> tuple[dict[str, Curve], Curve]:
    """The points of a run, from the table of an sqlite store."""
    keys: list[str] = []
    steps, values, stamps = array("q"), array("d"), array("q")
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        cursor = connection.execute(_POINTS, (run_id,))
        # In small parts: millions of rows at once would keep Python's garbage collector busy.
        while rows := cursor.fetchmany(_ROWS_AT_ONCE):
            part_keys, part_steps, part_values, part_stamps = zip(*rows, strict=True)
            keys += part_keys
            steps.extend(part_steps)
            values.extend(math.nan if value is None else value for value in part_values)
            stamps.extend(part_stamps)
    bar.update()
    idx_of = {key: idx for idx, key in enumerate(sorted(set(keys)))}
    key_N = np.fromiter(map(idx_of.__getitem__, keys), np.int64, len(keys))
    step_N, stamp_N = np.asarray(steps), np.asarray(stamps)
    value_N = _with_infinities(np.asarray(values))
    order = np.lexsort((stamp_N, key_N))
    ends = np.searchsorted(key_N[order], np.arange(len(idx_of) + 1))
    parts = {key: order[ends[idx] : ends[idx + 1]] for key, idx in idx_of.items()}
    curves = {key: make_curve(step_N[part], value_N[part]) for key, part in parts.items()}
    by_time = np.argsort(stamp_N, kind="stable")
    return curves, make_curve(step_N[by_time], stamp_N[by_time] / 1000)


def _client_points(store: Store, run: Run, pool: ThreadPoolExecutor, bar: tqdm) -> tuple[dict[str, Curve], Curve]:
    """The points of a run, by MLflow's client: one request for each metric."""
    curves, stamps = {}, defaultdict[int, int](int)
    keys = sorted(key for key in run.data.metrics if not key.startswith(_OF_HOSTS))
    histories = pool.map(lambda key: store.client.get_metric_history(run.info.run_id, key), keys)
    for key, history in zip(keys, histories, strict=True):
        points = sorted(history, key=lambda point: point.timestamp)
        steps: Steps = np.array([point.step for point in points], np.int64)
        values: Floats = np.array([point.value for point in points], np.float64)
        curves[key] = make_curve(steps, _with_infinities(values))
        for point in points:
            stamps[point.step] = max(stamps[point.step], point.timestamp)
    bar.update()
    return curves, make_curve(stamps, (stamp / 1000 for stamp in stamps.values()))


def _with_infinities(value_N: Floats) -> Floats:
    """Values with the infinities for which MLflow stores the largest numbers."""
    return np.where(np.abs(value_N) >= _LARGEST, np.copysign(np.inf, value_N), value_N)
