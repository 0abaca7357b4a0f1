"""What a run remembers about its tracking between starts: `tracking_state.json` in the run's folder."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from arc_ds.system.files import write_whole

STATE_NAME = "tracking_state.json"


@dataclass(frozen=True, kw_only=True)
class TrackingState:
    """run_key: this run's own name for itself, written before a server is asked to make a run, so that a run made
    in the instant of a kill is found again. run_id: MLflow's name, once there is one. uri: where the run lives.
    sent_step: every metric below this step is on the server for certain. described: parameters, tags and artifacts are.
    """

    run_key: str
    uri: str
    run_id: str | None = None
    sent_step: int = 0
    described: bool = False


def load_state(folder: Path, *, uri: str, resumed_step: int, run_id: str | None) -> TrackingState:
    """The state to go on from, and a new one where there is none, it is damaged, or the server is another one.

    uri: the server of this start. resumed_step: later steps are made again, so nothing is certain about them.
    run_id: what the checkpoint knows, used where the file is lost.
    """
    try:
        found = TrackingState(**json.loads((folder / STATE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = TrackingState(run_key=uuid.uuid4().hex, uri=uri, run_id=run_id)
    if found.uri != uri:
        found = TrackingState(run_key=found.run_key, uri=uri)
    # Described anew at each start: a resumed run may have other hosts or overrides.
    return replace(found, sent_step=min(found.sent_step, resumed_step), described=False)


def save_state(folder: Path, state: TrackingState) -> None:
    """Write the state durably."""
    write_whole(folder / STATE_NAME, json.dumps(asdict(state), indent=1) + "\n")
