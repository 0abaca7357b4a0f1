"""Runs in MLflow: found by id, name or experiment, and read with their config, points and facts."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import yaml
from tqdm import tqdm

from arc_ds.comparison.folders import as_text, digests_by_name, split_tags
from arc_ds.comparison.mlflow_points import Points, read_points
from arc_ds.comparison.runs import ComparedRun
from arc_ds.errors import DataError, StorageError
from arc_ds.tracking.database import artifact_folder, open_client, paged
from arc_ds.tracking.faults import explained, words_of
from arc_ds.tracking.liveness import life_of_run
from arc_ds.tracking.mlflow_server import FOLDER_TAG, PARAM_CHARS, TAG_CHARS
from arc_ds.tracking.uris import is_filled, sqlite_database, without_secret

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_RUNS_PER_PAGE = 1000
_THREADS = 8
_DEEPSPEED, _CONFIG = "deepspeed.json", "config.yaml"


class Store(NamedTuple):
    """A tracking store. uri: its address, as MLflow takes it."""

    uri: str
    client: MlflowClient


def open_store(uri: str) -> Store:
    """Connect to a tracking store.

    uri: of a server or of a database.

    Raises StorageError if it does not answer, and if an sqlite file does not exist (MLflow would create it).
    """
    database = sqlite_database(uri)
    if database is not None and not is_filled(database):
        raise StorageError(
            f"{database}, the MLflow database to read, does not exist or is empty. Give the one of your runs with "
            "--tracking-uri, for example sqlite:///runs/mlflow.db, or compare the folders of the runs."
        )
    with explained(uri, "no MLflow store answers", StorageError):
        store = Store(uri, open_client(uri))
        store.client.search_experiments(max_results=1)
    return store


def runs_of_experiment(store: Store, name: str) -> list[Run]:
    """All runs of an experiment that were not deleted, oldest first.

    Raises DataError if the experiment does not exist, was deleted, or has no run, and StorageError if the store fails.
    """
    with _reading(store):
        found = store.client.get_experiment_by_name(name)
        if found is None:
            names = [each.name for each in paged(store.client.search_experiments)]
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

    Raises DataError if there is none, if it was deleted, or if several runs have the name, and StorageError if the
    store fails.
    """
    with _reading(store):
        return _run_of_id(store, text) if _RUN_ID.fullmatch(text) else _run_of_name(store, text)


def _run_of_id(store: Store, run_id: str) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        run = store.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise DataError(
            f"{without_secret(store.uri)} has no run {run_id}: it was deleted for good, or belongs to another store. "
            "Give that store with --tracking-uri, or the folder of the run."
        ) from error
    if run.info.lifecycle_stage != "active":
        raise DataError(
            f"the run {run_id} was deleted. Restore it (mlflow runs restore --run-id {run_id}), or leave it out."
        )
    return run


def _run_of_name(store: Store, name: str) -> Run:
    experiments = [each.experiment_id for each in paged(store.client.search_experiments)]
    quote = '"' if "'" in name else "'"  # MLflow's filters have no escapes
    wanted = "" if quote in name else f"attributes.run_name = {quote}{name}{quote}"
    found = [run for run in _search(store, experiments, wanted) if run.info.run_name == name]
    if not found:
        names = [run.info.run_name for run in _search(store, experiments)]
        raise DataError(
            f"{name!r} is neither a folder here nor a run in {without_secret(store.uri)}. "
            f"{_nearest(name, names, 'runs')} A deleted run can be restored by its id: mlflow runs restore --run-id ID."
        )
    if len(found) > 1:
        listed = ", ".join(run.info.run_id for run in found[:5])
        raise DataError(f"{len(found)} runs have the name {name!r}. Give the ids of those that you mean: {listed}.")
    return found[0]


def read_runs(store: Store, runs: Sequence[Run]) -> list[ComparedRun]:
    """Read configs and all points of different runs, with a progress bar. Raises StorageError if the store fails."""
    bar = tqdm(total=len(runs), desc="read runs", unit="run", disable=None, leave=False)
    with bar, ThreadPoolExecutor(_THREADS) as pool, _reading(store):
        points = read_points(store.client, store.uri, runs, pool, bar)  # first, because they end at a dead server
        texts = list(pool.map(lambda run: _artifacts(store, run), runs))
    database = sqlite_database(store.uri)
    return [_compared(*each, database) for each in zip(runs, texts, points, strict=True)]


