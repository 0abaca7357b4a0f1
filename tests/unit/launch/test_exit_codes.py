"""Exit codes by error class: schedulers retry some failures, but not a user's mistake."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from arc_ds import cli, train
from arc_ds.errors import (
    ArcError,
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    LostRankError,
    NonFiniteError,
    OutOfMemoryError,
    StalledError,
    StorageError,
    TrainingError,
)
from arc_ds.launch import rank
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_USER_ERROR

CODES = [
    (TrainingError, EXIT_FAILED),
    (ConfigError, EXIT_USER_ERROR),
    (DataError, 3),
    (LostRankError, 4),
    (ArcError, EXIT_USER_ERROR),
    (CheckpointError, EXIT_USER_ERROR),
    (StorageError, 3),
    (StalledError, 5),
    (OutOfMemoryError, 6),
    (NonFiniteError, 7),
    (DiskFullError, 8),
]


def _raising(error: ArcError) -> ModuleType:
    def main(_arguments: object) -> int:
        raise error

    return SimpleNamespace(main=main)  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "code"), CODES)
def test_each_kind_of_error_has_its_code_however_a_rank_starts(
    kind: type[ArcError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = _raising(kind("words of the error"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(rank, "import_module", lambda _name: program)
    assert rank._run("a.module", []) == (code, "words of the error")
    monkeypatch.setattr(cli, "import_module", lambda _name: program)
    assert cli.main(["train"]) == code
    assert "words of the error" in capsys.readouterr().err
    monkeypatch.setattr(train, "main", program.main)
    assert train._as_rank([]) == code


def test_under_an_external_launcher_each_host_prints_an_error_of_all_ranks_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = DataError("words")
    shared.is_of_all_ranks = True
    for rank_of_host, error, num_lines in ((0, shared, 1), (3, shared, 1), (3, DataError("words"), 2)):
        monkeypatch.setenv("LOCAL_RANK", str(rank_of_host))
        monkeypatch.setattr(train, "main", _raising(error).main)
        assert train._as_rank([]) == 3
        assert caplog.messages == ["words"] * num_lines
