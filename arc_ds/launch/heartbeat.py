"""Heartbeats between ranks: a lost, failed or stalled rank ends all others, and each of them can name it.

A rank in a collective waits in C code, even if its peer has died. So a thread of each rank watches:

- The thread of rank 0 accepts a connection from every other rank. Each side sends a line every second. A rank's line
  names its current work (`system.activity`).
- Rank 0 decides, and sends one verdict to all. A closed connection means that the rank's process has ended. A silence
  of `distributed.timeout_s` means that the rank is frozen or its host is cut off.
- The other ranks watch rank 0 in the same way.
- A rank that fails says so before it ends. The others have GRACE_S to fail with the same error by themselves.

The thread ends the process itself if the main thread does not: see `status.end_now`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from arc_ds.errors import LostRankError
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_LOST_RANK, EXIT_STALLED
from arc_ds.launch.status import end_now
from arc_ds.system import activity, dist

logger = logging.getLogger(__name__)

# Time for the other ranks to fail with the same error as the first one.
GRACE_S = 5.0
_BEAT_S = 1.0
# The ranks of a host mostly die together. Their connections close within this time, and one message names all of them.
_COLLECT_S = 0.5
_RESUME = "Start the run again: it resumes from its last whole checkpoint (`arc-ds train --restarts N` does that)."


class Verdict(NamedTuple):
    """The end of this process.

    code: its exit code.
    message: for users.
    at: time at which the process must have ended (`time.monotonic`).
    speaks: whether this rank prints the message. One rank of each host does.
    """

    code: int
    message: str
    at: float
    speaks: bool


class _Peer:
    """A connection to another rank, and the latest news from it.

    The first line of a rank is "TOKEN RANK". All other lines, in both directions, are messages in JSON.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.rank = -1  # not introduced yet
        self.host = ""
        self.doing = "starting"
        self.heard = time.monotonic()
        self.is_open = True
        self._inbox = b""
        self._outbox = b""

    def send(self, **message: Any) -> None:
        self.send_line(json.dumps(message))

    def send_line(self, line: str) -> None:
        self._outbox += line.encode() + b"\n"
        with contextlib.suppress(OSError):  # it is full, or closed, which `receive` finds
            self._outbox = self._outbox[self.connection.send(self._outbox) :]

    def receive(self) -> list[bytes]:
        """The lines that have arrived. Clears `is_open` at the end of the connection."""
        try:
            while chunk := self.connection.recv(1 << 16):
                self._inbox += chunk
            self.is_open = False
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False
        *lines, self._inbox = self._inbox.split(b"\n")
        if lines:
            self.heard = time.monotonic()
        return lines


