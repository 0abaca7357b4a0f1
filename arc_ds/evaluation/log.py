"""Scores and answers of systems in MLflow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from arc_ds.evaluation.scoring import SystemScores
from arc_ds.inference.load import source_checkpoint
from arc_ds.tracking.evaluation import create_evaluation_run, find_run_of_checkpoint, log_evaluation

_COLUMNS = ("id", "task", "prediction", "references", "cluster", "stop")
_FORBIDDEN = re.compile(r"[^\w.\- ]")  # in the name of an artifact


def log_scores(systems: Sequence[SystemScores], uri: str, experiment: str) -> dict[str, str]:
    """Log scores and answers into MLflow. Returns the id of each system's run, by the system's name.

    The results of a system go into the run that trained its model, at the step of its checkpoint, if the store knows
    that checkpoint. Further systems of the same checkpoint, and all other systems, get a run of their own. It is a
    child of the run that wrote the checkpoint, if there is one.

    uri: tracking URI.
    experiment: of the runs of their own; created if missing.

    Raises ConfigError if the server cannot be reached or refuses the results.
    """
    found: dict[str, tuple[str, int]] = {}
    for system in systems:
        digest = _checkpoint_of(system)
        place = None if digest is None else find_run_of_checkpoint(uri, digest)
        if place is None or place in found.values():
            step = 0 if place is None else place[1]
            place = create_evaluation_run(uri, experiment=experiment, name=system.name, source_checkpoint=digest), step
        found[system.name] = place
        answers, digests = system.results.predictions, system.results.seeds[0].run.get("data_digest")
        log_evaluation(
            uri,
            place[0],
            table={column: [getattr(each, column) for each in answers] for column in _COLUMNS},
            metrics={task: {name: score.value for name, score in of.items()} for task, of in system.by_task.items()},
            step=place[1],
            name=_FORBIDDEN.sub("_", system.name),
            datasets=digests if isinstance(digests, Mapping) else None,
        )
    return {name: run_id for name, (run_id, _) in found.items()}


def _checkpoint_of(system: SystemScores) -> str | None:
    """The digest of the checkpoint of which its model was exported; None if unknown, and for several training seeds."""
    file, *others = system.results.seeds
    config = file.run.get("config")
    keys = config.get("systems") if isinstance(config, Mapping) else None
    own = [each for each in keys or () if isinstance(each, Mapping) and each.get("name") == file.system]
    model = own[0].get("model") if own and not others else None
    return source_checkpoint(Path(model)) if isinstance(model, str) else None
