"""Sends metrics and metadata of a run to `metrics.jsonl` and to MLflow.

The file is the queue. `Tracker.log` appends a line and returns. A thread follows the file and sends new entries in
batches. Memory is therefore bounded, and a slow or dead server does not delay a step. Entries that the server missed
are sent when it answers again, at the latest at the run's next start. A fault that time cannot mend (`faults`), such as
a wrong password, is reported once and tried again only at the next start, if the server has not worked in this one.

The server gets exactly one point per step and key, even after a kill. Duplicates have two causes: a resumed run repeats
the steps after its checkpoint, and a request may have arrived although its response was lost. MLflow would keep both
points because their times differ. When a key first appears in a start of the run, and after every failure, the thread
therefore asks the server which steps >= `sent_step` the key already has, and skips those. On deterministic hardware the
repeated values are bit-identical. Otherwise the server keeps the first value and the file keeps the second.

After every failure the thread opens the run anew. If the server has lost the run, or its last points, they are sent
again from the file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from arc_ds.tracking.checkpoint_models import find_checkpoints
from arc_ds.tracking.faults import is_lasting, remedy, words_of
from arc_ds.tracking.metrics_log import METRICS_NAME, MetricsEntry, MetricsLog, read_metrics, read_step
from arc_ds.tracking.system_metrics import SYSTEM_FOLDER
from arc_ds.tracking.tracking_state import TrackingState, load_state, save_state

if TYPE_CHECKING:
    from arc_ds.tracking.mlflow_server import MlflowServer

logger = logging.getLogger(__name__)

_ENTRIES_PER_BATCH = 200
_IDLE_S = 1.0
_LOOK_EVERY_S = 5.0  # for checkpoints
_MAX_NAMED = 5
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
            if sender.gave_up or time.monotonic() > deadline or sender.num_failures >= failures + 2:
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
        if not complete and not sender.gave_up:
            logger.warning(
                "%s did not receive all metrics (%d failures); the next start of this run sends the rest from %s",
                *(sender.state.uri, sender.num_failures, self._log.path),
            )
        return complete


class _Sender(threading.Thread):
    """Brings a server up to date with the metrics file of a folder. Others read its attributes.

    hurry: ends a pause of the thread.
    gave_up: whether the server cannot be used in this start of the run.
    final_status: ends the thread once it is set.
    """

    def __init__(self, folder: Path, state: TrackingState, make_server: Callable[[], MlflowServer]) -> None:
        super().__init__(daemon=True, name="tracking")
        self.state = state
        self.num_failures = 0
        self.hurry = threading.Event()
        self.gave_up = False
        self.final_status: str | None = None
        self._folder = folder
        self._path = folder / METRICS_NAME
        self._make_server = make_server
        self._server: MlflowServer | None = None
        self._is_open = False
        self._has_worked = False
        self._is_complete = False
        self._warnings: set[str] = set()
        self._artifacts: threading.Thread | None = None
        self._position: int | None = None
        # Steps >= `sent_step` that the server already has, by key; reset after every failure.
        self._known: dict[str, set[int]] = {}
        self._known_until = state.sent_step  # later points are on the server only if this start has sent them
        # Digests of the checkpoints on the server, by step; None until the server has been asked.
        self._checkpoints: dict[int, str] | None = None
        self._look_at = 0.0  # time of the next look for checkpoints

    def run(self) -> None:
        """Send new entries until the final status is set; after each consecutive failure, wait longer."""
        pause_s = 0.0
        while self.final_status is None:
            pause_s = 0.0 if self.advance() else min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            if self.gave_up:
                return
            if pause_s or self.has_sent_all():
                self.hurry.wait(pause_s or _IDLE_S)
                self.hurry.clear()
        self.finish(self.final_status)

    def has_sent_all(self) -> bool:
        """Whether all entries of the file and the run's description have been sent."""
        if not self.state.described or self._position is None:
            return False
        try:
            return self._position >= self._path.stat().st_size
        except FileNotFoundError:  # the folder was moved or removed while the run works
            return False

    def advance(self) -> bool:
        """Open the run if needed and send one batch. Returns False on failure; each kind of failure is logged once."""
        was_open = self._is_open
        try:
            if not self._is_open:
                self._open()
            self._send_batch()
            self._send_system_metrics()
            self._log_checkpoints()
            return True
        except Exception as error:  # errors of a server, driver or network must not reach training
            self._is_open, self._known = False, {}
            if was_open:
                return self.advance()  # if the run was deleted, a new one replaces it at once
            self.num_failures += 1
            self._report(error)
            return False

    def finish(self, status: str) -> None:
        """Mark the run as ended if it was opened, and wait for its artifacts. A failure is only logged.

        The run is opened again before, because the server may have lost it, or some points, since the last metric.
        """
        if self._server is None or self.state.run_id is None:
            return
        self._is_open, self._known = False, {}
        while self.advance() and not self.has_sent_all():
            pass
        try:
            self._server.end_run(self.state.run_id, status)
        except Exception as error:
            logger.warning("the run could not be marked as ended: %s", words_of(error))
        if self.has_sent_all():
            self._log_checkpoints(is_end=True)
        if self._artifacts is not None:
            self._artifacts.join()

    def _report(self, error: Exception) -> None:
        """Log a failure. Before the server has worked in this start, a lasting one ends the attempts."""
        uri, words = self.state.uri, words_of(error)
        self.gave_up = not self._has_worked and is_lasting(error, uri)
        if self.gave_up:
            self._warn_once(
                "gave up",
                "%s: MLflow cannot be used in this start of the run (%s). %sTraining goes on; all metrics are in %s, "
                "and the next start of this run sends them.",
                *(uri, words, remedy(error, uri), self._path),
            )
        else:
            self._warn_once(
                f"{type(error).__name__} {getattr(error, 'error_code', '')}",
                "%s does not accept metrics (%s). The run continues and tries again at least every %.0f s; all metrics "
                "are in %s, and what the server misses is sent when it accepts them.",
                *(uri, words, _LONGEST_PAUSE_S, self._path),
            )

    def _warn_once(self, kind: str, message: str, *values: object) -> None:
        if kind not in self._warnings:
            self._warnings.add(kind)
            logger.warning(message, *values)

    def _open(self) -> None:
        """Open the run on the server, describe it, and find the first entry that the server lacks."""
        if self._server is None:
            self._server = self._make_server()
        run_id = self._server.open_run(self.state.run_key, self.state.run_id)
        if run_id != self.state.run_id:
            if self.state.run_id is not None:
                logger.warning(
                    "%s has no run %s of this folder: it was deleted, or this folder is a copy. The run %s gets all "
                    "metrics of %s",
                    *(self.state.uri, self.state.run_id, run_id, self._path),
                )
            self._remember(replace(self.state, run_id=run_id, sent_step=0, described=False, sent_system={}))
            self._is_complete, self._checkpoints = False, None
        if not self._is_complete:
            failed = self._server.describe(run_id)
            self._is_complete = not failed
            self._warn_about_rest(failed)
            self._start_artifacts(self._server, run_id)
        self._position = self._first_unsent(self._server, run_id)
        self._remember(replace(self.state, described=True))
        self._is_open = self._has_worked = True

    def _first_unsent(self, server: MlflowServer, run_id: str) -> int:
        """Byte offset of the first entry of `sent_step`. That step is read again because it may get more entries.

        Lowers `sent_step` if the server lacks earlier points, for example after its database was restored. Points are
        sent in the order of the file, so one metric shows which are there.
        """
        last = self._last_before(self.state.sent_step)
        if last is None:
            return 0
        histories = ((key, server.steps_of(run_id, key, from_step=0)) for key in last.metrics)
        key, there = next((found for found in histories if found[1]), ("", set()))
        known_step = 0
        for entry in read_metrics(self._path):
            if entry.step >= self.state.sent_step:
                return last.end
            if not there or (key in entry.metrics and entry.step not in there):
                break
            known_step = entry.step
        logger.warning("%s has lost metrics after step %d; they are sent again", self.state.uri, known_step)
        self._remember(replace(self.state, sent_step=known_step, sent_system={}))
        last = self._last_before(known_step)
        return 0 if last is None else last.end

    def _last_before(self, step: int) -> MetricsEntry | None:
        """The last entry before a step."""
        last = None
        for entry in read_metrics(self._path):
            if entry.step >= step:
                break
            last = entry
        return last

    def _start_artifacts(self, server: MlflowServer, run_id: str) -> None:
        """Store the artifacts from another thread: an artifact store may take minutes to fail."""
        if self._artifacts is not None and self._artifacts.is_alive():
            self._is_complete = False
            return
        self._artifacts = threading.Thread(
            target=self._store_artifacts, args=(server, run_id), daemon=True, name="tracking-artifacts"
        )
        self._artifacts.start()

    def _store_artifacts(self, server: MlflowServer, run_id: str) -> None:
        failed = server.store_artifacts(run_id)
        self._is_complete &= not failed
        if failed:
            self._warn_once(
                "artifacts",
                "%s: MLflow could not store %s (%s). Metrics are sent all the same; the next start of this run tries "
                "again. Let this host write to the artifact store. For later runs, the server itself can write to it "
                "(mlflow server --artifacts-destination PLACE); give them a new tracking.experiment, because an "
                "experiment keeps its store.",
                *(self.state.uri, ", ".join(failed), "; ".join(dict.fromkeys(map(words_of, failed.values())))),
            )

    def _warn_about_rest(self, failed: Mapping[str, Exception]) -> None:
        for words, names in _by_words(failed):
            self._warn_once(
                names,
                "%s does not store %s (%s). Everything else is sent; all metrics are in %s.",
                *(self.state.uri, names, words, self._path),
            )

    def _send_batch(self) -> None:
        assert self._server is not None and self.state.run_id is not None and self._position is not None
        entries = list(islice(read_metrics(self._path, self._position), _ENTRIES_PER_BATCH))
        if not entries:
            return
        missing = [left for entry in entries if (left := self._without_known(entry)).metrics]
        if missing:
            self._warn_about_rest(self._server.send(self.state.run_id, missing))
        self._position = entries[-1].end
        self._remember(replace(self.state, sent_step=max(self.state.sent_step, entries[-1].step)))

    def _send_system_metrics(self) -> None:
        """Send new samples of all hosts. A sample that is sent twice stays one point, because its time is equal."""
        assert self._server is not None and self.state.run_id is not None
        for path in sorted((self._folder / SYSTEM_FOLDER).glob("*.jsonl")):
            start = self.state.sent_system.get(path.name, 0)
            entries = list(islice(read_metrics(path, start), _ENTRIES_PER_BATCH))
            if entries:
                self._warn_about_rest(self._server.send(self.state.run_id, entries))
                self._remember(replace(self.state, sent_system={**self.state.sent_system, path.name: entries[-1].end}))

    def _log_checkpoints(self, *, is_end: bool = False) -> None:
        """Store new checkpoints whose metrics have all been sent. A failure holds nothing else back.

        is_end: whether no more metrics will come.
        """
        assert self._server is not None and self.state.run_id is not None
        if time.monotonic() < self._look_at and not is_end:
            return
        self._look_at = time.monotonic() + _LOOK_EVERY_S
        try:
            if self._checkpoints is None:
                self._checkpoints = self._server.logged_checkpoints(self.state.run_id)
            for found in find_checkpoints(self._folder):
                if self._checkpoints.get(found.step) != found.digest and (is_end or found.step < self.state.sent_step):
                    entries, are_ours = read_step(self._path, found.step), found.step > self._known_until
                    self._server.log_checkpoint(self.state.run_id, found, entries, are_ours=are_ours)
                    self._checkpoints[found.step] = found.digest
        except Exception as error:
            self._checkpoints, self._look_at = None, time.monotonic() + _LONGEST_PAUSE_S
            self._warn_once(
                "checkpoints",
                "%s does not store checkpoints as models (%s). Metrics are sent all the same, and the run tries again.",
                *(self.state.uri, words_of(error)),
            )

    def _without_known(self, entry: MetricsEntry) -> MetricsEntry:
        left = {key: value for key, value in entry.metrics.items() if entry.step not in self._known_steps(key)}
        return replace(entry, metrics=left)

    def _known_steps(self, key: str) -> set[int]:
        """Steps of the key on the server, requested once per key and again after a failure."""
        assert self._server is not None and self.state.run_id is not None
        if key not in self._known:
            self._known[key] = self._server.steps_of(self.state.run_id, key, self.state.sent_step)
            self._known_until = max(self._known_until, *self._known[key], 0)
        return self._known[key]

    def _remember(self, state: TrackingState) -> None:
        save_state(self._folder, state)
        self.state = state


def _by_words(failed: Mapping[str, Exception]) -> Iterator[tuple[str, str]]:
    """The words of each different failure, and the names of the things that it concerns."""
    groups: dict[str, list[str]] = {}
    for name, error in failed.items():
        groups.setdefault(words_of(error), []).append(name)
    for words, names in groups.items():
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        yield words, ", ".join(names[:_MAX_NAMED]) + more
