"""Rank 0 and the heartbeats of hundreds of ranks, as plain sockets. `distributed/test_launch.py` has real ranks."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from arc_ds.launch import heartbeat
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_LOST_RANK, EXIT_OUT_OF_MEMORY, EXIT_STALLED
from arc_ds.launch.heartbeat import Heartbeat

NUM_RANKS, PER_HOST = 256, 8
LIMIT_S = 60.0


class _Ended(Exception):
    """Stands for the end of the process, in the watching thread."""


class _Run:
    """Rank 0, and a socket for each other rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, timeout_s: float, address: str = "127.0.0.1") -> None:
        self.end: tuple[int, str] | None = None
        hosts = [f"node{rank // PER_HOST}" for rank in range(NUM_RANKS)]
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setattr(heartbeat.dist, "world_size", lambda: NUM_RANKS)
        monkeypatch.setattr(heartbeat.dist, "gather_objects", lambda _own: hosts)
        monkeypatch.setattr(heartbeat, "end_now", self._end)
        monkeypatch.setattr(heartbeat, "GRACE_S", 0.5)
        monkeypatch.setattr(heartbeat.logger, "exception", lambda *_: None)
        self.heart = Heartbeat(timeout_s)
        assert self.heart._listener is not None
        self.port = self.heart._listener.getsockname()[1]
        self.ranks = {rank: socket.create_connection(("127.0.0.1", self.port)) for rank in range(1, NUM_RANKS)}
        for rank in self.ranks:
            self.ranks[rank].sendall(f"{self.heart._token} {rank}\n".encode())
            self.say(rank, kind="beat", doing=f"step 3, encoder layer {rank // 100}")

    def _end(self, code: int, message: str, **_: Any) -> None:
        self.end = code, message
        raise _Ended

    def say(self, speaker: int, **message: Any) -> None:
        self.ranks[speaker].sendall(json.dumps(message).encode() + b"\n")

    def wait(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_all(self) -> None:
        last = f"step 3, encoder layer {(NUM_RANKS - 1) // 100}"
        self.wait(lambda: not self.heart._expected and self.heart._peers[-1].doing == last)

    def verdict(self, rank: int, kind: str = "verdict") -> dict[str, Any]:
        """The verdict that a rank reads, or its first message of another kind."""
        for line in self.ranks[rank].makefile():
            message = json.loads(line)
            if message["kind"] == kind:
                return message
        raise AssertionError(f"no {kind} for rank {rank}")


@pytest.fixture
def make_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., _Run]]:
    runs: list[_Run] = []

    def make(*arguments: Any) -> _Run:
        runs.append(_Run(monkeypatch, *arguments))
        return runs[-1]

    yield make
    for run in runs:
        for connection in run.ranks.values():
            connection.close()
        run.heart.close()
        assert run.heart._thread is not None
        run.heart._thread.join(LIMIT_S)
        run.heart._forget()  # a process has one heartbeat, which stays until it ends


def test_a_dead_host_is_named_to_every_other_rank(make_run: Callable[..., _Run]) -> None:
    run = make_run(600.0)
    run.wait_for_all()
    for rank in range(8, 16):
        run.ranks.pop(rank).close()
    verdicts = [run.verdict(rank) for rank in (1, 100, NUM_RANKS - 1)]
    assert verdicts[0] == verdicts[1] == verdicts[2]
    message = verdicts[0]["message"]
    assert verdicts[0]["code"] == EXIT_LOST_RANK
    assert "lost ranks 8-15 on node1 at step 3, encoder layer 0: the process has ended or was killed" in message
    assert verdicts[0]["speakers"] == [0, *range(16, NUM_RANKS, PER_HOST)]
    run.wait(lambda: run.end)
    assert run.end == (EXIT_LOST_RANK, message)


def test_silent_ranks_are_named_together(make_run: Callable[..., _Run]) -> None:
    """All ranks but those of one host go on sending."""
    run = make_run(3.0)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.2):
            for rank in [*range(1, 8), *range(16, NUM_RANKS)]:
                run.say(rank, kind="beat", doing="step 4, backward")

    thread = threading.Thread(target=beat)
    thread.start()
    verdict = run.verdict(1)
    stop.set()
    thread.join()
    assert "lost ranks 8-15 on node1 at step 3, encoder layer 0: no sign of life for 3 s" in verdict["message"]


