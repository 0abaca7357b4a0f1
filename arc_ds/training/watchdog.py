"""Ends a run whose step stalls, and leaves the stacks of every rank in the run folder."""

from __future__ import annotations

import faulthandler
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from torch import Tensor, nn

from arc_ds.launch.heartbeat import Heartbeat
from arc_ds.launch.signals import StopRequest
from arc_ds.system import activity
from arc_ds.system.files import output

if TYPE_CHECKING:
    from arc_ds.training.run import Run

_POLL_S = 0.2


class Watchdog:
    """Ends the run if a step takes longer than `limit_s`, or if no step follows a stop signal.

    `alive()` restarts the timer. Call it at each step, and around long operations that are not steps (validation,
    checkpoint). A thread watches, because the main thread may be blocked in a collective. It leaves the Python stacks
    of all threads in a file, which stays empty unless something stalls, and lets the heartbeat end all ranks.

    A rank that is blocked cannot obey a stop signal: that happens at the next boundary of a step. If the boundary does
    not come within `stop_grace_s`, the run ends as stalled. Nothing can be saved then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        limit_s: float,
        stop_grace_s: float,
        heartbeat: Heartbeat | None,
        stop: StopRequest,
    ) -> None:
        """Does not write anything yet.

        folder: folder of the file; created if missing.
        limit_s: time limit in seconds, > 0.
        stop_grace_s: time in seconds for a step to end after a stop signal.
        heartbeat: ends the ranks. None: stacks are written, but nothing ends.
        """
        self.path = folder / f"stacks_rank_{rank:05d}.txt"
        self._limit_s = limit_s
        self._stop_grace_s = stop_grace_s
        self._heartbeat = heartbeat
        self._stop = stop
        self._file: IO[str] | None = None
        self._alive = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        with output(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Append: stacks from an earlier start of the same run may still be needed.
            self._file = self.path.open("a", encoding="utf-8")
        if self._heartbeat is not None:
            self._heartbeat.before_end = self.dump
        self.alive()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        if self._heartbeat is not None:
            self._heartbeat.before_end = lambda: None
        if self._file is not None:
            self._file.close()
            self._file = None

    def alive(self) -> None:
        """Restart the timer."""
        self._alive = time.monotonic()

    def dump(self) -> None:
        """Append the stacks of all threads to the file."""
        if self._file is not None:
            self._file.write(f"{activity.now}\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file)
            self._file.flush()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(_POLL_S):
            if time.monotonic() - looked > self._limit_s / 2:  # the whole process was suspended
                self.alive()
            looked = time.monotonic()
            reason = self._stalled() or self._is_deaf()
            if reason:
                if self._heartbeat is None:
                    self.dump()
                else:
                    self._heartbeat.stalled(f"{reason} The stacks are in {self.path.parent}/stacks_rank_*.txt.")
                return

    def _stalled(self) -> str:
        if time.monotonic() - self._alive <= self._limit_s:
            return ""
        return f"no step has ended for {self._limit_s:g} s (stall_limit_s)."

    def _is_deaf(self) -> str:
        asked = self._stop.unanswered_since()
        if asked is None or activity.now.module == activity.SAVING:  # the stall limit still applies
            return ""
        if time.monotonic() - max(asked, self._alive) <= self._stop_grace_s:
            return ""
        return (
            f"a stop was requested, but no step has ended for {self._stop_grace_s:g} s (distributed.timeout_s), so "
            "nothing could be saved."
        )


def note_modules(run: Run) -> None:
    """Let the modules of a run note when they begin (`system.activity`). Call it after the engine is built."""
    compressor = run.engine.module
    for idx, layer in enumerate(compressor.encoder.layers):
        _note(layer, f"encoder layer {idx}")
    for name, port, decoder in zip(run.decoder_names, compressor.ports, run.decoders, strict=True):
        _note(port, f"bridge of {name}")
        _note(decoder.module, f"decoder {name}")


def _note(module: nn.Module, name: str) -> None:
    # Before the hooks of ZeRO-3, which gather the module's weights: they wait for the other ranks.
    module.register_forward_pre_hook(lambda *_: activity.note(name), prepend=True)
    module.register_forward_hook(lambda _module, _args, output: _note_backward(output, f"{name} (backward)"))


def _note_backward(output: object, name: str) -> None:
    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _grad: activity.note(name))
