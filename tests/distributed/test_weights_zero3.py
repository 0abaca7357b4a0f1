"""Loading weights into ZeRO-3 partitions: each rank reads its own rows; if one rank fails, all ranks fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from arc_ds.model.decoder import Decoder
from arc_ds.model.spec import build_compressor
from arc_ds.model.weights import beyond_layers, load_backbone, open_backbone, set_parameter
from arc_ds.training.engine import partitioned
from tests.helpers import tiny_models as tiny
from tests.helpers.distributed import RankError, run_on_ranks
from tests.helpers.tiny_export import tiny_spec

pytestmark = pytest.mark.distributed

# Half of a parameter ends inside a row, inside a head, and beyond an odd number of values.
UNEVEN = tiny.tiny_config(hidden_size=21, num_heads=3, num_kv_heads=1, head_dim=6, ffn_size=27, vocab_size=41)
OLMO = tiny.tiny_config(
    family="olmo", norm="layer", hidden_size=18, num_heads=3, num_kv_heads=3, head_dim=6, ffn_size=27, vocab_size=41
)
WRITERS = {
    "Hugging Face": (tiny.write_hf, UNEVEN),
    "Mistral native": (tiny.write_mistral, UNEVEN),
    "OLMo native": (tiny.write_olmo, OLMO),
    "tied head": (tiny.write_hf, dataclasses.replace(UNEVEN, tie_embeddings=True)),
}


def _ds_config(*, bf16: bool = False) -> dict[str, Any]:
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage, "bf16": {"enabled": bf16}}


class _Counting:
    """Forwards reads to another source, counts their bytes, and can fail at one of them."""

    def __init__(self, source: Any, fail_at: int | None = None) -> None:
        self.source, self.path, self.shapes = source, source.path, source.shapes
        self.fail_at, self.num_reads, self.num_bytes = fail_at, 0, 0

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        self.num_reads += 1
        if self.num_reads == self.fail_at:
            raise OSError("the disk went away")
        tensor = self.source.tensor(name, rows)
        self.num_bytes += tensor.nbytes
        return tensor


def _own_part(whole: Tensor, partition: Tensor, rank: int) -> Tensor:
    return whole.reshape(-1)[rank * partition.numel() : (rank + 1) * partition.numel()].to(partition.dtype)


def _load(folder: str, bf16: bool, wrong: bool) -> tuple[int, list[str], list[str]]:
    """Bytes read here; parameters whose partition differs from the file's values; and from a gathered load."""
    source = open_backbone(folder)
    if wrong:
        names = dataclasses.replace(source.tensor_names, interleaved=not source.tensor_names.interleaved)
        source = dataclasses.replace(source, tensor_names=names)
    with partitioned(_ds_config(bf16=bf16)):
        decoder, gathered = Decoder(source.config), Decoder(source.config)
    counting = _Counting(source)
    load_backbone(decoder, counting)
    right = open_backbone(folder)
    different, different_from_gathered = [], []
    for name, parameter in decoder.named_parameters():
        whole, partition = right.tensor(name), parameter.ds_tensor
        expected = _own_part(whole, partition, dist.get_rank())
        if partition.dtype != (torch.bfloat16 if bf16 else torch.float32):
            different.append(f"{name} is {partition.dtype}")
        if not torch.equal(partition[: expected.numel()], expected):
            different.append(name)
        set_parameter(gathered, name, whole)
        if not torch.equal(gathered.get_parameter(name).ds_tensor[: expected.numel()], expected):
            different_from_gathered.append(name)
    return counting.num_bytes, different, different_from_gathered


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", WRITERS)
def test_each_rank_reads_its_own_part_of_every_tensor(tmp_path: Path, kind: str, bf16: bool):
    write, config = WRITERS[kind]
    folder = write(tmp_path, config, tiny.random_tensors(config))
    tensors = tiny.random_tensors(config)
    num_bytes = 4 * sum(tensor.numel() for tensor in tensors.values())
    # Halves end inside a row, or inside a head of six rows, which the file may store in another order.
    extra_rows = {name: 6 if ".wq." in name or ".wk." in name else 1 for name in tensors}
    at_most = num_bytes // 2 + sum(4 * extra_rows[name] * tensor[0].numel() for name, tensor in tensors.items())
    for read, different, different_from_gathered in run_on_ranks(_load, str(folder), bf16, False):
        assert num_bytes // 2 <= read <= at_most < 0.8 * num_bytes
        assert different == different_from_gathered == []


