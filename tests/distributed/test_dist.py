"""An error on one rank is raised on all ranks."""

from __future__ import annotations

import pytest

from arc_ds.errors import ArcError, DataError
from arc_ds.system import dist
from tests.helpers.distributed import run_on_ranks

pytestmark = pytest.mark.distributed


def _fail_on_rank_1() -> tuple[type, str]:
    try:
        with dist.fail_together():
            if dist.rank() == 1:
                raise DataError("shard 7 is torn")
    except ArcError as error:
        return type(error), str(error)
    return type(None), "nothing was raised"


def _fail_on_both(differ: bool) -> tuple[type, str]:
    try:
        with dist.fail_together():
            raise DataError(f"shard {dist.rank() if differ else 7} is torn")
    except ArcError as error:
        return type(error), str(error)


def test_error_of_rank_1_is_raised_by_both_with_its_class_and_words():
    assert run_on_ranks(_fail_on_rank_1) == [(DataError, "rank 1: shard 7 is torn")] * 2


def test_errors_of_both_are_one_error():
    assert run_on_ranks(_fail_on_both, False) == [(DataError, "shard 7 is torn")] * 2
    assert run_on_ranks(_fail_on_both, True) == [(DataError, "rank 0: shard 0 is torn")] * 2
