"""An error that one rank finds is raised on all of them."""

from __future__ import annotations

import pytest

from arc_ds import dist
from arc_ds.errors import ArcError, DataError
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


def _disagree() -> tuple[bool, bool]:
    return dist.all_ranks_agree("same"), dist.all_ranks_agree(dist.rank())


def test_error_of_rank_1_is_raised_by_rank_0_with_its_class():
    first, second = run_on_ranks(_fail_on_rank_1)
    assert first == (DataError, "rank 1: shard 7 is torn")
    assert second == (DataError, "shard 7 is torn")


def test_ranks_that_differ_do_not_agree():
    assert run_on_ranks(_disagree) == [(True, False), (True, False)]
