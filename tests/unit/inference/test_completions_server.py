"""Many prompts to one server: bounded requests in flight, retries after faults that pass, one error after others."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from arc_ds.errors import ServerError
from arc_ds.inference import completions_server
from arc_ds.inference.completions_server import CompletionsServer, RefusedError
from tests.helpers.faulty_completions import GOOD, SLOW_S, faulty_completions
from tests.helpers.waiting import LIMIT_S, wait_for


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions_server, "_FIRST_WAIT_S", 0.01)


def client(url: str, **settings: Any) -> CompletionsServer:
    return CompletionsServer(
        url, **{"api_key": None, "in_flight": 4, "timeout_s": LIMIT_S, "retry_s": 20.0, **settings}
    )


def bodies(count: int) -> list[Any]:
    return [lambda n=n: {"prompt": [n]} for n in range(count)]


@pytest.mark.parametrize("fault", [429, 500, 503, "closed", "cut", "slow"])
def test_a_fault_that_passes_is_retried(fault: Any) -> None:
    patience = {"timeout_s": SLOW_S / 4} if fault == "slow" else {}
    with faulty_completions(fault, fault) as (url, state):
        assert client(url, **patience).complete(bodies(1)) == [GOOD]
    assert state.bodies == [{"prompt": [0]}] * 3


FAULTS: dict[str, tuple[Any, type[ServerError], str]] = {
    "refused": (400, RefusedError, "answered 400: fault 400"),
    "model": (404, RefusedError, "Check `server.model`"),
    "key": (401, RefusedError, "server.api_key_env"),
    "redirect": (307, RefusedError, "answered 307"),
    "html": ("html", ServerError, "does not speak OpenAI's Completions API"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_fault_is_one_error_at_once(fault: str) -> None:
    kind, error, words = FAULTS[fault]
    with faulty_completions(kind) as (url, state), pytest.raises(error, match=words):
        client(url).complete(bodies(1))
    assert len(state.bodies) == 1


def test_a_fault_that_does_not_pass_is_an_error_after_the_time_for_retries() -> None:
    with (
        faulty_completions(*[503] * 1000) as (url, state),
        pytest.raises(ServerError, match=r"answered 503: fault 503; a request failed \d+ times .* the same command"),
    ):
        client(url, retry_s=0.3).complete(bodies(1))
    assert 2 <= len(state.bodies) < 12, "the waits must grow"


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/"
        with pytest.raises(ServerError, match="cannot be reached.*Start it, or correct `server.url`"):
            client(url).identify("decoder")
        with pytest.raises(ServerError, match="cannot be reached.*start the same command again"):
            client(url, retry_s=0.0).complete(bodies(1))


def test_requests_in_flight_are_bounded_over_all_threads() -> None:
    with faulty_completions(answer_s=0.02) as (url, state), client(url) as server:
        threads = [threading.Thread(target=lambda: server.complete(bodies(6))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(state.bodies) == 18 and state.most == 4


def test_an_error_ends_the_other_requests_of_its_call() -> None:
    with faulty_completions("slow", 400, answer_s=LIMIT_S) as (url, _):
        started = time.monotonic()
        with pytest.raises(RefusedError):
            client(url).complete(bodies(4))
        assert time.monotonic() - started < LIMIT_S / 2


def test_the_end_of_the_block_ends_the_requests_of_other_threads() -> None:
    errors: list[BaseException] = []

    def ask(server: CompletionsServer) -> None:
        try:
            server.complete(bodies(2))
        except ServerError as error:
            errors.append(error)

    with faulty_completions(answer_s=LIMIT_S) as (url, state):
        with client(url) as server:
            thread = threading.Thread(target=ask, args=(server,))
            thread.start()
            wait_for(lambda: len(state.bodies) == 2)
        thread.join(LIMIT_S / 2)
        ask(server)
    assert not thread.is_alive() and ["were ended" in str(error) for error in errors] == [True, True]
