"""`arc-ds train`: the deepspeed launcher on all local devices, wrapped so that signals and exit codes come through.

SIGTERM to `deepspeed` orphans the ranks or kills them while they save, and a killed rank can end in exit code 0
(design 8.12).
Here the launcher runs in its own session, out of reach of the terminal's signals; SIGTERM, SIGUSR1 and the first
Ctrl-C go to the ranks, which save at the next step boundary and stop; and the exit code is made of what each rank
has left in a file (`arc_ds.launch.rank`), or has not left because it was killed.
"""

from __future__ import annotations

import argparse
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
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType

from arc_ds.errors import ArcError, ConfigError
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR
from arc_ds.launch.rank import STATUS_FOLDER_VARIABLE, WRAPPER_PID_VARIABLE, RankStatus, read_statuses
from arc_ds.launch.signals import die_with_parent
from arc_ds.system import dist
from arc_ds.system.device import num_local_devices, wanted_kind
from arc_ds.system.processes import num_cores

logger = logging.getLogger(__name__)

TRAIN_MODULE = "arc_ds.train"
# How long the other ranks may take to end after one has failed: time to report the same error, not to train on.
GRACE_S = 10.0
_POLL_S = 0.1
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# DeepSpeed's launcher sets it from the devices that it is told, so what the user has chosen must be told to it.
_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def main(argv: Sequence[str]) -> int:
    """`CONFIG.yaml [--num-procs N] [key.path=value ...]` → exit code. Under a launcher: this rank's training.

    ConfigError for what is wrong with the config or the number of processes, before anything is started.
    """
    if dist.under_launcher():
        return int(import_module(TRAIN_MODULE).main(list(argv)))
    if "--keys" in argv:
        from arc_ds.config.keys import print_keys

        return print_keys([word for word in argv if word != "--keys"])
    arguments = _parser().parse_intermixed_args(list(argv))
    from arc_ds.config.load import load_config
    from arc_ds.config.validate import check_paths
    from arc_ds.planning.sizes import check_tasks

    config = load_config(arguments.config, arguments.overrides)
    check_tasks(config)
    check_paths(config)
    num_procs = choose_num_procs(arguments.num_procs, config.device)
    return launch(
        TRAIN_MODULE, [arguments.config, *arguments.overrides], num_procs=num_procs, device_request=config.device
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arc-ds train", description="Train a config with the deepspeed launcher on this host's devices."
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes of the config")
    parser.add_argument("--keys", nargs="?", metavar="PATTERN", help="only list the config's keys that match (*data*)")
    parser.add_argument("--num-procs", type=int, help="processes (default: one a GPU, or one on the CPU)")
    return parser


def choose_num_procs(asked: int | None, device_request: str) -> int:
    """How many ranks to start on this host; ConfigError for a number below 1 or above that of the GPUs."""
    if asked is None:
        return num_local_devices(device_request)
    if asked < 1:
        raise ConfigError(f"--num-procs is {asked}, expected at least 1")
    if _on_cpu(device_request):
        return asked
    if asked > num_local_devices(device_request):
        raise ConfigError(
            f"--num-procs is {asked}, but this host has {num_local_devices(device_request)} devices. "
            "Ask for at most that many, or run on the CPU with device=cpu."
        )
    return asked


def launch(module: str, arguments: Sequence[str], *, num_procs: int, device_request: str = "auto") -> int:
    """Run `module.main(arguments)` on `num_procs` ranks of this host and return the run's exit code.

    0: all ranks returned 0. EXIT_PREEMPTED: all obeyed a stop signal. Otherwise the first failing rank's code, or
    EXIT_FAILED where a rank was killed or never started. What all failing ranks call a user's mistake is raised as
    ArcError with their words.
    """
    with tempfile.TemporaryDirectory(prefix="arc_ds_launch_") as folder:
        environment = _environment(folder, num_procs, device_request)
        command = _command(module, arguments, num_procs, environment)
        watch = _Watch(folder=Path(folder), num_procs=num_procs)
        former = {number: signal.signal(number, watch.on_signal) for number in _FORWARDED}
        try:
            # Its own session: Ctrl-C in the terminal reaches this process alone, which passes it on.
            launcher = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)
            watch.until_end(launcher)
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return _result(read_statuses(Path(folder)), num_procs, launcher.returncode)


