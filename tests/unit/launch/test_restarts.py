"""Restarts after a failure: which codes, how often, and with which hosts."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from arc_ds.commands import train as command
from arc_ds.errors import ConfigError, DataError, LostRankError
from arc_ds.launch import restarts
from arc_ds.launch.exit_codes import EXIT_LOST_RANK, EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.restarts import answering_hosts, choose_hosts, with_restarts


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "_LONGEST_PAUSE_S", 0.01)


class _Run:
    """Starts that end with the given codes or errors, one after the other."""

    def __init__(self, *ends: int | Exception) -> None:
        self.ends = list(ends)
        self.numbers: list[int] = []

    def __call__(self, number: int) -> int:
        self.numbers.append(number)
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def test_a_lost_rank_a_stall_and_an_unknown_failure_are_started_again(caplog: pytest.LogCaptureFixture) -> None:
    run = _Run(4, 5, 1, EXIT_OK)
    assert with_restarts(run, 3) == EXIT_OK
    assert run.numbers == [0, 1, 2, 3]
    assert "ended with code 4 (a rank or host was lost); restart 1 of 3" in caplog.messages[0]
    assert len(caplog.messages) == 3


@pytest.mark.parametrize("code", [0, 2, 3, 6, 7, 8, 75])
def test_other_ends_are_final(code: int) -> None:
    run = _Run(code)
    assert with_restarts(run, 3) == code and run.numbers == [0]


def test_the_last_failure_counts_if_restarts_are_used_up(caplog: pytest.LogCaptureFixture) -> None:
    assert with_restarts(_Run(4, 5, 4), 2) == 4
    assert with_restarts(_Run(4), 0) == 4
    assert len(caplog.messages) == 2, "a restart is announced that does not come"


def test_a_run_may_be_restarted_a_thousand_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause would overflow."""
    monkeypatch.setattr(restarts, "_LONGEST_PAUSE_S", 0.0)
    assert with_restarts(_Run(*[4] * 1100, EXIT_OK), 2000) == EXIT_OK


def test_hosts_that_hang_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_s = 0.0

    class Probe:
        """An ssh process. That of every host but "up" hangs."""

        def __init__(self, command: list[str], **_more: object) -> None:
            self.host = command[-2]

        def wait(self, timeout_s: float) -> int:
            nonlocal waited_s
            if self.host != "up":
                waited_s += timeout_s
                raise subprocess.TimeoutExpired("ssh", timeout_s)
            return 0

        def kill(self) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Probe)
    monkeypatch.setattr(restarts, "time", SimpleNamespace(monotonic=lambda: waited_s))
    assert answering_hosts(["first", "second", "up"]) == {"up"}
    assert waited_s == 2 * restarts._PROBE_S


def test_errors_follow_the_same_rule() -> None:
    assert with_restarts(_Run(LostRankError("gone"), EXIT_OK), 1) == EXIT_OK
    with pytest.raises(DataError, match="torn"):
        with_restarts(_Run(DataError("torn")), 1)
    with pytest.raises(LostRankError, match="again"):
        with_restarts(_Run(LostRankError("gone"), LostRankError("again")), 1)


def test_a_run_that_fails_after_a_stop_request_is_not_started_again() -> None:
    """Also if the run has set handlers of its own meanwhile, as the launch wrapper does."""
    before = signal.getsignal(signal.SIGTERM)

    def start(number: int) -> int:
        assert number == 0
        former = signal.signal(signal.SIGTERM, lambda *_: None)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, former)
        return 4

    assert with_restarts(start, 3) == 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_request_in_the_pause_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes after the code is known."""
    run = _Run(4, EXIT_OK)
    warning = restarts.logger.warning

    def warn_and_stop(*arguments: object) -> None:
        warning(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(restarts.logger, "warning", warn_and_stop)
    with pytest.raises(SystemExit) as ended:
        with_restarts(run, 3)
    assert ended.value.code == EXIT_PREEMPTED and run.numbers == [0]


def test_a_stop_request_before_the_ranks_start_is_obeyed() -> None:
    """While the hosts are probed, for example: the run has set no handlers of its own yet."""
    started = []

    def start(number: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        started.append(number)
        return EXIT_OK

    with pytest.raises(SystemExit) as ended:
        with_restarts(start, 3)
    assert ended.value.code == EXIT_PREEMPTED and not started


def test_as_many_hosts_start_as_divide_the_batch() -> None:
    slots = {"a": 4, "b": 4, "c": 4, "d": 4}
    batch = {"batch_size": 32, "micro_batches": 2}
    assert choose_hosts(slots, slots, **batch, min_hosts=1) == slots
    assert choose_hosts(slots, {"d", "c", "a"}, **batch, min_hosts=1) == {"a": 4, "c": 4}, (
        "12 ranks × 2 do not divide 32"
    )
    assert choose_hosts(slots, {"b"}, **batch, min_hosts=1) == {"b": 4}
    assert choose_hosts(slots, slots, batch_size=32, micro_batches=4, min_hosts=1) == {"a": 4, "b": 4}
    with pytest.raises(ConfigError, match=r"from --min-hosts = 3 to 3 .*divides data.batch_size = 32"):
        choose_hosts(slots, {"d", "c", "a"}, **batch, min_hosts=3)
    with pytest.raises(LostRankError, match=r"1 of 4 hosts answer \(not a, b, d\)"):
        choose_hosts(slots, {"c"}, **batch, min_hosts=2)


def test_a_restart_resumes_what_the_run_has_saved_itself(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`never` refuses a folder with metrics. A path is where the run began, until it has a checkpoint of its own."""
    starts: list[list[str]] = []

    def launch(_module: str, words: list[str], **_more: object) -> int:
        starts.append(words)
        return EXIT_LOST_RANK

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(command, "launch", launch)

    def last_words(resume: str) -> list[str]:
        starts.clear()
        words = [str(config), f"run_dir={tmp_path}", f"checkpoint.resume={resume}", "--restarts=1"]
        assert command.main(words) == EXIT_LOST_RANK
        return [words[-1] for words in starts]

    (begun := tmp_path / "elsewhere" / "step_000001").mkdir(parents=True)
    resumed, elsewhere = "checkpoint.resume=auto", f"checkpoint.resume={begun}"
    assert last_words("never") == ["checkpoint.resume=never", resumed]
    assert last_words(str(begun)) == [elsewhere, elsewhere]
    (tmp_path / "checkpoints" / "step_000008").mkdir(parents=True)
    assert last_words(str(begun)) == [elsewhere, resumed]
