"""Result files of an evaluation.

A folder holds `predictions.jsonl`, one `Prediction` a line, sorted by task and index, and `run.json`, a JSON object
with the config, the protocol's fields, digests, versions, dtype, device and metric signatures. Times stand in
`times.json`, since they are not reproducible. Scores are computed from `predictions.jsonl` alone, at any time, by any
process.

One file or folder of one system is a `ResultFile`. A `SystemResults` is a system with one result file for each training
seed. Of `run.json`, scores and comparisons read `protocol` (the protocol's fields) and `data_digest` (text, or one text
for each task), if it has them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.shards.records import decode_object
from arc_ds.system.files import write_whole
from arc_ds.system.user_files import HEAD, check_downloaded, check_encodable, check_is_utf8, read_user_json

PREDICTIONS, RUN, TIMES = "predictions.jsonl", "run.json", "times.json"
SEEDS_NOTE = (
    "Intervals, errors and p-values include the spread of training seeds if a system has three or more. Otherwise they "
    "hold for its seeds."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One line of `predictions.jsonl`. Files of other programs need `id`, `task`, `prediction` and `references` only.

    id: id of the question, unique within task and system. Several sampled answers to it differ in `seed`.
    task: name of a task, or "qa", "summary", "translation" for a user's own data.
    prediction: the answer.
    references: all accepted answers.
    cluster: samples of one cluster are not independent. Its default is the id.
    group: samples of one group make one score of a corpus metric.
    system: name of the system.
    decoder: name of the decoder.
    index: place of the sample in its file.
    raw: the answer before it was cut.
    stop: "string", "eos" or "length".
    lengths: counts, see `systems.system.Answer`.
    nll: {"nats", "tokens"} of the first reference.
    prompt_sha: sha256 of the prompt's parts.
    seed: seed of sampling and examples.
    others: fields of the line that are not named here. They are kept.
    """

    id: str
    task: str
    prediction: str
    references: tuple[str, ...]
    cluster: str = ""
    group: str = ""
    system: str = ""
    decoder: str = ""
    index: int = 0
    raw: str | None = None
    stop: str | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)
    nll: Mapping[str, float] | None = None
    prompt_sha: str = ""
    seed: int = 0
    others: Mapping[str, Any] = field(default_factory=dict)