class Heartbeat:
    """The watching thread of a rank. With a world size of 1 there is no thread.

    before_end: called by the thread before it ends the process for a stall, to leave stacks.
    """

    def __init__(self, timeout_s: float) -> None:
        """Connect the ranks and start the thread. Collective. Raises LostRankError if rank 0 cannot be reached.

        timeout_s: silence after which a rank counts as lost.
        """
        self.before_end: Callable[[], None] = lambda: None
        self._timeout_s = timeout_s
        self._beat_s = min(_BEAT_S, timeout_s / 8)
        self._peers: list[_Peer] = []
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._verdict: Verdict | None = None
        self._expected: set[int] = set()  # ranks that rank 0 has not heard from yet
        self._dead: list[_Peer] = []  # closed connections, since the time `_died`
        self._died = 0.0
        self._sent = 0.0
        self._judged = time.monotonic()
        self._news: list[dict[str, Any]] = []  # of the main thread, for the watching thread
        self._hosts = dist.gather_objects(socket.gethostname())
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        if dist.world_size() > 1:
            self._meet()
            self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")
            self._thread.start()

    def fail(self, code: int, message: str) -> None:
        """Tell the other ranks that this one ends with an error. Returns as soon as they know.

        They end with the same code. An error without a code of its own is a lost rank for them.
        """
        told = EXIT_LOST_RANK if code == EXIT_FAILED else code
        self._leave({"kind": "failed", "code": told, "message": message})

    def close(self) -> None:
        """Leave in peace: this rank has finished."""
        self._leave({"kind": "bye"})

    def stalled(self, message: str) -> None:
        """End all ranks with EXIT_STALLED. Returns if the watching thread will do it.

        message: the reason, and the place of the stacks. The verdict adds the work of every rank.
        """
        if self._thread is None:
            self._announce_stall(message)
            assert self._verdict is not None
            self._end(self._verdict)
        self._news.append({"kind": "stalled", "message": message})

    def wait_for_verdict(self, limit_s: float | None = None) -> None:
        """Wait for the cause of an error. If there is one, the thread ends the process here.

        limit_s: None means until rank 0 must have noticed a lost rank.
        """
        if self._thread is not None:
            deadline = time.monotonic() + (self._timeout_s + GRACE_S if limit_s is None else limit_s)
            while time.monotonic() < deadline and self._thread.is_alive():
                if self._verdict is not None:
                    self._verdict = self._verdict._replace(at=0.0)  # this rank has no error of its own
                    threading.Event().wait()
                time.sleep(0.05)

    def _leave(self, news: dict[str, Any]) -> None:
        if self._thread is None:
            return
        self._news.append(news)
        self._is_over.wait(GRACE_S)

    def _meet(self) -> None:
        """Connect every rank with rank 0. Collective."""
        token = secrets.token_hex()
        if dist.is_main():
            address = os.environ["MASTER_ADDR"]
            is_local = address in ("127.0.0.1", "localhost")
            is_dual = not is_local and socket.has_dualstack_ipv6()
            self._listener = socket.create_server(
                ("127.0.0.1" if is_local else "", 0),
                family=socket.AF_INET6 if is_dual else socket.AF_INET,
                backlog=1024,
                dualstack_ipv6=is_dual,
            )
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._expected = set(range(1, dist.world_size()))
        port, self._token = dist.broadcast_object((self._listener and self._listener.getsockname()[1], token))
        self._started = time.monotonic()
        if not dist.is_main():
            try:
                connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=self._timeout_s)
            except OSError as error:
                raise LostRankError(
                    f"{dist.rank_in_words()} cannot reach rank 0 at {os.environ['MASTER_ADDR']}:{port}: {error}. Let "
                    "the hosts of the run reach each other at all ports."
                ) from error
            peer = self._add(connection)
            peer.rank, peer.host = 0, self._hosts[0]
            peer.send_line(f"{self._token} {dist.rank()}")
        # A forked worker would keep the connection of a dead rank open.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        for peer in self._peers:
            peer.connection.close()
        if self._listener is not None:
            self._listener.close()

    def _add(self, connection: socket.socket) -> _Peer:
        peer = _Peer(connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        return peer

    def _remove(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.remove(peer)

    def _watch(self) -> None:
        try:
            while not self._is_over.is_set():
                for key, _ in self._selector.select(self._beat_s / 4):
                    if key.data is None:
                        self._accept()
                    elif key.data in self._peers:
                        self._read(key.data)
                self._beat()
                self._pass_on()
                self._judge_lives()
                if self._verdict is not None and time.monotonic() >= self._verdict.at:
                    self._end(self._verdict)
        except Exception:
            logger.exception("heartbeats have stopped: a lost rank would end this one only by the backend's timeout")
        finally:
            self._is_over.set()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._add(self._listener.accept()[0])

    def _read(self, peer: _Peer) -> None:
        for line in peer.receive():
            if peer.rank >= 0:
                self._take(peer, json.loads(line))
            else:
                self._introduce(peer, line)
            if peer not in self._peers:
                return
        if not peer.is_open:
            self._remove(peer)
            if peer.rank >= 0:
                self._died = self._died if self._dead else time.monotonic()
                self._dead.append(peer)

    def _introduce(self, peer: _Peer, line: bytes) -> None:
        token, _, rank = line.partition(b" ")
        if token != self._token.encode():
            self._remove(peer)  # a stranger
            return
        peer.rank = int(rank)
        peer.host = self._hosts[peer.rank]
        self._expected.discard(peer.rank)

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "beat":
                peer.doing = message["doing"]
            case "bye":
                self._remove(peer)
            case "failed":
                self._remove(peer)
                if dist.is_main():
                    self._announce(message["code"], message["message"], grace_s=GRACE_S, speaking_host=peer.host)
                else:
                    self._decide(message["code"], message["message"], grace_s=GRACE_S, speaks=dist.local_rank() == 0)
            case "stalled":
                self._announce_stall(message["message"])
            case "verdict":
                speaks = dist.rank() in message["speakers"]
                self._decide(message["code"], message["message"], grace_s=message["grace_s"], speaks=speaks)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._sent >= self._beat_s:
            self._sent = now
            for peer in self._peers:
                peer.send(kind="beat", doing=str(activity.now))

    def _pass_on(self) -> None:
        """Do what the main thread asked for."""
        while self._news:
            news = self._news.pop(0)
            if news["kind"] == "stalled" and dist.is_main():
                self._announce_stall(news["message"])
            else:
                for peer in self._peers:
                    peer.send(**news)
            if news["kind"] != "stalled":  # this rank leaves
                self._is_over.set()

    def _judge_lives(self) -> None:
        now = time.monotonic()
        if now - self._judged > self._timeout_s / 2:
            # This rank itself was paused: suspended by SLURM, or in a C call that does not let other threads run. It
            # has heard nobody meanwhile.
            self._started = now
            for peer in self._peers:
                peer.heard = now
        self._judged = now
        if self._dead and now - self._died > _COLLECT_S:
            self._judge_lost(self._dead, "the process has ended or was killed (for lack of memory: see `dmesg`)")
        silence = {peer: now - peer.heard for peer in self._peers if peer.rank >= 0}
        silent = []
        if max(silence.values(), default=0.0) > self._timeout_s:
            # Ranks of one host fall silent together, but their last beats differ.
            silent = [peer for peer, silence_s in silence.items() if silence_s > self._timeout_s - 2 * self._beat_s]
        for peer in silent:
            self._remove(peer)
        if silent:
            self._judge_lost(
                silent,
                f"no sign of life for {self._timeout_s:g} s (distributed.timeout_s), so it is frozen, or its host is "
                "down or cut off from the network",
            )
        elif self._expected and now - self._started > self._timeout_s:
            words = dist.ranks_in_words((rank, self._hosts[rank]) for rank in sorted(self._expected))
            self._announce(EXIT_LOST_RANK, f"{words} did not connect to rank 0 within {self._timeout_s:g} s. {_RESUME}")

    def _judge_lost(self, lost: list[_Peer], how: str) -> None:
        places = _places((peer.rank, peer.host, peer.doing) for peer in lost)
        message = f"lost {places}: {how}. {_RESUME}"
        if dist.is_main():
            self._announce(EXIT_LOST_RANK, message)
        else:
            is_first = dist.local_rank() == (1 if socket.gethostname() == lost[0].host else 0)
            self._decide(EXIT_LOST_RANK, message, grace_s=0.0, speaks=is_first)

    def _announce_stall(self, message: str) -> None:
        others = [(peer.rank, peer.host, peer.doing) for peer in self._peers]
        places = _places([(0, self._hosts[0], str(activity.now)), *others])
        self._announce(EXIT_STALLED, f"{message} Stuck: {places}. {_RESUME}")

    def _announce(self, code: int, message: str, *, grace_s: float = 0.0, speaking_host: str | None = None) -> None:
        """Rank 0: send the verdict to all ranks. On `speaking_host`, the rank that failed prints the message itself."""
        if self._verdict is not None:
            return
        first_of_host: dict[str, int] = {self._hosts[0]: 0}
        for peer in sorted(self._peers, key=lambda peer: peer.rank):
            first_of_host.setdefault(peer.host, peer.rank)
        speakers = [rank for host, rank in first_of_host.items() if host != speaking_host]
        for peer in self._peers:
            peer.send(kind="verdict", code=code, message=message, grace_s=grace_s, speakers=speakers)
        self._decide(code, message, grace_s=grace_s, speaks=0 in speakers)

    def _decide(self, code: int, message: str, *, grace_s: float, speaks: bool) -> None:
        if self._verdict is None:
            self._verdict = Verdict(code, message, time.monotonic() + grace_s, speaks)

    def _end(self, verdict: Verdict) -> None:
        """End the process. Rank 0 first waits until the others have read the verdict and ended."""
        if verdict.code == EXIT_STALLED:
            self.before_end()
        deadline = time.monotonic() + GRACE_S
        while dist.is_main() and self._peers and time.monotonic() < deadline:
            for peer in list(self._peers):
                peer.receive()
                if not peer.is_open:
                    self._remove(peer)
            time.sleep(0.05)
        end_now(verdict.code, verdict.message, speaks=verdict.speaks)


def _places(ranks: Iterable[tuple[int, str, str]]) -> str:
    """Ranks (number, host, activity) in words, with those together that were at the same place."""
    by_place: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for rank, host, doing in sorted(ranks):
        by_place[doing].append((rank, host))
    return "; ".join(f"{dist.ranks_in_words(each)} at {doing}" for doing, each in by_place.items())


_current: Heartbeat | None = None


@contextlib.contextmanager
def beating(timeout_s: float) -> Iterator[Heartbeat]:
    """A block in which the ranks watch each other. Collective at its beginning."""
    global _current
    _current = heartbeat = Heartbeat(timeout_s)
    yield heartbeat
    # An error leaves the block open: `rank.run` still has to tell it to the others.
    heartbeat.close()
    _current = None


def current() -> Heartbeat | None:
    """The heartbeat of this process, if it is in the block of `beating`."""
    return _current
