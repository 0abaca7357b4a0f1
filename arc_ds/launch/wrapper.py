"""`arc-ds train`: DeepSpeed's launcher on all devices of this host, with reliable signals and exit codes.

With `--hostfile`, `arc_ds.launch.ssh` runs `launch` on each host. SIGTERM to `deepspeed` orphans the ranks or kills
them while they save, and a killed rank can result in exit code 0. This wrapper starts the launcher in its own session,
isolated from the terminal's signals. It forwards SIGTERM, SIGUSR1 and the first Ctrl-C to the ranks, which save at the
next step boundary and stop. It computes the exit code from the status files of the ranks (`arc_ds.launch.rank`); a rank
that was killed has no exit code in its file.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from arc_ds.errors import ArcError, ConfigError
from arc_ds.launch.exit_codes import (
    EXIT_FAILED,
    EXIT_LOST_RANK,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    joint_exit_code,
)
from arc_ds.launch.order import FORWARDED, GRACE_S, Place
from arc_ds.launch.rank import WRAPPER_PID_VARIABLE
from arc_ds.launch.signals import handled
from arc_ds.launch.status import STATUS_FOLDER_VARIABLE, RankStatus, read_statuses
from arc_ds.system import dist
from arc_ds.system.device import num_local_devices, wanted_kind
from arc_ds.system.files import output
from arc_ds.system.processes import die_with_parent, num_cores

logger = logging.getLogger(__name__)

_POLL_S = 0.1
# DeepSpeed's launcher overwrites this variable with its device list, so that list must contain the user's choice.
_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def choose_num_procs(requested: int | None, device_request: str, option: str = "--num-procs") -> int:
    """Number of ranks to start on this host. Raises ConfigError if it is below 1 or above the number of GPUs.

    option: source of the number, for messages.
    """
    if requested is None:
        return num_local_devices(device_request)
    if requested < 1:
        raise ConfigError(f"{option} is {requested}, expected at least 1")
    if wanted_kind(device_request) != "cpu" and requested > num_local_devices(device_request):
        raise ConfigError(
            f"{option} is {requested}, but this host has {num_local_devices(device_request)} devices. "
            "Request at most that many, or run on the CPU with device=cpu."
        )
    return requested


def launch(
    module: str, arguments: Sequence[str], *, num_procs: int, device_request: str = "auto", place: Place | None = None
) -> int:
    """Run `module.main(arguments)` on `num_procs` ranks of this host and return their exit code.

    place: place of this host in a run on several hosts; None if it is alone.

    The code is 0 if all ranks returned 0, and EXIT_PREEMPTED if they stopped after a signal. Otherwise it is the code
    of the first rank that failed by itself, or EXIT_LOST_RANK if a rank was killed or never started. If all failing
    ranks report a user's mistake, their messages are raised as ArcError.
    """
    with ExitStack() as stack:
        with output(Path(os.environ.get("TMPDIR", "/tmp")), "Set TMPDIR to a folder that this user may write to."):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="arc_ds_launch_"))
        environment = _environment(folder, num_procs, device_request)
        place = place or Place((num_procs,), 0, "127.0.0.1", dist.free_port())
        command = _command(module, arguments, place, environment)
        watch = _Watch(Path(folder), num_procs)
        with handled(FORWARDED, watch.on_signal):
            # Own session: Ctrl-C in the terminal reaches only this process, which forwards it.
            launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
            watch.until_end(launcher)
        first = sum(place.num_procs[: place.host_idx])
        return _result(read_statuses(Path(folder)), range(first, first + num_procs), launcher.returncode)


def _command(module: str, arguments: Sequence[str], place: Place, environment: Mapping[str, str]) -> list[str]:
    """Command line of DeepSpeed's launcher for one host.

    The `deepspeed` command would start the same launcher, but only after 5 s of imports for reading a hostfile. If
    /job/hostfile exists, it would also use the hosts listed there.
    """
    visible = [name for name in environment.get(_VISIBLE_DEVICES, "").split(",") if name]
    on_cpu = environment.get("DS_ACCELERATOR") == "cpu"
    devices: dict[str, list[Any]] = {f"host{idx}": list(range(number)) for idx, number in enumerate(place.num_procs)}
    if visible and not on_cpu:
        devices[f"host{place.host_idx}"] = visible[: place.num_procs[place.host_idx]]
    world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
    options = [f"--world_info={world}", f"--node_rank={place.host_idx}"]
    options += [f"--master_addr={place.address}", f"--master_port={place.port}"]
    # The launcher only logs the failed command and its code; the rank itself has already reported the cause.
    options += ["--no_local_rank", "--log_level=critical", "--module"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *options, "arc_ds.launch.rank", module, *arguments]


def _environment(folder: str, num_procs: int, device_request: str) -> dict[str, str]:
    environment = {**os.environ, STATUS_FOLDER_VARIABLE: folder, WRAPPER_PID_VARIABLE: str(os.getpid())}
    # By default torch uses all cores in every process, so processes would compete for them.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_procs)))
    if wanted_kind(device_request) == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


class _Watch:
    """Forwards signals to the ranks while they run."""

    def __init__(self, folder: Path, num_procs: int) -> None:
        self._folder = folder
        self._num_procs = num_procs
        self._signal: signal.Signals | None = None
        self._interrupts = 0
        self._signalled: set[int] = set()
        self._over_since: float | None = None

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += {int(signal.SIGINT): 1, int(signal.SIGQUIT): 2}.get(number, 0)
        # Ranks handle Ctrl-C like any other stop: save, then end.
        self._signal = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM

    def until_end(self, launcher: subprocess.Popen[bytes]) -> None:
        """Forward signals until launcher and ranks have ended, and kill processes that should have ended.

        Ranks stop by themselves if the launcher dies (`launch.parents`).
        """
        statuses: dict[int, RankStatus] = {}
        while launcher.poll() is None or any(map(_is_running, statuses.values())):
            statuses = read_statuses(self._folder)
            self._forward(statuses)
            if self._should_be_over(statuses) or self._interrupts > 1:
                _kill_session(launcher.pid, statuses)
            time.sleep(_POLL_S)
        # Ranks that have not written a status yet may outlive the launcher.
        _kill_session(launcher.pid, read_statuses(self._folder))

    def _forward(self, statuses: Mapping[int, RankStatus]) -> None:
        """Signal each rank once, including ranks that start later."""
        if self._signal is None:
            return
        for rank, status in statuses.items():
            if rank not in self._signalled and status.exit_code is None:
                _kill(status.pid, self._signal)
                self._signalled.add(rank)

    def _should_be_over(self, statuses: Mapping[int, RankStatus]) -> bool:
        """Whether the grace period since the first failure, or since the end of all ranks, has expired."""
        running = [status for status in statuses.values() if _is_running(status)]
        codes = [status.exit_code for status in statuses.values() if status not in running]
        failed = any(code not in (EXIT_OK, EXIT_PREEMPTED) for code in codes)  # None: it was killed
        if not failed and len(codes) < self._num_procs:
            return False
        self._over_since = self._over_since or time.monotonic()
        return time.monotonic() - self._over_since > GRACE_S


def _is_running(status: RankStatus) -> bool:
    return status.exit_code is None and _kill(status.pid, 0)


def _kill(pid: int, number: int) -> bool:
    """Send a signal (0: none); return whether the process exists."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _kill_session(leader: int, statuses: Mapping[int, RankStatus]) -> None:
    """Kill the launcher's process group and all running ranks, which may have left that group."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for status in statuses.values():
        if status.exit_code is None:
            _kill(status.pid, signal.SIGKILL)


def _result(statuses: Mapping[int, RankStatus], ranks: Sequence[int], launcher_code: int) -> int:
    if not statuses:
        logger.error("the deepspeed launcher ended with code %d before any rank started", launcher_code)
        return launcher_code if launcher_code > 0 else EXIT_FAILED
    codes = {rank: statuses[rank].exit_code if rank in statuses else None for rank in ranks}
    killed = [rank for rank, code in codes.items() if code is None]
    failures = [code for code in codes.values() if code not in (None, EXIT_OK, EXIT_PREEMPTED)]
    messages = dict.fromkeys(status.message for status in statuses.values() if status.message)
    if failures and set(failures) == {EXIT_USER_ERROR}:
        raise ArcError("\n".join(messages))
    if failures:
        for message in messages:
            logger.error("%s", message)
    elif killed:
        logger.error("ranks %s were killed; the next start resumes from the last checkpoint", killed)
    return joint_exit_code([EXIT_LOST_RANK if code is None else code for code in codes.values()])
