"""An error on one rank is raised on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from arc_ds.errors import ArcError, DataError
from arc_ds.system import dist
from tests.helpers.distributed import run_on_ranks

pytestmark = pytest.mark.distributed


def _fail(messages: Sequence[str]) -> tuple[type, str]:
    """The error on this rank. messages: of the error that each rank raises; empty for none."""
    try:
        with dist.fail_together():
            if message := messages[dist.rank()]:
                raise DataError(message)
    except ArcError as error:
        return type(error), str(error)
    return type(None), "nothing was raised"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (["", "shard 7 is torn"], "rank 1: shard 7 is torn"),
        (["shard 7 is torn", "shard 7 is torn"], "shard 7 is torn"),
        (["shard 0 is torn", "shard 1 is torn"], "rank 0: shard 0 is torn"),
    ],
)
def test_both_ranks_raise_the_first_error_with_its_class_and_words(messages: list[str], expected: str) -> None:
    assert run_on_ranks(_fail, messages) == [(DataError, expected)] * 2