def _command(module: str, arguments: Sequence[str], num_procs: int, environment: Mapping[str, str]) -> list[str]:
    """DeepSpeed's launcher of one node. The `deepspeed` command would start this same one, after 5 s of imports for
    reading a hostfile, and would take /job/hostfile and thus other hosts where there is one.
    """
    visible = [name for name in environment.get(_VISIBLE_DEVICES, "").split(",") if name]
    on_cpu = environment.get("DS_ACCELERATOR") == "cpu"
    devices = list(range(num_procs)) if on_cpu or not visible else visible[:num_procs]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={dist.free_port()}"]
    # Its one message says which command failed with which code, after the rank itself has said why.
    options += ["--no_local_rank", "--log_level=critical", "--module"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *options, "arc_ds.launch.rank", module, *arguments]


def _environment(folder: str, num_procs: int, device_request: str) -> dict[str, str]:
    environment = {**os.environ, STATUS_FOLDER_VARIABLE: folder, WRAPPER_PID_VARIABLE: str(os.getpid())}
    # torch's default is all cores for every process, which then fight for them.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_procs)))
    if _on_cpu(device_request):
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _on_cpu(device_request: str) -> bool:
    return wanted_kind(device_request) == "cpu"


def _end_with_parent() -> None:
    die_with_parent()


@dataclass(kw_only=True)
class _Watch:
    """Stands between the caller's signals and the ranks while they run."""

    folder: Path
    num_procs: int
    _asked: signal.Signals | None = None
    _interrupts: int = 0
    _told: set[int] = field(default_factory=set)
    _over_since: float | None = None

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
        # For the ranks Ctrl-C is a stop like any other: save, then end.
        self._asked = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM

    def until_end(self, launcher: subprocess.Popen[bytes]) -> None:
        """Pass signals on until the launcher has ended; end what should not live on."""
        while launcher.poll() is None:
            statuses = read_statuses(self.folder)
            self._pass_on(statuses)
            if self._should_be_over(statuses) or self._interrupts > 1:
                _kill_session(launcher.pid, statuses)
            time.sleep(_POLL_S)
        # The launcher's death does not prove the ranks'.
        _kill_session(launcher.pid, read_statuses(self.folder))

    def _pass_on(self, statuses: Mapping[int, RankStatus]) -> None:
        """Each rank is told once, those that start later too."""
        if self._asked is None:
            return
        for rank, status in statuses.items():
            if rank not in self._told and status.exit_code is None:
                with suppress(ProcessLookupError):
                    os.kill(status.pid, self._asked)
                self._told.add(rank)

    def _should_be_over(self, statuses: Mapping[int, RankStatus]) -> bool:
        """Whether a rank has failed, or all have ended, and the others' or the launcher's grace has passed."""
        codes = [_code(status) for status in statuses.values()]
        failed = any(code not in (None, EXIT_OK, EXIT_PREEMPTED) for code in codes)
        if not failed and not (len(codes) == self.num_procs and None not in codes):
            return False
        self._over_since = self._over_since or time.monotonic()
        return time.monotonic() - self._over_since > GRACE_S


def _code(status: RankStatus) -> int | None:
    """A rank's exit code; EXIT_FAILED where it is gone without a word (killed); None while it runs."""
    if status.exit_code is not None:
        return status.exit_code
    return None if _is_running(status.pid) else EXIT_FAILED


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_session(leader: int, statuses: Mapping[int, RankStatus]) -> None:
    """End the launcher's process group; ranks are in it, unless something between has moved them."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for status in statuses.values():
        if status.exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(status.pid, signal.SIGKILL)


def _result(statuses: Mapping[int, RankStatus], num_procs: int, launcher_code: int) -> int:
    if not statuses:
        logger.error("the deepspeed launcher ended with code %d before any rank started", launcher_code)
        return launcher_code if launcher_code > 0 else EXIT_FAILED
    codes = {rank: statuses[rank].exit_code if rank in statuses else None for rank in range(num_procs)}
    killed = [rank for rank, code in codes.items() if code is None]
    failed = [code for code in codes.values() if code not in (None, EXIT_OK, EXIT_PREEMPTED)]
    if failed and set(failed) == {EXIT_USER_ERROR}:
        raise ArcError("\n".join(dict.fromkeys(status.message for status in statuses.values() if status.message)))
    if failed:
        for words in dict.fromkeys(status.message for status in statuses.values() if status.message):
            logger.error("%s", words)
        return next(code for code in failed if code is not None)
    if killed:
        logger.error("ranks %s were killed; the run goes on from its last checkpoint at the next start", killed)
        return EXIT_FAILED
    return EXIT_PREEMPTED if EXIT_PREEMPTED in codes.values() else EXIT_OK
