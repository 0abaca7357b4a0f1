"""Loading weights into ZeRO-3 partitions one tensor at a time. Only rank 0 reads; if it fails, all ranks fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from arc_ds.model.decoder import Decoder
from arc_ds.model.weights import load_backbone, open_backbone
from tests.helpers import tiny_models as tiny
from tests.helpers.distributed import RankError, run_on_ranks

pytestmark = pytest.mark.distributed

STAGE = {"stage": 3, "stage3_param_persistence_threshold": 0}
ZERO3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": STAGE}


class _Counting:
    """Forwards reads to another source, counts them, and can fail at one of them."""

    def __init__(self, source, fail_at: int | None) -> None:
        self.source, self.path, self.shapes = source, source.path, source.shapes
        self.fail_at, self.num_reads = fail_at, 0

    def tensor(self, name):
        self.num_reads += 1
        if self.num_reads == self.fail_at:
            raise OSError("the disk went away")
        return self.source.tensor(name)


def _load(folder: str, fail_at: int | None) -> tuple[int, int, list[str]]:
    """Returns (tensors read on this rank, values kept before gathering, parameters that differ afterwards)."""
    import deepspeed

    source = open_backbone(folder)
    # The config sets the dtype: with Init's own argument, DeepSpeed 0.19.8 always uses bfloat16 on the CPU.
    with deepspeed.zero.Init(config_dict_or_path=ZERO3):
        decoder = Decoder(source.config)
    counting = _Counting(source, fail_at)
    load_backbone(decoder, counting)
    kept = sum(p.ds_tensor.numel() for p in decoder.parameters())
    differing = []
    for name, parameter in decoder.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter.cpu(), source.tensor(name)):
                differing.append(name)
    return counting.num_reads, kept, differing


def test_partitions_hold_the_file_and_rank_zero_alone_reads(tmp_path: Path):
    config = tiny.tiny_config()
    folder = tiny.write_hf(tmp_path, config, tiny.random_tensors(config))
    first, second = run_on_ranks(_load, str(folder), None)
    num_tensors = len(tiny.random_tensors(config))
    num_values = sum(t.numel() for t in tiny.random_tensors(config).values())
    assert (first[0], second[0]) == (num_tensors, 0)
    assert first[1] + second[1] == num_values  # each rank keeps only its half
    assert first[2] == second[2] == []


def test_a_failed_read_is_raised_on_both_ranks_and_does_not_hang(tmp_path: Path):
    config = tiny.tiny_config()
    folder = tiny.write_hf(tmp_path, config, tiny.random_tensors(config))
    with pytest.raises(RankError) as caught:
        run_on_ranks(_load, str(folder), 3)
    assert str(caught.value).count("WeightsError: rank 0: the disk went away") == 2
    assert run_on_ranks(_ranks) == [0, 1], "the ranks must still be usable"


def _ranks() -> int:
    dist.barrier()
    return dist.get_rank()
