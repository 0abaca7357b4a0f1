"""Sends metrics and metadata of a run to `metrics.jsonl` and to MLflow.

The file is the queue. `Tracker.log` appends a line and returns. A thread follows the file and sends new entries in
batches. Memory is therefore bounded, and a slow or dead server does not delay a step. Entries that the server missed
are sent when it answers again, at the latest at the run's next start.

The server gets exactly one point per step and key, even after a kill. Duplicates have two causes: a resumed run repeats
the steps after its checkpoint, and a request may have arrived although its response was lost. MLflow would keep both
points because their times differ. When a key first appears in a start of the run, and after every failure, the thread
therefore asks the server which steps >= `sent_step` the key already has, and skips those. On deterministic hardware the
repeated values are bit-identical. Otherwise the server keeps the first value and the file keeps the second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from arc_ds.tracking.metrics_log import METRICS_NAME, MetricsEntry, MetricsLog, read_metrics
from arc_ds.tracking.tracking_state import TrackingState, load_state, save_state

if TYPE_CHECKING:
    from arc_ds.tracking.mlflow_server import MlflowServer

logger = logging.getLogger(__name__)

_ENTRIES_PER_BATCH = 200
_IDLE_S = 1.0
# Pause after a failure; doubled after each further one.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class Tracker:
    """Logs to `metrics.jsonl` and, from a thread, to a server. For rank 0 only; one per run folder."""

    def __init__(
        self,
        folder: Path,
        *,
        resumed_step: int,
        uri: str = "",
        make_server: Callable[[], MlflowServer] | None = None,
        run_id: str | None = None,
    ) -> None:
        """Start a tracker in a run's folder.

        resumed_step: number of steps that the run has already done; 0 for a new run.
        uri: address of the server.
        make_server: creates the server; None to write only the file. The thread calls it because importing MLflow and
            preparing its database takes seconds.
        run_id: MLflow run id of the checkpoint.
        """
        self._log = MetricsLog(folder / METRICS_NAME, resumed_step=resumed_step)
        self._sender: _Sender | None = None
        if make_server is not None:
            state = load_state(folder, uri=uri, resumed_step=resumed_step, run_id=run_id)
            save_state(folder, state)
            self._sender = _Sender(folder, state, make_server)
            self._sender.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None without MLflow and before the first answer of the server."""
        return None if self._sender is None else self._sender.state.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step without waiting for a server.

        Steps must not decrease, and each key may be logged once per step.
        """
        self._log.append(step, metrics)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all logged entries have been sent; return whether they have. True without a server.

        Waits at most `timeout_s` and gives up early after two failures of the server.
        """
        sender = self._sender
        if sender is None:
            return True
        deadline, failures = time.monotonic() + timeout_s, sender.num_failures
        while not sender.has_sent_all():
            if time.monotonic() > deadline or sender.num_failures >= failures + 2:
                return False
            sender.hurry.set()
            time.sleep(0.02)
        return True

    def close(self, status: str = "FINISHED", timeout_s: float = 30.0) -> bool:
        """Send the remaining entries, mark the run as ended and stop; return whether the server has everything.

        If the server does not answer within `timeout_s`, this logs a warning and returns. The next start of the run
        sends the missing entries.

        status: FINISHED, FAILED or KILLED (stopped on purpose, can be resumed).
        """
        self._log.close()
        sender = self._sender
        if sender is None or sender.final_status is not None:
            return True
        complete = self.flush(timeout_s)
        sender.final_status = status
        sender.hurry.set()
        sender.join(timeout=max(1.0, timeout_s if complete else 1.0))
        if not complete:
            logger.warning(
                "%s did not receive all metrics (%d failures); the next start of this run sends the rest from %s",
                *(sender.state.uri, sender.num_failures, self._log.path),
            )
        return complete


