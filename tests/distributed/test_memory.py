"""Memory of engines, and gathered parameters, while decoders alternate and passes without gradient run between them."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from arc_ds.training.engine import build_engine, place_decoder
from arc_ds.training.memory import EngineMemory, engine_memory, leaked_parameters
from arc_ds.training.optim import PortAdamW
from arc_ds.training.step import train_step
from tests.helpers.distributed import run_on_ranks
from tests.helpers.plain_trainer import (
    BETAS,
    EPS,
    SCHEDULE,
    TASKS,
    step_of_rank,
    tiny_compressor,
    tiny_decoders,
    tiny_ds_config,
    tiny_groups,
)

pytestmark = pytest.mark.distributed

# DeepSpeed #8481 was a leak that only many steps show. `ARC_LONG_STEPS=200` runs that many.
NUM_STEPS = int(os.environ.get("ARC_LONG_STEPS", "12"))
CPU = torch.device("cpu")
FLOAT_BYTES = 4
PERSISTENT = 100


def _ds_config(**zero: Any) -> dict[str, Any]:
    return tiny_ds_config(
        reduce_bucket_size=3000,
        stage3_prefetch_bucket_size=5000,
        stage3_param_persistence_threshold=PERSISTENT,
        **zero,
    )


class Memory(NamedTuple):
    """Findings of one rank.

    memory: of each engine after each step.
    leaked: parameters that were gathered after steps, each as index of its engine and name.
    kept: number of parameters that were gathered after the first pass without gradient.
    released: number of them after their release.
    caused: parameters that were gathered after one was caused on purpose.
    growth: memory that this one takes.
    traced: whether every engine still has its complete trace.
    """

    memory: list[dict[str, EngineMemory]]
    leaked: list[tuple[int, str]]
    kept: int
    released: int
    caused: list[tuple[int, str]]
    growth: int
    traced: bool


def _train(num_steps: int, recomputed: bool) -> Memory:
    compressor = tiny_compressor(activation_checkpointing=recomputed)
    engine = build_engine(compressor, PortAdamW(tiny_groups(compressor), betas=BETAS, eps=EPS), _ds_config())
    decoders = [place_decoder(decoder, _ds_config()) for decoder in tiny_decoders(activation_checkpointing=recomputed)]
    engines: list[Any] = [engine, *(placed.engine for placed in decoders)]
    schedule = replace(SCHEDULE, total_steps=num_steps)

    def measured() -> dict[str, EngineMemory]:
        frozen = {f"decoder {idx}": engine_memory(each.module, None, CPU) for idx, each in enumerate(decoders)}
        return {"encoder": engine_memory(engine.module, engine, CPU), **frozen}

    def gathered() -> list[tuple[int, str]]:
        return [(idx, name) for idx, each in enumerate(engines) for name in leaked_parameters(each.module)]

    memory: list[dict[str, EngineMemory]] = []
    leaked: list[tuple[int, str]] = []
    kept: list[int] = []
    released = 0
    for step in range(num_steps):
        batch = step_of_rank(step, rank=dist.get_rank(), world_size=dist.get_world_size(), num_parts=2)
        train_step(engine, decoders, batch, schedule=schedule, tasks=TASKS)
        memory.append(measured())
        leaked += gathered()
        if step % 3 == 2:
            micro = batch.micro_batches[0]
            with torch.no_grad():
                decoders[micro.decoder_idx](micro.batch, engine(micro.batch, micro.decoder_idx))
            kept.append(len(gathered()))
            for each in engines:
                each.empty_partition_cache()
            released += len(gathered())
    weight: Any = decoders[1].module.layers[0].attention.wq.weight
    before = measured()["decoder 1"].gathered
    weight.all_gather()
    return Memory(
        memory=memory,
        leaked=leaked,
        kept=kept[0],
        released=released,
        caused=gathered(),
        growth=measured()["decoder 1"].gathered - before,
        traced=all(_coordinator(each).is_complete_trace() for each in engines),
    )


def _coordinator(engine: Any) -> Any:
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer).get_param_coordinator()


def _bytes(module: nn.Module, *, at_most: float = math.inf) -> int:
    return FLOAT_BYTES * sum(param.numel() for param in module.parameters() if param.numel() <= at_most)


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
def test_parameters_are_released_after_each_step_and_memory_is_flat(recomputed: bool) -> None:
    encoder, (other, decoder) = tiny_compressor(), tiny_decoders()
    modules = {"encoder": encoder, "decoder 0": other, "decoder 1": decoder}
    persistent = {name: _bytes(module, at_most=PERSISTENT) for name, module in modules.items()}
    for found in run_on_ranks(_train, NUM_STEPS, recomputed, timeout_s=600):
        assert not found.leaked and found.traced
        assert found.kept > 0 and found.released == 0, "a pass without gradient keeps parameters until their release"
        assert found.caused == [(2, "layers.0.attention.wq.weight")]
        assert found.growth == FLOAT_BYTES * decoder.layers[0].attention.wq.weight.numel()
        # By step 6 all groups have been trained and all engines used. After their release, a decoder gathers its
        # persistent parameters again in its next pass.
        for memory in found.memory[6:]:
            for name, most in found.memory[5].items():
                assert memory[name]._replace(gathered=0) == most._replace(gathered=0)
                assert memory[name].gathered <= persistent[name]
        last = found.memory[-1]["encoder"]
        shards = _bytes(encoder) // 2
        # Master weights, two moments, and a step count per group.
        assert last.parameters == last.gradients == shards and last.gathered == persistent["encoder"]
        assert 3 * shards <= last.optimizer < 3 * shards + 1000
        assert found.memory[-1]["decoder 1"].parameters == _bytes(decoder) // 2


def _kept_with_second_shards() -> int:
    decoder = place_decoder(tiny_decoders()[1], _ds_config(zero_hpz_partition_size=2))
    return engine_memory(decoder.module, None, CPU).parameters


def test_the_second_shards_of_hpz_are_counted() -> None:
    """Of two ranks each has half of the decoder twice."""
    assert run_on_ranks(_kept_with_second_shards) == [_bytes(tiny_decoders()[1])] * 2
