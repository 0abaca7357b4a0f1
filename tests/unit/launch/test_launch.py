"""Decisions of the launch wrapper: number of ranks, command line and exit code."""

from __future__ import annotations

import base64
import json

import pytest

from arc_ds.commands.train import _parser, main
from arc_ds.errors import ArcError, ConfigError
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_LOST_RANK, EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.order import Place
from arc_ds.launch.status import RankStatus
from arc_ds.launch.wrapper import _command, _environment, _result, choose_num_procs

_ALONE = Place((2,), 0, "127.0.0.1", 29500)


def _statuses(*codes: int | None, message: str | None = None) -> dict[int, RankStatus]:
    return {rank: RankStatus(pid=1, exit_code=code, message=message) for rank, code in enumerate(codes)}


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), EXIT_OK),
        ((75, 75), EXIT_PREEMPTED),
        ((0, 75), EXIT_PREEMPTED),
        ((0, 3), 3),
        ((1, 2), 1),
        ((None, 0), EXIT_LOST_RANK),
        ((None, None), EXIT_LOST_RANK),
        ((None, 75), EXIT_LOST_RANK),
        ((4, None), EXIT_LOST_RANK),
        ((4, 1), EXIT_FAILED),
        ((4, 6), 6),
        ((75, 7), 7),
    ],
)
def test_the_runs_exit_code_is_made_of_the_ranks(codes: tuple[int | None, ...], expected: int) -> None:
    assert _result(_statuses(*codes), ranks=range(2), launcher_code=0) == expected


def test_a_rank_that_never_started_is_a_failure() -> None:
    assert _result(_statuses(0), ranks=range(2), launcher_code=0) == EXIT_LOST_RANK
    assert _result({}, ranks=range(2), launcher_code=0) == EXIT_FAILED
    assert _result({}, ranks=range(2), launcher_code=4) == 4


def test_a_users_mistake_is_raised_once_with_the_ranks_words() -> None:
    with pytest.raises(ArcError, match=r"\Awrong key\Z"):
        _result(_statuses(2, 2, message="wrong key"), ranks=range(2), launcher_code=1)


def test_a_failures_words_are_said_once_whichever_rank_has_them(caplog: pytest.LogCaptureFixture) -> None:
    statuses = {0: RankStatus(pid=1), 1: RankStatus(pid=2, exit_code=1, message="ten steps in a row were not finite")}
    assert _result(statuses, ranks=range(2), launcher_code=1) == 1
    assert _result(_statuses(1, 1, message="ten steps in a row were not finite"), ranks=range(2), launcher_code=1) == 1
    assert caplog.messages == ["ten steps in a row were not finite"] * 2


def test_the_number_of_ranks_fits_the_host() -> None:
    assert choose_num_procs(None, "cpu") == 1
    assert choose_num_procs(3, "cpu") == 3
    with pytest.raises(ConfigError, match="expected at least 1"):
        choose_num_procs(0, "cpu")


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arc_ds.launch.wrapper.wanted_kind", lambda _request: "cuda")
    monkeypatch.setattr("arc_ds.launch.wrapper.num_local_devices", lambda _request: 4)
    assert choose_num_procs(4, "auto") == choose_num_procs(None, "auto") == 4
    with pytest.raises(ConfigError, match=r"--num-procs is 5, but this host has 4 devices"):
        choose_num_procs(5, "auto")


def _devices(command: list[str]) -> list[object]:
    (world,) = [word.partition("=")[2] for word in command if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(world))["host0"]


def test_devices_that_the_user_has_chosen_stay_chosen() -> None:
    assert _devices(_command("m", ["c.yaml"], _ALONE, {"CUDA_VISIBLE_DEVICES": "5,3,1"})) == ["5", "3"]
    assert _devices(_command("m", ["c.yaml"], _ALONE, {})) == [0, 1]
    on_cpu = _command("m", ["c.yaml", "a.b=1"], _ALONE, {"CUDA_VISIBLE_DEVICES": "5", "DS_ACCELERATOR": "cpu"})
    assert _devices(on_cpu) == [0, 1]
    assert on_cpu[-5:] == ["--module", "arc_ds.launch.rank", "m", "c.yaml", "a.b=1"]


def test_threads_that_the_user_has_set_stay_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert _environment("f", 2, "cpu")["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("arc_ds.launch.wrapper.num_cores", lambda: 9)
    environment = _environment("f", 2, "cpu")
    assert (environment["OMP_NUM_THREADS"], environment["DS_ACCELERATOR"]) == ("4", "cpu")


def test_options_may_stand_between_overrides() -> None:
    arguments = _parser().parse_intermixed_args(["c.yaml", "a.b=1", "--num-procs", "2", "c=-1"])
    assert (arguments.config, arguments.overrides, arguments.num_procs) == ("c.yaml", ["a.b=1", "c=-1"], 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--restarts=-1"], "--restarts is -1, expected at least 0"),
        (["--min-hosts=2"], "--min-hosts needs --hostfile"),
        (["--min-hosts=0", "--hostfile=hosts"], "--min-hosts is 0, expected at least 1"),
        (["--min-hosts=1", "--hostfile=hosts"], "--hostfile needs ssh"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_starts(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=words):
        main(["run.yaml", *options])