def test_rows_in_another_order_would_be_seen(tmp_path: Path):
    folder = tiny.write_mistral(tmp_path, UNEVEN, tiny.random_tensors(UNEVEN))
    rotated = {f"layers.{i}.attention.{w}.weight" for i in range(2) for w in ("wq", "wk")}
    for _, different, _ in run_on_ranks(_load, str(folder), False, True):
        assert set(different) == rotated


def _load_in_groups(folder: str) -> list[str]:
    """Load with hpZ in groups of one rank, so each rank has a whole second copy; parameters whose copy differs."""
    import deepspeed
    from deepspeed.utils import groups

    source = open_backbone(folder)
    before = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    try:
        groups._create_zero_param_parallel_group(1)
        group = groups._get_zero_param_intra_parallel_group()
        with deepspeed.zero.Init(config_dict_or_path=_ds_config(), zero_param_parallel_group=group):
            decoder = Decoder(source.config)
        load_backbone(decoder, source)
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = before
    different = []
    for name, parameter in decoder.named_parameters():
        parts = ((parameter.ds_tensor, dist.get_rank()), (parameter.ds_secondary_tensor, 0))
        for partition, rank in parts:
            expected = _own_part(source.tensor(name), partition, rank)
            if not torch.equal(partition[: expected.numel()], expected):
                different.append(name)
    return different


def test_the_second_copy_of_hpz_is_filled_by_the_rank_in_its_group(tmp_path: Path):
    folder = tiny.write_mistral(tmp_path, UNEVEN, tiny.random_tensors(UNEVEN))
    assert run_on_ranks(_load_in_groups, str(folder)) == [[], []]


def _load_encoder(folder: str) -> list[str]:
    """Load an encoder of one layer with memory tokens; parameters that differ."""
    source = open_backbone(folder)
    with partitioned(_ds_config()):
        compressor = build_compressor(tiny_spec(backbone=source.config, num_layers=1, rules=(), memory_tokens=2))
    load_backbone(compressor, source, prefix="encoder.", skip="memory".__eq__, allow_unused=beyond_layers(1))
    different = []
    for name, parameter in compressor.encoder.named_parameters():
        whole = torch.ones(2, 21) if name == "memory" else source.tensor(name)
        expected = _own_part(whole, parameter.ds_tensor, dist.get_rank())
        if not torch.equal(parameter.ds_tensor[: expected.numel()], expected):
            different.append(name)
    return different


def test_an_encoder_takes_its_layers_and_keeps_its_memory_tokens(tmp_path: Path):
    folder = tiny.write_mistral(tmp_path, UNEVEN, tiny.random_tensors(UNEVEN))
    assert run_on_ranks(_load_encoder, str(folder)) == [[], []]


def _load_from_nvme(folder: str) -> list[str]:
    """Load partitions that DeepSpeed holds elsewhere; parameters that differ after a gather."""
    import deepspeed

    source = open_backbone(folder)
    with partitioned(_ds_config()):
        decoder = Decoder(source.config)
    for parameter in decoder.parameters():
        parameter.ds_tensor.final_location = "elsewhere"  # DeepSpeed knows "nvme" only, and treats this as memory
    load_backbone(decoder, source)
    different = []
    for name, parameter in decoder.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter, source.tensor(name)):
                different.append(name)
    return different


def test_partitions_outside_memory_are_filled_through_a_gather(tmp_path: Path):
    folder = tiny.write_hf(tmp_path, UNEVEN, tiny.random_tensors(UNEVEN))
    assert run_on_ranks(_load_from_nvme, str(folder)) == [[], []]


def _fail(folder: str, failing_rank: int) -> None:
    source = open_backbone(folder)
    with partitioned(_ds_config()):
        decoder = Decoder(source.config)
    load_backbone(decoder, _Counting(source, 3 if dist.get_rank() == failing_rank else None))


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failed_read_is_raised_on_both_ranks_and_does_not_hang(tmp_path: Path, failing_rank: int):
    folder = tiny.write_hf(tmp_path, UNEVEN, tiny.random_tensors(UNEVEN))
    with pytest.raises(RankError) as caught:
        run_on_ranks(_fail, str(folder), failing_rank)
    assert str(caught.value).count(f"WeightsError: rank {failing_rank}: the disk went away") == 2
    assert run_on_ranks(_ranks) == [0, 1], "the ranks must still be usable"


def _ranks() -> int:
    dist.barrier()
    return dist.get_rank()
