"""Decoders of transformers on two ranks: partitioned by ZeRO-3 they compute what the whole decoder computes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from arc_ds.errors import WeightsError
from arc_ds.model.transformers_files import open_with_transformers
from arc_ds.model.weights import gathered
from arc_ds.training.engine import PlacedDecoder, partitioned, place_decoder
from tests.helpers.distributed import RankError, run_on_ranks
from tests.helpers.plain_trainer import tiny_ds_config

pytest.importorskip("transformers")
pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
NUM_STEPS = 3
TOLERANCE = 1e-6  # the same operations in the same order; worst measured: 3e-7


class Found(NamedTuple):
    """The results of a rank.

    nll: of each step.
    grads: of the compressed vectors of each step.
    scored: NLL without gradient.
    is_packed: whether batches are packed.
    kept: number of values that the rank holds between the steps.
    saved: number of gathered weights of linears that the first step saves for backward, and so keeps alive.
    hashes: of all parameters before and after the steps.
    """

    nll: list[Tensor]
    grads: list[Tensor]
    scored: Tensor
    is_packed: bool
    kept: int
    saved: int
    hashes: tuple[str, str]


def _place(folder: str, placement: str, recomputed: bool, dtype: torch.dtype = torch.float32) -> PlacedDecoder:
    files = open_with_transformers(Path(folder), activation_checkpointing=recomputed)
    if placement == "replicated":
        return place_decoder(files.load(CPU, dtype))
    hpz = 2 if placement == "zero3+hpz" else 1
    config = tiny_ds_config(stage3_param_persistence_threshold=0, zero_hpz_partition_size=hpz)
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    return place_decoder(files.load(CPU, dtype, partitioned(config)), config)


def _hash(module: nn.Module) -> str:
    from tests.helpers.transformers_models import parameter_hash

    with gathered(list(module.parameters())):
        return parameter_hash(module)


def _run(
    folder: str, placement: str, recomputed: bool, dtype: torch.dtype = torch.float32, own_linear: bool = True
) -> Found:
    from tests.helpers.transformers_models import mixed_batch, random_vectors

    decoder = _place(folder, placement, recomputed, dtype)
    before = _hash(decoder.module)
    linears = [module for module in decoder.module.modules() if isinstance(module, nn.Linear)]
    for linear in linears if not own_linear else ():
        linear.__class__ = nn.Linear
    losses, grads, saved = [], [], 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        gathered_now = {linear.weight.untyped_storage().data_ptr() for linear in linears if linear.weight.numel()}
        saved += step == 0 and tensor.untyped_storage().data_ptr() in gathered_now
        return tensor

    for step in range(NUM_STEPS):
        batch = mixed_batch(seed=step)
        z_ZD = random_vectors(batch, decoder.module.hidden_size)
        with saved_tensors_hooks(count, lambda tensor: tensor):
            nll = decoder(batch, z_ZD)
        nll.mean().backward()
        losses.append(nll.detach())
        grads.append(z_ZD.grad)
        assert not any(p.requires_grad or p.grad is not None for p in decoder.module.parameters())
    with torch.no_grad():
        scored = decoder(mixed_batch(seed=9), random_vectors(mixed_batch(seed=9), decoder.module.hidden_size))
    parameters = list(decoder.module.parameters())
    kept = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters)
    hashes = (before, _hash(decoder.module))
    return Found(losses, grads, scored, decoder.module.reading.is_packed, kept, saved, hashes)


CASES: dict[str, tuple[Any, ...]] = {
    "Llama, hpz": ("Llama", "zero3+hpz", False),
    "Gemma3Text": ("Gemma3Text", "zero3", False),  # a tied head, an embedding with a buffer
    "Gemma3Text, bf16": ("Gemma3Text", "zero3", False, torch.bfloat16),  # buffers that stay in float32
    "GPTNeoX, recomputed": ("GPTNeoX", "zero3", True),
    "GptOss": ("GptOss", "zero3", False),  # experts in tensors of three dimensions
    "FalconH1, recomputed": ("FalconH1", "zero3", True),
    "Mamba2": ("Mamba2", "zero3", False),
    "OPT": ("OPT", "zero3", False),
}


@pytest.mark.parametrize("name", CASES)
def test_partitioned_equals_replicated(name: str, tmp_path: Path) -> None:
    from tests.helpers.transformers_models import write_model

    family, placement, recomputed, *dtype = CASES[name]
    write_model(tmp_path, family)
    whole = run_on_ranks(_run, str(tmp_path), "replicated", False, *dtype)
    shards = run_on_ranks(_run, str(tmp_path), placement, recomputed, *dtype)
    for found in (*whole, *shards):
        assert found.is_packed == whole[0].is_packed
        assert found.hashes[0] == found.hashes[1] == whole[0].hashes[0]
        for theirs, ours in zip(whole[0].nll + whole[0].grads, found.nll + found.grads, strict=True):
            assert (ours - theirs).norm() <= TOLERANCE * theirs.norm() and theirs.norm() > 1e-3
        assert (found.scored - whole[0].scored).norm() <= TOLERANCE * found.scored.norm()
    assert not torch.equal(whole[0].nll[0], whole[0].nll[1][: whole[0].nll[0].numel()])
    if placement == "zero3":
        assert max(found.kept for found in shards) < 0.6 * whole[0].kept
        assert all(found.saved == 0 for found in shards), "gathered weights outlive their layers"


def test_torchs_linear_would_keep_all_weights_until_backward(tmp_path: Path) -> None:
    from tests.helpers.transformers_models import write_model

    write_model(tmp_path, "Gemma3Text")
    ours, torchs = (
        run_on_ranks(_run, str(tmp_path), "zero3", False, torch.float32, own)[0].saved for own in (True, False)
    )
    assert ours == 0 and torchs >= 3 * 7  # linears of a layer


def _load_only(folder: str) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("arc_ds.model.transformers_files")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        _place(folder, "zero3", False)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return messages


def test_rank_zero_alone_reads_and_a_fault_there_stops_both(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.helpers.transformers_models import write_model

    write_model(tmp_path, "GPTNeoX")
    first, second = run_on_ranks(_load_only, str(tmp_path))
    assert len(first) == 1 and "reads packed batches through transformers" in first[0] and second == []
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["embed_out.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankError) as caught:
        run_on_ranks(_load_only, str(tmp_path))
    assert str(caught.value).count(f"{WeightsError.__name__}: rank 0: {tmp_path} does not fit") == 2
    assert "`lm_head.weight` is missing" in str(caught.value)
