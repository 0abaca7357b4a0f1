"""Counted bytes of collectives against bytes derived from parameter sizes."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from arc_ds.training import collectives
from arc_ds.training.collectives import ENCODER, Collective, counting_collectives, sent_bytes
from arc_ds.training.step import train_step
from tests.helpers.distributed import run_on_ranks
from tests.helpers.plain_trainer import (
    SCHEDULE,
    TASKS,
    parameter_bytes,
    step_of_rank,
    tiny_compressor,
    tiny_decoders,
    tiny_ds_config,
    tiny_engines,
)

pytestmark = pytest.mark.distributed

NUM_PARTS = 2
NUM_STEPS = 5
DECODER_OF_STEP = (0, 0, 0, 1, 0)
PERSISTENT = 100

StepCounts = list[Counter[Collective]]


def _counts(persistence_threshold: int, attributed: bool = True) -> StepCounts:
    """Counts of each step, with two sharded decoders.

    ZeRO-3 gathers parameters above the threshold in every forward and every backward pass of their modules.
    """
    engine, decoders = tiny_engines(
        tiny_ds_config(
            num_parts=NUM_PARTS,
            stage3_max_reuse_distance=0,
            stage3_prefetch_bucket_size=0,
            stage3_param_persistence_threshold=persistence_threshold,
        )
    )
    by_step = []
    names = {f"decoder {idx}": placed.engine for idx, placed in enumerate(decoders)}
    with counting_collectives(names if attributed else {}) as counter:
        for step in range(NUM_STEPS):
            batch = step_of_rank(step, rank=dist.get_rank(), world_size=dist.get_world_size(), num_parts=NUM_PARTS)
            train_step(engine, decoders, batch, schedule=SCHEDULE, tasks=TASKS)
            by_step.append(counter.read())
    dist.all_reduce(torch.ones(3))
    assert not counter.read(), "counted after the end of the context"
    assert not any("fetch_sub_module" in vars(placed.engine.optimizer.get_param_coordinator()) for placed in decoders)
    return by_step


def _shard_bytes(own: int) -> int:
    """Wrong: bytes of this rank's shard instead of the full tensor."""
    return own // dist.get_world_size()


def _counts_of_shards() -> StepCounts:
    num_bytes = collectives._num_bytes
    with mock.patch.object(collectives, "_num_bytes", lambda tensors: _shard_bytes(num_bytes(tensors))):
        return _counts(0)


def _expected(step: int, persistence_threshold: int) -> dict[tuple[str, str], int]:
    """Full bytes by engine and collective: two gathers and one reduction per micro-batch."""
    encoder, decoder_idx = tiny_compressor(), DECODER_OF_STEP[step]
    decoder = tiny_decoders()[decoder_idx]
    # Two shards without padding.
    assert all(param.numel() % 2 == 0 for module in (encoder, decoder) for param in module.parameters())
    sharded = parameter_bytes(encoder, above=persistence_threshold)
    # ZeRO-3 gathers persistent parameters again after the update, once per step.
    persistent = parameter_bytes(encoder) - sharded
    # A tied matrix belongs to two modules, and each of them gathers it.
    tied = decoder.tok_embeddings.weight.nbytes if decoder.config.tie_embeddings else 0
    return {
        (ENCODER, "all_gather"): 2 * NUM_PARTS * sharded + persistent,
        (ENCODER, "reduce_scatter"): NUM_PARTS * parameter_bytes(encoder),
        (f"decoder {decoder_idx}", "all_gather"): 2
        * NUM_PARTS
        * (parameter_bytes(decoder, above=persistence_threshold) + tied),
    }


def _found(counts: Counter[Collective]) -> dict[tuple[str, str], int]:
    assert {kind.num_ranks for kind in counts} == {2}
    large = ("all_gather", "reduce_scatter")
    return {(kind.engine, kind.op): full_bytes for kind, full_bytes in counts.items() if kind.op in large}


@pytest.mark.parametrize("persistence_threshold", [0, PERSISTENT])
def test_bytes_of_a_step_follow_from_parameter_sizes(persistence_threshold: int) -> None:
    first, second = run_on_ranks(_counts, persistence_threshold)
    assert first == second
    # The first pass records the order of modules, and gathers persistent parameters once more.
    steps = range(0 if persistence_threshold == 0 else 1, NUM_STEPS)
    for step in steps:
        if persistence_threshold and step == DECODER_OF_STEP.index(1):
            continue  # the same for the other decoder
        assert _found(first[step]) == _expected(step, persistence_threshold), step
        # Label counts and notices, losses, gradient norm and overflow flags are a few numbers each.
        assert 0 < first[step][Collective(ENCODER, "all_reduce", 2)] < 1000


def test_counts_without_attribution_or_of_shards_are_wrong() -> None:
    step, expected = NUM_STEPS - 1, _expected(NUM_STEPS - 1, 0)
    joined = _found(run_on_ranks(_counts, 0, False)[0][step])
    assert joined != expected and sum(joined.values()) == sum(expected.values())
    halved = _found(run_on_ranks(_counts_of_shards)[0][step])
    assert halved == {kind: full_bytes // 2 for kind, full_bytes in expected.items()}


def _all_kinds() -> dict[str, int]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    part, full = torch.ones(3), torch.ones(3 * world_size)  # 12 and 24 bytes
    parts = [torch.ones(3) for _ in range(world_size)]
    with counting_collectives({}) as outer, counting_collectives({}) as counter:
        dist.all_gather(parts, part)
        dist.all_gather_into_tensor(full, part)
        dist.reduce_scatter_tensor(part, full)
        dist.reduce_scatter(part, parts)
        dist.all_reduce(part, async_op=True).wait()
        dist.all_reduce_coalesced([part, part])
        dist.all_to_all_single(full, torch.ones_like(full))
        dist.broadcast(part, 0)
        dist.reduce(part, 0)
        dist.gather(part, parts if rank == 0 else None)
        dist.barrier()
        counts = counter.read()
        assert counts == outer.read()
    return {kind.op: full_bytes for kind, full_bytes in counts.items()}


def test_every_kind_is_counted_by_its_full_tensor() -> None:
    first, second = run_on_ranks(_all_kinds)
    expected = {
        "all_gather": 48,
        "reduce_scatter": 48,
        "all_reduce": 12 + 24,
        "all_to_all": 24,
        "broadcast": 12,
        "reduce": 12,
        "gather": 24,
    }
    assert first == expected
    assert second == expected | {"gather": 12}  # only the destination has the output


@pytest.mark.parametrize(("op", "expected"), [("all_gather", 75), ("reduce_scatter", 75), ("all_reduce", 150)])
def test_bytes_on_the_network(op: str, expected: int) -> None:
    assert sent_bytes(Collective(ENCODER, op, 4), 100) == expected
    assert sent_bytes(Collective(ENCODER, op, 1), 100) == 0
