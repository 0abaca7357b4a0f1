"""`arc-ds plan` against real steps of DeepSpeed on 1, 2 and 4 ranks: states, bytes of collectives, saved activations.

The kernels are plain torch's, also in the trace. `tests/kernels/test_plan_memory.py` compares those of a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.commands.plan import read_model
from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.planning.hardware import Machine
from arc_ds.planning.pass_trace import batch_tensors, trace_pass
from arc_ds.planning.plan import Plan, RunModel, make_plan
from arc_ds.training.build import build_run
from arc_ds.training.collectives import ENCODER, counting_collectives
from arc_ds.training.memory import engine_memory
from arc_ds.training.step import train_step
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import PLAIN, ROOT, write_inputs

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STATES, COLLECTIVES, ACTIVATIONS = 0.02, 0.05, 0.10  # relative tolerances of the plan
STEPS = 5  # DeepSpeed records the order of the gathers in the first three
BASE = ("micro_batches=1", "data.batch_size=8", *PLAIN)
HPZ = "second copy of the shards on each pair of ranks, two micro-batches"
CASES = {
    HPZ: ("micro_batches=2",),
    "replicated": (),
    "sharded, two micro-batches": ("decoders.0.placement=zero3", "decoders.1.placement=zero3", "micro_batches=2"),
    "frozen encoder": ("encoder.train=bridge",),
    "adapters, selective": (
        "encoder.lora={rank: 4}",
        "encoder.activation_checkpointing=selective",
        "decoders.0.lora={rank: 4}",
        "decoders.1.lora={rank: 2}",
        "decoders.0.activation_checkpointing=selective",
    ),
    "recomputed": (
        "encoder.activation_checkpointing=full",
        "decoders.0.activation_checkpointing=full",
        "decoders.1.activation_checkpointing=full",
    ),
}


class Measured(NamedTuple):
    """Bytes that a rank kept and sent.

    states: bytes by the plan's part.
    collectives: bytes of the full tensors in the last two steps, one for each decoder, by operation and ranks.
    saved: bytes that autograd kept at the end of the last step's forward.
    batch: the last step's micro-batch.
    """

    states: dict[str, int]
    collectives: list[dict[tuple[bool, str, int], int]]
    saved: int
    batch: PackedBatch


def _train(config: str, overrides: tuple[str, ...]) -> Measured:
    run = build_run(load_config(config, overrides), torch.device("cpu"))
    by_step, saved, second_copy = [], _SavedBytes(), _SecondCopy(run.engine.optimizer)
    with counting_collectives(run.decoder_engines) as counter:
        for step in range(STEPS):
            step_batch = run.data[step]
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                train_step(run.engine, run.decoders, step_batch, schedule=run.schedule, tasks=run.data.tasks)
            found: dict[tuple[bool, str, int], int] = {}
            for kind, full_bytes in counter.read().items():
                key = (kind.engine == ENCODER, kind.op, kind.num_ranks)
                found[key] = found.get(key, 0) + full_bytes
            by_step.append(found)
    memory = engine_memory(run.engine.module, run.engine, run.device)
    frozen = [engine_memory(placed.module, None, run.device) for placed in run.decoders]
    batch = step_batch.micro_batches[-1].batch
    of_batch = {x.untyped_storage().data_ptr() for x in batch_tensors(batch)}
    return Measured(
        states={
            "parameters": memory.parameters,
            "second copy of parameters": second_copy.num_bytes,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "decoders": sum(each.parameters for each in frozen),
        },
        collectives=by_step[-2:],
        saved=sum(size for address, size in saved.storages.items() if address not in of_batch),
        batch=batch,
    )


class _SecondCopy:
    """Bytes of hpZ's second copy of the shards. DeepSpeed drops it after each update, before a step returns."""

    def __init__(self, optimizer: Any) -> None:
        self.num_bytes = 0
        self._optimizer, self._drop = optimizer, optimizer.invalidate_secondary_tensor
        optimizer.invalidate_secondary_tensor = self._measure_and_drop

    def _measure_and_drop(self) -> None:
        copies = (p.ds_secondary_tensor for group in self._optimizer.fp16_groups for p in group)
        self.num_bytes = sum(copy.nbytes for copy in copies if copy is not None)
        self._drop()