NumberedLines = dict[tuple[str, str, int], tuple[int, Prediction]]  # line and prediction by task, id and seed


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFile:
    """The answers of one system in one file.

    path: the file or folder that was named.
    system: name of the system in the lines; empty if they have none.
    predictions: its answers, in the file's order.
    run: content of `run.json`; empty for a file without one.
    """

    path: Path
    system: str
    predictions: tuple[Prediction, ...]
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The protocol's fields; empty if they are unknown."""
        return self.run.get("protocol") or {}

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Numbers of samples that were not asked, by reason and task."""
        reasons = self.run.get("skipped")
        return {reason: self._numbers(of) for reason, of in reasons.items()} if isinstance(reasons, dict) else {}

    @property
    def shortened(self) -> dict[str, int]:
        """Numbers of samples with a shortened document, by task."""
        return self._numbers(self.run.get("shortened"))

    @property
    def description(self) -> Mapping[str, Any]:
        """The description of the system; empty if it is unknown."""
        return self._own(self.run.get("systems"))

    def _numbers(self, systems: Any) -> dict[str, int]:
        """The numbers of this system by task, which `run.json` states as numbers or as lists of ids."""
        counts = {task: len(each) if isinstance(each, list) else each for task, each in self._own(systems).items()}
        return {task: each for task, each in counts.items() if isinstance(each, int)}

    def _own(self, systems: Any) -> Mapping[str, Any]:
        """The entry of this system in a part of `run.json`, which may be of another program."""
        own = systems.get(self.system) if isinstance(systems, dict) else None
        return own if isinstance(own, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResults:
    """A system with the result file of each training seed.

    name: its name in tables, unique among the systems that were read together.
    seeds: one result file for each training seed.
    """

    name: str
    seeds: tuple[ResultFile, ...]

    @property
    def predictions(self) -> list[Prediction]:
        """The answers of all training seeds."""
        return [each for file in self.seeds for each in file.predictions]


def read_systems(arguments: Sequence[str]) -> list[SystemResults]:
    """Read result files for a table or a comparison.

    arguments: one text for each file or folder. "A,B,C" is one system whose training seeds are these files.

    A file may hold several systems, told apart by the field `system`. A system is named by that field, or else by its
    file or folder; if two have the same name, they are named by their paths. Raises DataError if a file cannot be read,
    if a file of several seeds holds several systems, or if one file is named as two seeds.
    """
    found: list[tuple[ResultFile, ...]] = []
    for argument in arguments:
        paths = [argument] if os.path.exists(argument) else argument.split(",")  # False, no error, for a long list
        if len({Path(path).resolve() for path in paths if path}) < len(paths):
            raise DataError(
                f"{argument} names a file twice, or none between two commas; expected one file for each training seed. "
                "Correct the list."
            )
        files = [read_results(Path(path)) for path in paths]
        if len(files) == 1:
            found += [(file,) for file in files[0]]
            continue
        for path, systems in zip(paths, files, strict=True):
            if len(systems) > 1:
                names = ", ".join(file.system or "(no name)" for file in systems)
                raise DataError(
                    f"{path} holds several systems ({names}); expected one, because it is named as one of several "
                    "training seeds. Write each system into a file of its own."
                )
        found.append(tuple(systems[0] for systems in files))
    return [SystemResults(name=name, seeds=seeds) for name, seeds in zip(_names(found), found, strict=True)]


def select_tasks(systems: Sequence[SystemResults], tasks: Sequence[str]) -> list[SystemResults]:
    """The systems with these tasks only. Raises DataError if a file lacks one of them."""

    def selected(file: ResultFile) -> ResultFile:
        found = sorted({each.task for each in file.predictions})
        if missing := [task for task in tasks if task not in found]:
            raise DataError(
                f"{file.path} has no answers to {', '.join(missing)}; it has {', '.join(found)}. Correct --tasks."
            )
        return dataclasses.replace(file, predictions=tuple(each for each in file.predictions if each.task in tasks))

    return [dataclasses.replace(system, seeds=tuple(map(selected, system.seeds))) for system in systems]


def _names(found: Sequence[tuple[ResultFile, ...]]) -> list[str]:
    """Unique names: the systems' own, else their files', else both with the path and a number."""
    own = [seeds[0].system or _stem(seeds[0].path) for seeds in found]
    paths = [f"{name} ({seeds[0].path})" for name, seeds in zip(own, found, strict=True)]
    names = [name if own.count(name) == 1 else path for name, path in zip(own, paths, strict=True)]
    return [name if names.count(name) == 1 else f"{name} #{place}" for place, name in enumerate(names, 1)]


def _stem(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name == PREDICTIONS else path.stem if path.is_file() else path.name


def read_results(path: Path) -> list[ResultFile]:
    """Read a result folder or a file of `Prediction` lines: one `ResultFile` for each system in it.

    Raises DataError, with file and line, for a line that is not a `Prediction`, and for an id that a system gives twice
    in one task.
    """
    file = path / PREDICTIONS if path.is_dir() else path
    systems: dict[str, NumberedLines] = {}
    for number, record in read_objects(file):
        prediction = parse_prediction(record, f"{file}:{number}")
        add_prediction(systems.setdefault(prediction.system, {}), prediction, file, number)
    run = read_run(file.parent) if file.name == PREDICTIONS else {}
    return [
        ResultFile(path=path, system=name, predictions=tuple(each for _, each in lines.values()), run=run)
        for name, lines in systems.items()
    ]


def add_prediction(lines: NumberedLines, prediction: Prediction, file: Path, number: int) -> None:
    """Add a prediction to those of its system. Raises DataError if they have its task, id and seed already.

    lines: the system's predictions of earlier lines.
    file, number: file and line, for the error.
    """
    first = lines.setdefault((prediction.task, prediction.id, prediction.seed), (number, prediction))
    if first[0] != number:
        raise DataError(
            f"{file}:{number}: the id {prediction.id!r} of task {prediction.task!r} is on line {first[0]} already. "
            "Remove one of both lines; lines of several systems need the field 'system', and sampled answers to one "
            "question the field 'seed'."
        )


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a JSONL file: line numbers and objects. Blank lines are skipped.

    Raises DataError for a file that cannot be read or has no lines, and for a line that is not a JSON object.
    """
    check_downloaded(path, DataError)
    is_empty = True
    try:
        with path.open("rb") as file:
            check_is_utf8(file.peek(HEAD)[:HEAD], str(path), DataError)
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, decode_object(line)
                    except DataError as error:
                        raise DataError(f"{path}:{number}: {error}. Repair or remove this line.") from error
                    is_empty = False
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Give a JSONL file of predictions, or a folder with "
            f"{PREDICTIONS}."
        ) from error
    if is_empty:
        raise DataError(f"{path} has no lines; expected one JSON object a line. Check that its writer has finished.")