@pytest.mark.parametrize(
    ("silent", "absent", "words"),
    [
        (range(8, 16), set(), "lost ranks 8-15 on node1 at step 3, encoder layer 0: no sign of life for 60 s"),
        (range(0), {9}, "rank 9 on node1 did not connect to rank 0 within 60 s"),
    ],
    ids=["silent", "absent"],
)
def test_a_rank_is_lost_once_the_timeout_is_over(
    make_run: Callable[..., _Run], monkeypatch: pytest.MonkeyPatch, silent: range, absent: set[int], words: str
) -> None:
    now = 0.0
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    run = make_run(60.0)
    run.wait_for_all()
    run.heart._expected = absent
    speaking = [peer for peer in run.heart._peers if peer.rank not in silent]

    def has_heard_and_judged() -> bool:
        return run.heart._judged == now == min(peer.heard for peer in speaking)

    for moment in (25.0, 50.0, 60.0, 61.0):  # a step of more than half the timeout would be a pause of rank 0
        now = moment
        for peer in speaking:
            run.say(peer.rank, kind="beat", doing="step 4, backward")
        run.wait(has_heard_and_judged)
    run.wait(lambda: run.heart._verdict)
    verdict = run.heart._verdict
    assert verdict is not None and words in verdict.message and verdict.at == 61.0


def test_a_pause_of_rank_0_is_no_silence_of_the_others(
    make_run: Callable[..., _Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM suspends all ranks for an hour, for example."""
    pause_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + pause_s, sleep=time.sleep)
    monkeypatch.setattr(heartbeat, "time", clock)
    run = make_run(60.0)
    run.wait_for_all()
    pause_s = 3600.0
    for _ in range(2):  # the first beat after the pause comes before the first judgement
        sent = run.heart._sent
        run.wait(lambda: run.heart._sent > sent)  # noqa: B023
    assert run.heart._verdict is None and run.end is None
    for connection in run.ranks.values():
        connection.close()
    run.wait(lambda: run.end)


def test_a_failed_rank_passes_its_code_and_message_on_and_a_stall_lists_all_places(
    make_run: Callable[..., _Run],
) -> None:
    run = make_run(600.0)
    run.wait_for_all()
    run.say(200, kind="failed", code=EXIT_OUT_OF_MEMORY, message="rank 200 needs more")
    verdict = run.verdict(1)
    assert (verdict["code"], verdict["message"]) == (EXIT_OUT_OF_MEMORY, "rank 200 needs more")
    assert verdict["speakers"] == [rank for rank in range(0, NUM_RANKS, PER_HOST) if rank != 200]

    run = make_run(600.0)
    run.wait_for_all()
    run.say(7, kind="beat", doing="step 3, waiting for data")
    run.say(7, kind="stalled", message="no step has ended.")
    verdict = run.verdict(1)
    assert verdict["code"] == EXIT_STALLED
    assert "rank 7 on node0 at step 3, waiting for data" in verdict["message"]
    assert "ranks 1-6 on node0, ranks 8-15 on node1" in verdict["message"]


@pytest.mark.parametrize(("code", "told"), [(EXIT_FAILED, EXIT_LOST_RANK), (EXIT_OUT_OF_MEMORY, EXIT_OUT_OF_MEMORY)])
def test_an_error_without_a_code_of_its_own_is_a_lost_rank_for_the_others(
    make_run: Callable[..., _Run], code: int, told: int
) -> None:
    run = make_run(600.0)
    run.wait_for_all()
    run.heart.fail(code, "words")
    failed = run.verdict(1, "failed")
    assert (failed["code"], failed["message"]) == (told, "words")


def test_a_forked_worker_does_not_hide_the_end_of_its_rank(make_run: Callable[..., _Run]) -> None:
    run = make_run(600.0)
    run.wait_for_all()
    read_end, write_end = os.pipe()
    if (worker := os.fork()) == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    run.heart._forget()  # the end of this process would close the connections, too
    run.ranks[1].settimeout(LIMIT_S)
    try:
        while run.ranks[1].recv(1 << 16):
            pass
    finally:
        os.close(write_end)
        os.close(read_end)
        os.waitpid(worker, 0)


def test_a_stranger_decides_nothing(make_run: Callable[..., _Run]) -> None:
    run = make_run(600.0)
    run.wait_for_all()
    for words in (b'{"kind": "failed", "code": 6, "message": "no"}\n', b"GET / HTTP/1.1\r\n\r\n", b"\xff 1\n", b""):
        with socket.create_connection(("127.0.0.1", run.port), LIMIT_S) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1 << 16) is not None
    run.say(1, kind="bye")
    run.wait(lambda: len(run.heart._peers) == NUM_RANKS - 2)
    assert run.heart._verdict is None and run.end is None


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no IPv6")
def test_rank_0_is_reached_over_ipv4_and_ipv6(make_run: Callable[..., _Run]) -> None:
    run = make_run(600.0, "node0")
    run.wait_for_all()  # over IPv4
    socket.create_connection(("::1", run.port), timeout=LIMIT_S).close()
