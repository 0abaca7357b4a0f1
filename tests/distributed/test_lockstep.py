"""Partitioned modules in turns: ranks with other numbers of batches and other lengths of answers do not hang.

Without turns this is DeepSpeed #8262: a rank that gathers weights for one more token waits forever.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as torch_dist

from arc_ds.batch.packing import pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.errors import DataError
from arc_ds.inference.generate import Chooser, Sampling, continue_batch
from arc_ds.system import dist
from arc_ds.training.engine import build_engine, place_decoder
from arc_ds.training.lockstep import EvaluationStopped, Lockstep
from arc_ds.training.optim import PortAdamW
from arc_ds.training.step import train_step
from tests.helpers.distributed import run_on_ranks
from tests.helpers.plain_trainer import (
    BETAS,
    EPS,
    POOLING,
    SCHEDULE,
    TASKS,
    step_of_rank,
    tiny_compressor,
    tiny_decoders,
    tiny_ds_config,
    tiny_groups,
)

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
STEPS = 4
# Of each rank: for each of its batches the decoder, and where each answer ends.
WORK = [[(0, [1, 9]), (1, [4, 2]), (0, [3, 3])], [(0, [2, 5])]]


class Found(NamedTuple):
    """Results of a rank: answers by batch, their NLL, own passes, losses, and whether ZeRO-3 kept its trace."""

    answers: list[list[list[int]]]
    nll: list[torch.Tensor]
    num_passes: int
    losses: list[float]
    traced: bool


def _engine_and_decoders() -> tuple[Any, list[Any]]:
    config = tiny_ds_config(stage3_param_persistence_threshold=0)
    compressor = tiny_compressor()
    engine = build_engine(compressor, PortAdamW(tiny_groups(compressor), betas=BETAS, eps=EPS), config)
    partitioned, whole = tiny_decoders()
    return engine, [place_decoder(partitioned, config), place_decoder(whole)]


def _batch(rank: int, number: int, decoder_idx: int, *, with_labels: bool) -> Any:
    """Two prompts of a context and a text, and for the NLL a target."""
    samples = []
    for sequence in range(2):
        shift = 7 * rank + 3 * number + sequence
        target = [Segment.text([shift % 50, 3, 4], in_loss=True)] if with_labels else []
        context = Segment.context([(shift + k) % 90 for k in range(3 + shift % 5)], "cont")
        samples.append(Sample("eval", (context, Segment.text([5, (shift + decoder_idx) % 50]), *target)))
    return pack(samples, POOLING)


def _answer(rank: int, compressor: Any, decoders: Any) -> tuple[list[Any], list[torch.Tensor]]:
    answers, nll = [], []
    with torch.no_grad():
        for number, (decoder_idx, ends) in enumerate(WORK[rank]):
            batch = _batch(rank, number, decoder_idx, with_labels=False)
            lines = continue_batch(
                decoders[decoder_idx],
                batch,
                compressor(batch, decoder_idx),
                max_new_tokens=[12, 12],
                choose=Chooser(Sampling(), CPU),
                has_ended=lambda idx, line, ends=ends: len(line) == ends[idx],
            )
            answers.append([line.ids for line in lines])
            batch = _batch(rank, number, decoder_idx, with_labels=True)
            nll.append(decoders[decoder_idx].label_nll(batch, compressor(batch, decoder_idx)))
    return answers, nll


def _run(evaluates: bool) -> Found:
    engine, decoders = _engine_and_decoders()
    answers: list[Any] = []
    nll: list[torch.Tensor] = []
    losses = []
    num_passes = 0

    def count() -> bool:
        nonlocal num_passes
        num_passes += 1
        return False

    for step in range(STEPS):
        if evaluates and step in (0, 2):
            with Lockstep(
                engine.module, POOLING, [d.module for d in decoders],
                partitioned=[d.engine is not None for d in decoders], device=CPU, before_pass=count,
            ) as turns:  # fmt: skip
                found = _answer(dist.rank(), turns.compressor, turns.decoders)
            if step == 0:
                answers, nll = found
        batch = step_of_rank(step, rank=dist.rank(), world_size=2, num_parts=2)
        losses.append(
            float(train_step(engine, decoders, batch, schedule=SCHEDULE, tasks=TASKS, normalize="global").loss)
        )
    traced = engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    return Found(answers, nll, num_passes, losses, traced)


@functools.cache
def _ranks(evaluates: bool) -> list[Found]:
    return run_on_ranks(_run, evaluates)


def test_ranks_with_other_numbers_and_lengths_of_answers_get_the_whole_models_answers() -> None:
    ranks = _ranks(True)
    compressor, decoders = tiny_compressor(), tiny_decoders()
    for rank, found in enumerate(ranks):
        answers, nll = _answer(rank, compressor, decoders)
        assert found.answers == answers
        assert [[len(line) for line in batch] for batch in answers] == [ends for _, ends in WORK[rank]]
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found.nll, nll, strict=True))
    # The passes of a rank alone differ, which would hang. In turns they are equal.
    own = [sum(max(ends) for _, ends in work) for work in WORK]
    assert own[0] != own[1] and ranks[0].num_passes == ranks[1].num_passes


def test_an_evaluation_changes_no_loss_and_zero3_records_its_trace_again() -> None:
    with_evaluation, without = _ranks(True)[0], _ranks(False)[0]
    assert with_evaluation.losses == without.losses
    assert without.traced and with_evaluation.traced


def _stop_and_fail() -> list[str]:
    engine, decoders = _engine_and_decoders()
    return [_outcome(how, engine, decoders) for how in ("stop", "fail")]


def _outcome(how: str, engine: Any, decoders: list[Any]) -> str:
    passes = iter(range(1000))

    def before_pass() -> bool:
        return next(passes) == 3 and how == "stop" and dist.rank() == 1

    try:
        with Lockstep(
            engine.module, POOLING, [d.module for d in decoders],
            partitioned=[True, False], device=CPU, before_pass=before_pass,
        ) as turns:  # fmt: skip
            if how == "fail" and dist.rank() == 1:
                raise DataError("of one sample")
            _answer(dist.rank(), turns.compressor, turns.decoders)
    except (EvaluationStopped, DataError) as error:
        torch_dist.barrier()
        return type(error).__name__
    torch_dist.barrier()
    return "finished"


def test_a_stop_of_one_rank_stops_all_and_an_error_of_one_lets_the_others_finish() -> None:
    (stops, fails) = zip(*run_on_ranks(_stop_and_fail), strict=True)
    assert stops == ("EvaluationStopped", "EvaluationStopped") and fails == ("finished", "DataError")
