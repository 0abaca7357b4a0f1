"""Arguments of `arc-ds compare` as runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from arc_ds.comparison.evaluation import is_result_folder
from arc_ds.comparison.folders import find_run_folders, read_run_folder
from arc_ds.comparison.mlflow_runs import Store, find_run, open_store, read_runs, runs_of_experiment
from arc_ds.comparison.runs import ComparedRun, with_unique_names
from arc_ds.errors import ConfigError, DataError
from arc_ds.system.user_paths import user_path
from arc_ds.tracking.tracking_state import recorded
from arc_ds.tracking.uris import DATABASE, database_of, default_folders, default_store, sqlite_uri


class Inputs(NamedTuple):
    """Named inputs. runs: runs with unique names. results: result folders of evaluations."""

    runs: tuple[ComparedRun, ...]
    results: tuple[Path, ...]


def find_inputs(names: Sequence[str], experiment: str | None, uri: str | None) -> Inputs:
    """Read all runs that the arguments name, in their order and then those of the experiment, each once.

    A run that is named by its folder and in MLflow is read from its folder.

    names: folders of runs, folders that hold runs, result folders, ids or names of runs in MLflow.
    experiment: name of an experiment in MLflow.
    uri: tracking store, see `find_store`.

    Raises DataError if a name is unknown, and ConfigError if there is no store to look it up in.
    """
    paths = {name: Path(user_path(name)) for name in names}
    results = [path for path in paths.values() if is_result_folder(path)]
    folders = {name: find_run_folders(path) for name, path in paths.items() if path.exists() and path not in results}
    places = {place.resolve(): place for found in folders.values() for place in found}
    known = {recorded(place, "run_id") for place in places}
    unknown = [name for name, path in paths.items() if not path.exists()]
    stored = {}
    if unknown or experiment is not None:
        store = find_store(uri, unknown)
        wanted = {name: [find_run(store, name)] for name in unknown}
        if experiment is not None:
            wanted[""] = runs_of_experiment(store, experiment)
        wanted = {name: [run for run in found if run.info.run_id not in known] for name, found in wanted.items()}
        flat = {run.info.run_id: run for found in wanted.values() for run in found}
        read = dict(zip(flat, read_runs(store, list(flat.values())), strict=True))
        stored = {name: [read[run.info.run_id] for run in found] for name, found in wanted.items()}
    bar = tqdm(places.items(), desc="read runs", unit="run", disable=None, leave=False)
    by_place = {resolved: read_run_folder(place) for resolved, place in bar}
    in_order = {name: [by_place[place.resolve()] for place in found] for name, found in folders.items()} | stored
    runs = list({run.source: run for name in (*paths, "") for run in in_order.get(name, ())}.values())
    labels = with_unique_names([(run.name, run.source) for run in runs])
    return Inputs(tuple(replace(run, name=label) for run, label in zip(runs, labels, strict=True)), tuple(results))


def find_store(uri: str | None, wanted: Sequence[str] = ()) -> Store:
    """Open the tracking store: `uri`, else that of MLFLOW_TRACKING_URI, else the first of `default_folders`.

    uri: address, database, or folder of runs.
    wanted: names of runs, for the error.

    Raises ConfigError if there is none (DataError if names are given), and StorageError if it does not answer.
    """
    path = Path(user_path(uri or ""))
    if uri and path.is_file():
        return open_store(sqlite_uri(path.resolve()))
    if uri and not path.is_dir():
        return open_store(user_path(uri))
    folders = [path] if uri else default_folders()
    found = default_store() if not uri else (database := database_of(path)) and sqlite_uri(database)
    if found:
        return open_store(found)
    subject = f"no folder {wanted[0]!r} exists here, and no MLflow store" if wanted else "no MLflow store"
    looked = ", ".join(str(folder / DATABASE) for folder in folders)
    own = next((each for folder in folders for each in sorted(folder.glob(f"*/{DATABASE}"))), None)
    if own is not None:
        remedy = (
            f"Each run in {own.parents[1]} has a store of its own: compare the folders of the runs, or name one store, "
            f"such as --tracking-uri {own.parent}."
        )
    else:
        remedy = (
            "Give the folder of the run, or the store with --tracking-uri, such as sqlite:///runs/mlflow.db or "
            "http://host:5000."
        )
    raise (DataError if wanted else ConfigError)(f"{subject} was found (looked for {looked}). {remedy}")
