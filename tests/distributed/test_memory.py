"""Memory of engines, and gathered parameters, while decoders alternate and passes without gradient run between them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

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
    tiny_groups,
)

pytestmark = pytest.mark.distributed

# DeepSpeed #8481 was a leak that only many steps show. `ARC_LONG_STEPS=200` runs that many.
NUM_STEPS = int(os.environ.get("ARC_LONG_STEPS", "12"))
CPU = torch.device("cpu")
FLOAT_BYTES = 4
PERSISTENT = 100


def _ds_config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "memory_efficient_linear": False,
            "reduce_bucket_size": 3000,
            "stage3_prefetch_bucket_size": 5000,
            "stage3_param_persistence_threshold": PERSISTENT,
        },
    }


Measured = dict[str, EngineMemory]


def _measure(num_steps: int, recomputed: bool) -> tuple[list[Measured], list[list[str]], list[list[str]]]:
    """Memory of each step after the update, leaks of each step, and leaks after one was caused on purpose."""
    compressor = tiny_compressor(activation_checkpointing=recomputed)
    engine = build_engine(compressor, PortAdamW(tiny_groups(compressor), betas=BETAS, eps=EPS), _ds_config())
    decoders = [place_decoder(decoder, _ds_config()) for decoder in tiny_decoders(activation_checkpointing=recomputed)]
    modules = [engine.module, *(placed.module for placed in decoders)]
    memory, leaks = [], []
    schedule = replace(SCHEDULE, total_steps=num_steps)
    for step in range(num_steps):
        batch = step_of_rank(step, rank=dist.get_rank(), world_size=dist.get_world_size(), num_parts=2)
        train_step(engine, decoders, batch, schedule=schedule, tasks=TASKS)
        if step % 3 == 2:
            with torch.no_grad():
                micro = batch.micro_batches[0]
                decoders[micro.decoder_idx](micro.batch, engine(micro.batch, micro.decoder_idx))
        memory.append(
            {
                "encoder": engine_memory(engine.module, engine, CPU),
                **{f"decoder {idx}": engine_memory(one.module, None, CPU) for idx, one in enumerate(decoders)},
            }
        )
        leaks.append([name for module in modules for name in leaked_parameters(module)])
    kept: Any = decoders[1].module.layers[0].attention.wq.weight
    kept.all_gather()
    caused = [leaked_parameters(module) for module in modules]
    grown = engine_memory(decoders[1].module, None, CPU).gathered - memory[-1]["decoder 1"].gathered
    assert grown == FLOAT_BYTES * kept.ds_numel, grown
    return memory, leaks, caused


def _numel(module: nn.Module, *, at_most: int | None = None) -> int:
    sizes = [param.numel() for param in module.parameters()]
    return sum(size for size in sizes if at_most is None or size <= at_most)


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
def test_gathered_parameters_are_released_after_every_step_and_memory_is_flat(recomputed: bool) -> None:
    for memory, leaks, caused in run_on_ranks(_measure, NUM_STEPS, recomputed, timeout_s=600):
        assert leaks == [[]] * NUM_STEPS
        assert caused == [[], [], ["layers.0.attention.wq.weight"]], "a leak must be found"
        print(memory[0], memory[-1])
        # Each optimizer state exists from the first step that trains its group on.
        assert memory[-1] == memory[5]
