"""The tracking state that a run keeps between starts: `tracking_state.json` in the run's folder."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from arc_ds.system.files import write_whole

STATE_NAME = "tracking_state.json"


@dataclass(frozen=True, kw_only=True)
class TrackingState:
    """The tracking state of a run.

    run_key: the run's own key. It is saved before the server creates a run, so a later start finds that run even if
        this process is killed right after its creation.
    uri: tracking server of the run.
    run_id: MLflow's id of the run; None before the server has created it.
    sent_step: all metrics below this step are known to be on the server.
    described: whether parameters, tags and artifacts are on the server.
    sent_system: how many bytes of each host's system metrics have been sent, by the name of the host's file.
    """

    run_key: str
    uri: str
    run_id: str | None = None
    sent_step: int = 0
    described: bool = False
    sent_system: Mapping[str, int] = field(default_factory=dict)


def load_state(folder: Path, *, uri: str, resumed_step: int, run_id: str | None) -> TrackingState:
    """Load the state. Returns a new state if the file is missing or damaged, or if the server has changed.

    uri: server of this start.
    resumed_step: upper bound of `sent_step`, because the run repeats later steps.
    run_id: MLflow run id of the checkpoint, used if the file is missing or damaged.
    """
    try:
        found = TrackingState(**json.loads((folder / STATE_NAME).read_text(encoding="utf-8")))
        uuid.UUID(found.run_key)  # it becomes part of a query
        sent_system = {str(name): int(end) for name, end in found.sent_system.items()}
        found = replace(found, sent_step=int(found.sent_step), sent_system=sent_system)
    except (OSError, ValueError, TypeError, AttributeError):
        found = TrackingState(run_key=uuid.uuid4().hex, uri=uri, run_id=run_id)
    if found.uri != uri:
        found = TrackingState(run_key=found.run_key, uri=uri)
    # Describe the run again at each start: a resumed run may have other hosts or overrides.
    return replace(found, sent_step=min(found.sent_step, resumed_step), described=False)


def recorded(folder: Path, key: Literal["uri", "run_id"]) -> str | None:
    """The store that a run's folder records, or MLflow's id of the run; None if it records none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        value = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))[key]
        return value if isinstance(value, str) else None
    return None


def save_state(folder: Path, state: TrackingState) -> None:
    """Write the state durably."""
    write_whole(folder / STATE_NAME, json.dumps(asdict(state), indent=1) + "\n")
