"""Memory of engines, and gathered parameters, while decoders alternate and passes without gradient run between them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from arc_ds.model.backbone import Recompute
from arc_ds.training.engine import place_decoder
from arc_ds.training.memory import EngineMemory, engine_memory, leaked_parameters
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

# DeepSpeed #8481 was a leak that only many steps show. `ARC_LONG_STEPS=200` runs that many.
NUM_STEPS = int(os.environ.get("ARC_LONG_STEPS", "12"))
CPU = torch.device("cpu")
PERSISTENT = 100


def _train(num_steps: int, recompute: Recompute) -> list[dict[str, EngineMemory]]:
    """Memory of each engine after each step on this rank. Fails if a parameter is or is not gathered unexpectedly."""
    config = tiny_ds_config(
        reduce_bucket_size=3000, stage3_prefetch_bucket_size=5000, stage3_param_persistence_threshold=PERSISTENT
    )
    engine, decoders = tiny_engines(config, activation_checkpointing=recompute)
    engines: list[Any] = [engine, *(placed.engine for placed in decoders)]
    schedule = replace(SCHEDULE, total_steps=num_steps)

    def measured() -> dict[str, EngineMemory]:
        frozen = {f"decoder {idx}": engine_memory(each.module, None, CPU) for idx, each in enumerate(decoders)}
        return {"encoder": engine_memory(engine.module, engine, CPU), **frozen}

    def gathered() -> list[tuple[int, str]]:
        return [(idx, name) for idx, each in enumerate(engines) for name in leaked_parameters(each.module)]

    memory = []
    for step in range(num_steps):
        batch = step_of_rank(step, rank=dist.get_rank(), world_size=dist.get_world_size(), num_parts=2)
        train_step(engine, decoders, batch, schedule=schedule, tasks=TASKS)
        memory.append(measured())
        assert not gathered()
        if step % 3 == 2:
            micro = batch.micro_batches[0]
            with torch.no_grad():
                decoders[micro.decoder_idx](micro.batch, engine(micro.batch, micro.decoder_idx))
            assert gathered(), "a pass without gradient keeps parameters until their release"
            for each in engines:
                each.empty_partition_cache()
            assert not gathered()
    assert all(_coordinator(each).is_complete_trace() for each in engines)
    weight: Any = decoders[1].module.layers[0].attention.wq.weight
    before = measured()["decoder 1"].gathered
    weight.all_gather()
    assert gathered() == [(2, "layers.0.attention.wq.weight")]
    assert measured()["decoder 1"].gathered - before == weight.nbytes > 0
    return memory


def _coordinator(engine: Any) -> Any:
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer).get_param_coordinator()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_parameters_are_released_after_each_step_and_memory_is_flat(recompute: Recompute) -> None:
    encoder, (other, decoder) = tiny_compressor(), tiny_decoders()
    modules = {"encoder": encoder, "decoder 0": other, "decoder 1": decoder}
    persistent = {name: parameter_bytes(module, at_most=PERSISTENT) for name, module in modules.items()}
    for found in run_on_ranks(_train, NUM_STEPS, recompute):
        # By step 6 all groups have been trained and all engines used. After their release, a decoder gathers its
        # persistent parameters again in its next pass.
        for memory in found[6:]:
            for name, most in found[5].items():
                assert memory[name]._replace(gathered=0) == most._replace(gathered=0)
                assert memory[name].gathered <= persistent[name]
        last = found[-1]["encoder"]
        shards = parameter_bytes(encoder) // 2
        # Master weights, two moments, and a step count per group.
        assert last.parameters == last.gradients == shards and last.gathered == persistent["encoder"]
        assert 3 * shards <= last.optimizer < 3 * shards + 1000
        assert found[-1]["decoder 1"].parameters == parameter_bytes(decoder) // 2


def _kept_with_second_shards() -> int:
    config = tiny_ds_config(zero_hpz_partition_size=2, stage3_param_persistence_threshold=PERSISTENT)
    return engine_memory(place_decoder(tiny_decoders()[1], config).module, None, CPU).parameters


def test_the_second_shards_of_hpz_are_counted() -> None:
    """Of two ranks each has half of the decoder twice."""
    assert run_on_ranks(_kept_with_second_shards) == [parameter_bytes(tiny_decoders()[1])] * 2
