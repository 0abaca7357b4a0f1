"""`arc-ds eval import`."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.datasets import find_task
from arc_ds.evaluation.protocol import CLEAN, REFERENCE
from arc_ds.evaluation.results import (
    NumberedLines,
    Prediction,
    add_prediction,
    parse_prediction,
    read_objects,
    read_results,
    write_results,
)
from arc_ds.evaluation.scoring import by_task
from arc_ds.system.files import whole_folder
from arc_ds.system.user_paths import path_argument
from arc_ds.version import __version__

HELP = "make a result folder of another program's predictions"

_MAX_NAMED = 3
# Fields that lines may leave out if a reference result or a dataset has them.
_SHARED = ("task", "references", "cluster", "group", "index")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.description = (
        "Each line of the file needs id, task, prediction and references. With --reference or --dataset, id and "
        "prediction suffice: the other fields come from there, every id must occur once, and references must agree."
    )
    parser.add_argument("predictions", type=path_argument, metavar="predictions.jsonl")
    parser.add_argument("--system", required=True, metavar="NAME", help="name of the system in tables")
    parser.add_argument("--out", required=True, type=path_argument, metavar="DIR", help="the result folder to write")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--reference", type=path_argument, metavar="RESULT", help="a result with the same questions")
    given.add_argument("--dataset", type=path_argument, metavar="FILE", help="the file or folder of --task")
    parser.add_argument("--task", help="name of the task; needed with --dataset, default for lines without the field")
    parser.add_argument(
        "--protocol", choices=("clean", "reference"), default="clean", help="how --dataset is read (default: clean)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    if namespace.out.exists() and not namespace.overwrite:
        raise ConfigError(f"{namespace.out} exists already. Give another folder to --out, or add --overwrite.")
    questions, run = _questions(namespace)
    predictions = _read(namespace.predictions, namespace.system, namespace.task, questions)
    with whole_folder(namespace.out, overwrite=namespace.overwrite) as folder:
        write_results(folder, predictions, run)
    tasks = ", ".join(f"{len(found)} of {task}" for task, found in by_task(predictions).items())
    print(f"{namespace.out}: {len(predictions)} predictions of {namespace.system} ({tasks})")
    return 0


Questions = Mapping[tuple[str, str], Prediction]


def _questions(namespace: argparse.Namespace) -> tuple[Questions | None, dict[str, Any]]:
    """The questions of the reference or dataset by task and id, without answers, and the content of `run.json`."""
    digest = hashlib.sha256(namespace.predictions.read_bytes()).hexdigest() if namespace.predictions.is_file() else ""
    run: dict[str, Any] = {
        "system": {"name": namespace.system, "kind": "import"},
        "source": {"path": str(namespace.predictions), "sha256": digest},
        "arc_ds": __version__,
    }
    if namespace.reference is not None:
        results = read_results(namespace.reference)
        if len(results) > 1:
            raise DataError(f"{namespace.reference} holds several systems; expected one. Give a file with one system.")
        if "data_digest" in results[0].run:
            run["data_digest"] = results[0].run["data_digest"]
        return {(each.task, each.id): each for each in results[0].predictions}, run
    if namespace.dataset is not None:
        if namespace.task is None:
            raise ConfigError("--dataset needs the name of its task. Add --task NAME.")
        return _samples(namespace.dataset, namespace.task, namespace.protocol), run
    return None, run


def _samples(path: Path, task: str, protocol: str) -> Questions:
    samples = find_task(task).read(path, CLEAN if protocol == "clean" else REFERENCE)
    return {
        (each.task, each.id): Prediction(
            id=each.id,
            task=each.task,
            prediction="",
            references=each.references,
            cluster=each.cluster,
            group=each.group,
            index=index,
        )
        for index, each in enumerate(samples)
    }


def _read(path: Path, system: str, task: str | None, questions: Questions | None) -> list[Prediction]:
    """The predictions of a file, checked against the questions if there are some."""
    found: NumberedLines = {}
    tasks_of: dict[str, list[str]] = {}
    for asked, name in sorted(questions or ()):
        tasks_of.setdefault(name, []).append(asked)
    for number, record in read_objects(path):
        where = f"{path}:{number}"
        if record.get("system") not in (None, "", system):
            raise DataError(
                f"{where}: the line is of system {record['system']!r}, but --system is {system!r}. Import each system "
                "from a file of its own."
            )
        if task is not None and record.get("task") is None:
            record = {**record, "task": task}
        record = _completed(record, where, questions, tasks_of)
        if record.get("index") is None:
            record["index"] = len(found)
        add_prediction(found, parse_prediction({**record, "system": system}, where), path, number)
    answered = {key[:2] for key in found}
    if questions is not None and (missing := [key for key in questions if key not in answered]):
        raise DataError(f"{path}: {len(missing)} of {len(questions)} ids are missing ({_names(missing)}). Add them.")
    return [prediction for _, prediction in found.values()]


def _completed(
    record: dict[str, Any], where: str, questions: Questions | None, tasks_of: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The line with the fields that it leaves out. Raises DataError if it contradicts its question.

    tasks_of: the tasks of each id.
    """
    if questions is None or record.get("id") is None or not isinstance(record.get("task") or "", str):
        return record  # `parse_prediction` names the fault
    name = str(record["id"])
    tasks = [record["task"]] if record.get("task") else tasks_of.get(name, ())
    question = questions.get((tasks[0], name)) if len(tasks) == 1 else None
    if question is None:
        problem = f"is in several tasks ({', '.join(tasks)})" if len(tasks) > 1 else "is not among the questions"
        raise DataError(
            f"{where}: the id {name!r} {problem}; expected ids such as {_names(questions)}. Correct the id, or add the "
            "field 'task'."
        )
    for field in ("references", "cluster", "group"):
        given, wanted = record.get(field), getattr(question, field)
        wanted = list(wanted) if field == "references" else wanted
        given = str(given) if isinstance(given, int) else given
        if given and wanted and given != wanted:
            raise DataError(
                f"{where}: {field!r} of id {name!r} is {given!r}, but {wanted!r} in the question. Remove the "
                "field, or give the result or dataset of the same questions."
            )
    shared = {field: getattr(question, field) for field in _SHARED}
    shared["references"] = list(question.references)
    return {**record, **shared}


def _names(keys: Iterable[tuple[str, str]]) -> str:
    names = [name for _, name in keys]
    return ", ".join(names[:_MAX_NAMED]) + (", …" if len(names) > _MAX_NAMED else "")