def read_run(folder: Path) -> Mapping[str, Any]:
    """The content of `run.json` in a result folder; empty if there is none. Raises DataError if it is not an object."""
    path = folder / RUN
    if not path.exists():
        return {}
    remedy = "Restore it, or remove it to score the predictions alone."
    run = read_user_json(path, DataError, remedy=remedy)
    if not isinstance(run, dict) or not isinstance(run.get("protocol") or {}, dict):
        raise DataError(f"{path}: expected a JSON object whose `protocol` is an object. {remedy}")
    return run


# Accepted JSON types of the fields of a line.
_TEXT, _NAME, _COUNTS = (str,), (str, int), (dict,)
_REQUIRED = {"id": _NAME, "task": _TEXT, "prediction": _TEXT, "references": (list,)}
_OPTIONAL: Mapping[str, tuple[type, ...]] = {
    "cluster": _NAME,
    "group": _NAME,
    "system": _TEXT,
    "decoder": _TEXT,
    "index": (int,),
    "raw": _TEXT,
    "stop": _TEXT,
    "lengths": _COUNTS,
    "nll": _COUNTS,
    "prompt_sha": _TEXT,
    "seed": (int,),
}
_WORDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def parse_prediction(record: Mapping[str, Any], where: str) -> Prediction:
    """The `Prediction` of a line. Null is as good as absent in optional fields.

    record: the JSON object.
    where: file and line, for errors.

    Raises DataError if a field is missing or has another type.
    """
    missing = [name for name in _REQUIRED if record.get(name) is None]
    if missing:
        raise DataError(
            f"{where}: missing {', '.join(map(repr, missing))}; found {', '.join(map(repr, record)) or 'no fields'}. "
            f"Each line needs {', '.join(map(repr, _REQUIRED))}."
        )
    values = {}
    for name, types in {**_REQUIRED, **_OPTIONAL}.items():
        if (value := record.get(name)) is not None:
            values[name] = _checked(value, name, types, where)
    references = values["references"]
    if not references or not all(isinstance(each, str) for each in references):
        raise DataError(
            f"{where}: 'references' is {str(references)[:60]}; expected a list of one or more texts. Write all "
            "accepted answers into it."
        )
    for name in ("id", "task"):
        if values[name] == "":
            raise DataError(f"{where}: {name!r} is empty; expected a name. Write one.")
    for name in ("id", "cluster", "group"):
        values[name] = str(values.get(name, ""))
    for text in (*record.values(), *references):
        if isinstance(text, str):
            check_encodable(text, f"{where}: a text")
    if (nll := values.get("nll")) is not None and not _is_nll(nll):
        raise DataError(f'{where}: \'nll\' is {nll}; expected {{"nats": -log p, "tokens": number > 0}}. Correct it.')
    if wrong := [name for name, count in values.get("lengths", {}).items() if not _is_number(count)]:
        raise DataError(f"{where}: {wrong[0]!r} in 'lengths' is {values['lengths'][wrong[0]]!r}; expected a number.")
    others = {name: value for name, value in record.items() if name not in _REQUIRED and name not in _OPTIONAL}
    return Prediction(**{**values, "references": tuple(references), "others": others})


def _checked(value: Any, name: str, types: tuple[type, ...], where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, types):
        wanted = " or ".join(_WORDS[each] for each in types)
        raise DataError(
            f"{where}: {name!r} is {type(value).__name__} {str(value)[:60]!r}; expected {wanted}. Correct or rename it."
        )
    return value


def _is_nll(nll: Mapping[str, Any]) -> bool:
    values = [nll.get(name) for name in ("nats", "tokens")]
    return all(map(_is_number, values)) and values[0] > -1e-3 and values[1] > 0  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # false for NaN, too


def write_results(folder: Path, predictions: Iterable[Prediction], run: Mapping[str, Any]) -> None:
    """Write `predictions.jsonl` and `run.json` into an existing folder. Each file is replaced atomically.

    predictions: answers in any order; they are sorted by task and index.
    run: content of `run.json`.
    """
    lines = [prediction_line(each) for each in sorted(predictions, key=lambda each: (each.task, each.index, each.id))]
    write_whole(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
    write_whole(folder / RUN, json.dumps(run, indent=2, ensure_ascii=False) + "\n")


def prediction_line(prediction: Prediction) -> str:
    """The JSON line of a `Prediction`, without the line break. `parse_prediction` gives back the same."""
    record = {each.name: getattr(prediction, each.name) for each in dataclasses.fields(prediction)}
    return json.dumps({**record.pop("others"), **record}, ensure_ascii=False)


def data_digest(samples: Iterable[tuple[str, Sequence[str]]]) -> str:
    """The sha256 of ids and references in sorted order, independent of the order of `samples`: `data_digest` of a task.

    samples: id and accepted answers of each sample. `Prediction` and `EvalSample` have both.
    """
    lines = sorted(json.dumps([name, list(references)]) for name, references in samples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