class _Sender(threading.Thread):
    """Brings a server up to date with the metrics file of a folder. Others read its attributes.

    hurry: ends a pause of the thread.
    final_status: ends the thread once it is set.
    """

    def __init__(self, folder: Path, state: TrackingState, make_server: Callable[[], MlflowServer]) -> None:
        super().__init__(daemon=True, name="tracking")
        self.state = state
        self.num_failures = 0
        self.hurry = threading.Event()
        self.final_status: str | None = None
        self._folder = folder
        self._path = folder / METRICS_NAME
        self._make_server = make_server
        self._server: MlflowServer | None = None
        self._position: int | None = None
        # Steps >= `sent_step` that the server already has, by key; reset after every failure.
        self._known: dict[str, set[int]] = {}

    def run(self) -> None:
        """Send new entries until the final status is set; after each consecutive failure, wait longer."""
        pause_s = 0.0
        while self.final_status is None:
            pause_s = 0.0 if self.advance() else min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            if pause_s or self.has_sent_all():
                self.hurry.wait(pause_s or _IDLE_S)
                self.hurry.clear()
        self.finish(self.final_status)

    def has_sent_all(self) -> bool:
        """Whether all entries of the file and the run's description have been sent."""
        return self.state.described and self._position is not None and self._position >= self._path.stat().st_size

    def advance(self) -> bool:
        """Connect if needed and send one batch. Returns False on failure; only the first failure logs a warning."""
        try:
            self._connect()
            self._send_batch()
            return True
        except Exception as error:  # errors of a server, driver or network must not reach training
            self.num_failures += 1
            self._known = {}
            if self.num_failures == 1:
                logger.warning(
                    "%s does not accept metrics (%s: %s). The run continues; all metrics are in %s and are sent later.",
                    *(self.state.uri, type(error).__name__, str(error)[:200], self._path),
                )
            return False

    def finish(self, status: str) -> None:
        """Mark the run as ended if it was opened. A failure is only logged."""
        if self._server is None or self.state.run_id is None:
            return
        try:
            self._server.end_run(self.state.run_id, status)
        except Exception as error:
            logger.warning("the run could not be marked as ended: %s", error)

    def _connect(self) -> None:
        if self.state.described and self._server is not None:
            return
        if self._server is None:
            self._server = self._make_server()
        run_id = self._server.open_run(self.state.run_key, self.state.run_id)
        if run_id != self.state.run_id:
            self._remember(replace(self.state, run_id=run_id))
        self._server.describe(run_id)
        self._remember(replace(self.state, described=True))

    def _send_batch(self) -> None:
        assert self._server is not None and self.state.run_id is not None
        if self._position is None:
            self._position = self._first_unsent()
        entries = list(islice(read_metrics(self._path, self._position), _ENTRIES_PER_BATCH))
        if not entries:
            return
        missing = [left for entry in entries if (left := self._without_known(entry)).metrics]
        if missing:
            self._server.send(self.state.run_id, missing)
        self._position = entries[-1].end
        self._remember(replace(self.state, sent_step=max(self.state.sent_step, entries[-1].step)))

    def _first_unsent(self) -> int:
        """Byte offset of the first entry of `sent_step`. That step is read again because it may get more entries."""
        position = 0
        for entry in read_metrics(self._path):
            if entry.step >= self.state.sent_step:
                break
            position = entry.end
        return position

    def _without_known(self, entry: MetricsEntry) -> MetricsEntry:
        left = {key: value for key, value in entry.metrics.items() if entry.step not in self._known_steps(key)}
        return replace(entry, metrics=left)

    def _known_steps(self, key: str) -> set[int]:
        """Steps of the key on the server, requested once per key and again after a failure."""
        assert self._server is not None and self.state.run_id is not None
        if key not in self._known:
            self._known[key] = self._server.steps_of(self.state.run_id, key, self.state.sent_step)
        return self._known[key]

    def _remember(self, state: TrackingState) -> None:
        save_state(self._folder, state)
        self.state = state