def _reading(store: Store) -> AbstractContextManager[None]:
    return explained(store.uri, "the MLflow store cannot be read", StorageError)


def log_files(store: Store, run_id: str, paths: Sequence[Path], name: str) -> None:
    """Log files as artifacts of a run, in the artifact folder `name`.

    Raises StorageError if the artifact store does not take them.
    """
    try:
        for path in paths:
            store.client.log_artifact(run_id, str(path), name)
    except Exception as error:  # the drivers of artifact stores share no class of errors
        raise StorageError(
            f"the comparison is whole, but the run {run_id} cannot store it: {words_of(error)}. Let this host write to "
            "the artifact store of that experiment, or log to a run of another one."
        ) from error


def _search(store: Store, experiments: list[str], filter_string: str = "") -> list[Run]:
    return list(paged(store.client.search_runs, experiments, filter_string, max_results=_RUNS_PER_PAGE))


def _nearest(wanted: str, names: Iterable[str], kind: str) -> str:
    """A sentence with the names nearest to the wanted one."""
    known = sorted(set(names))
    near = get_close_matches(wanted, known, n=5, cutoff=0.4) or known[:5]
    return f"Nearest {kind}: {', '.join(near)}." if near else f"It has no {kind}."


def _artifacts(store: Store, run: Run) -> dict[str, str]:
    """Texts of DeepSpeed's JSON and of the config, by file name. Missing ones are left out.

    The parameters hold the config, too, so it is read only if MLflow's limit of their length may have cut one.
    """
    place, database = urlsplit(run.info.artifact_uri or ""), sqlite_database(store.uri)
    longest = max((len(value) for value in _parameters(run).values()), default=PARAM_CHARS)
    found = {}
    for name in (_DEEPSPEED, *([_CONFIG] if longest >= TAG_CHARS else [])):
        with suppress(Exception):  # the drivers of artifact stores share no class of errors
            if place.scheme in ("", "file"):
                path = Path(unquote(place.path)) / name
                if database is not None and not path.is_file():  # the folder of the runs was moved
                    path = artifact_folder(database) / run.info.run_id / "artifacts" / name
                found[name] = path.read_text(encoding="utf-8")
            else:
                with tempfile.TemporaryDirectory(prefix="arc_ds_compare_") as made:
                    downloaded = store.client.download_artifacts(run.info.run_id, name, made)
                    found[name] = Path(downloaded).read_text(encoding="utf-8")
    return found


def _compared(run: Run, texts: Mapping[str, str], points: Points, database: Path | None) -> ComparedRun:
    tags = run.data.tags
    inputs = [] if run.inputs is None else run.inputs.dataset_inputs
    digests = digests_by_name((each.dataset.name, each.dataset.digest) for each in inputs)
    own_facts, own_inputs = split_tags(tags)
    status, notes = run.info.status, () if points.curves else ("It has no metrics.",)
    life = life_of_run(run.info.run_id, tags.get(FOLDER_TAG, ""), database) if status == "RUNNING" else None
    if life is not None and life.status != "RUNNING":
        status, notes = life.status, (*notes, f"MLflow shows it as RUNNING, but {life.words}")
    return ComparedRun(
        name=run.info.run_name or run.info.run_id[:8],
        source=run.info.run_id,
        config={**_config(run, texts), **digests, **own_inputs},
        curves=points.curves,
        clock=points.clock,
        facts={"status": status, **own_facts},
        notes=notes,
    )


def _config(run: Run, texts: Mapping[str, str]) -> dict[str, str]:
    """The config of a run: its artifact, which is whole, or else its parameters, which MLflow limits in length."""
    deepspeed = _parsed(texts.get(_DEEPSPEED, ""), json.loads)
    tree = _parsed(texts.get(_CONFIG, ""), yaml.safe_load)
    if tree:
        return as_text(tree, deepspeed)
    flat = _parameters(run)
    if deepspeed:
        flat.pop("deepspeed", None)
    own = {key: "null" if value == "None" else value for key, value in flat.items()}
    return {**own, **(as_text({}, deepspeed) if deepspeed else {})}


def _parameters(run: Run) -> dict[str, str]:
    """The parameters of the run's last start. Those that differ from its first start are tags."""
    changed = {key[8:]: value for key, value in run.data.tags.items() if key.startswith("changed.")}
    return {**run.data.params, **changed}


def _parsed(text: str, parse: Any) -> dict[str, Any] | None:
    try:
        content = parse(text) if text else None
    except (ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