class _SavedBytes:
    """Bytes of the storages that autograd keeps for the last micro-batch, by address, without ZeRO-3's parameters.

    It does not see what activation checkpointing keeps: the inputs of the layers.
    """

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self._has_backward_begun = False

    def unpack(self, kept: Tensor) -> Tensor:
        self._has_backward_begun = True
        return kept

    def pack(self, x: Tensor) -> Tensor:
        is_forward = torch._C._current_graph_task_id() == -1
        if is_forward and self._has_backward_begun:
            self.storages.clear()
            self._has_backward_begun = False
        if is_forward and not isinstance(x, torch.nn.Parameter):
            self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose buckets are smaller than its model, and whose parameters are gathered."""
    folder = tmp_path_factory.mktemp("plan")
    found = write_inputs(folder)
    ds_config = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    ds_config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 100,
        "reduce_bucket_size": 5000,
        "stage3_prefetch_bucket_size": 3000,
        "stage3_max_reuse_distance": 4000,
    }
    (folder / "zero3.json").write_text(json.dumps(ds_config))
    ds_config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (folder / "hpz.json").write_text(json.dumps(ds_config))
    return found


@pytest.mark.parametrize(
    ("case", "num_ranks"),
    [*((case, 2) for case in CASES if case != HPZ), ("replicated", 1), ("sharded, two micro-batches", 4), (HPZ, 4)],
)
def test_plan_differs_from_real_steps(config: Path, case: str, num_ranks: int) -> None:
    folder = config.parent
    ds_config = folder / ("hpz.json" if case == HPZ else "zero3.json")
    overrides = (*BASE, f"deepspeed={ds_config}", f"run_dir={folder / f'{case} {num_ranks}'}", *CASES[case])
    measured = run_on_ranks(_train, str(config), overrides, num_ranks=num_ranks)[0]
    loaded = load_config(config, overrides)
    model = read_model(loaded)
    plan = make_plan(loaded, model, Machine("h100-80", num_ranks, 2 if case == HPZ else 1))
    print(f"states: {plan.memory} planned, {measured.states} measured")
    for part, size in measured.states.items():
        assert plan.memory[part] == pytest.approx(size, rel=STATES), part
    _compare_collectives(plan, measured, num_ranks)
    _compare_activations(loaded, model, measured)


def _compare_collectives(plan: Plan, measured: Measured, num_ranks: int) -> None:
    """Bytes by engine and operation; of sharded decoders, which alternate, those of the one with most."""
    if num_ranks == 1:
        assert all(one.sent_bytes == 0 for one in plan.traffic)
        return
    planned: dict[tuple[bool, str, int], int] = {}
    for one in plan.traffic:
        key = (one.engine == "encoder", one.op, one.num_ranks)
        planned[key] = planned.get(key, 0) + one.full_bytes
    print(f"collectives: {planned} planned, {measured.collectives} measured")
    for key, size in planned.items():
        assert max(step.get(key, 0) for step in measured.collectives) == pytest.approx(size, rel=COLLECTIVES), key
    unplanned = {key for step in measured.collectives for key in step} - planned.keys()
    assert {op for _, op, _ in unplanned} <= {"broadcast"}, unplanned


def _compare_activations(loaded: RunConfig, model: RunModel, measured: Measured) -> None:
    last = (STEPS - 1) % len(loaded.decoders)
    # On "meta", torch's attention would fall back to one that keeps all scores.
    modules = [module.to_empty(device="cpu") for module in (model.compressor(loaded), model.decoder(loaded, last))]
    trace = trace_pass(*modules, measured.batch, last, kernels="reference")
    saved = sum(trace.saved.values())
    print(f"activations kept for backward: {saved:,} planned, {measured.saved:,} measured")
    if loaded.encoder.activation_checkpointing == "full":
        assert saved > measured.saved
    else:
        assert saved == pytest.approx(measured.saved, rel=ACTIVATIONS)
    assert trace.peak_bytes >= saved
