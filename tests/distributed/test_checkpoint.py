"""Checkpoints of a real ZeRO-3 engine on two ranks: bit-exact resume, failures, corruption, other world sizes."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import threading
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from arc_ds.checkpoints import checkpoint, writer
from arc_ds.checkpoints.checkpoint import TrainerState, find_resumable, load_checkpoint
from arc_ds.checkpoints.rng import capture_rng
from arc_ds.checkpoints.writer import CheckpointWriter
from arc_ds.errors import DiskFullError
from arc_ds.training.optim import ParamGroup, PortAdamW
from tests.helpers.distributed import RankError, run_on_ranks
from tests.helpers.zero_checkpoint import seal

GLOBAL_BATCH = 4


class _Net(nn.Module):
    """Odd sizes (so shards are padded), a frozen weight, and two bridges used in different steps."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 7, bias=False).requires_grad_(False)
        self.frozen.weight.data = torch.linspace(-1, 1, 35).reshape(7, 5)  # a run loads it from its files
        self.trunk = nn.Linear(7, 11, bias=False)
        self.marker = nn.Parameter(torch.ones(1, 11))
        self.bridges = nn.ModuleList([nn.Linear(11, 3, bias=False), nn.Linear(11, 3, bias=False)])

    def forward(self, x_BD: Tensor, which: int) -> Tensor:
        x_BD = torch.tanh(self.trunk(self.frozen(x_BD))) + self.marker
        outputs = [bridge(x_BD) for bridge in self.bridges]
        return (outputs[which] + 0.0 * outputs[1 - which]).square().mean()


# Engines as runs may configure them. On the CPU, offload copies between host buffers.
ENGINES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "offload": {
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
    "hpz": {"zero_optimization": {"zero_hpz_partition_size": 2}},
}


def _engine(seed: int = 0, kind: str = "fp32") -> Any:
    import deepspeed

    torch.manual_seed(seed)
    net = _Net()
    parts = (
        ("trunk", (net.trunk.weight, net.marker), 1e-2, 0.1),
        ("bridge.0", tuple(net.bridges[0].parameters()), 3e-2, 0.0),
        ("bridge.1", tuple(net.bridges[1].parameters()), 5e-2, 0.3),
    )
    groups = [ParamGroup(name=n, params=p, port=None, peak_lr=lr, weight_decay=decay) for n, p, lr, decay in parts]
    zero = {"stage": 3, "stage3_param_persistence_threshold": 20, "sub_group_size": 40}
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        **ENGINES[kind],
        "zero_optimization": zero | ENGINES[kind].get("zero_optimization", {}),
    }
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=PortAdamW(groups, betas=(0.9, 0.999), eps=1e-8), config=config
    )
    for index, group in enumerate(engine.optimizer.optimizer.param_groups):
        group["index"] = index
    return engine


def _train(engine: Any, first: int, last: int) -> list[float]:
    """Run steps [first, last) and return the losses of this rank. The batch is a function of the step."""
    losses = []
    for step in range(first, last):
        which = int(step % 3 == 2)
        x_BD = torch.randn(GLOBAL_BATCH, 5, generator=torch.Generator().manual_seed(step))
        mine = x_BD.chunk(dist.get_world_size())[dist.get_rank()].to(engine.module.frozen.weight.dtype)
        loss = engine(mine, which)
        engine.backward(loss)
        for group in engine.optimizer.optimizer.param_groups:
            group["active"] = group["index"] in (0, 1 + which)
        engine.step()
        losses.append(loss.item())
    return losses


def _weights(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def _moments(engine: Any) -> list[dict[str, Any]]:
    """Optimizer state and hyperparameters of each sub-group on this rank."""
    optimizer = engine.optimizer
    found = []
    for sub_group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[sub_group]]
        hyper = {key: group[key] for key in ("lr", "weight_decay", "index")}
        state = {key: value.clone() for key, value in optimizer.optimizer.state[flat].items()}
        found.append({**hyper, **state})
    return found


def _state(step: int) -> TrainerState:
    return TrainerState(
        step=step, data_position=step * GLOBAL_BATCH, data_fingerprint="data", config_hash="config",
        mlflow_run_id="run", versions={"torch": torch.__version__}, extra={"skipped": 2},
    )  # fmt: skip


def _save(engine: Any, directory: Path, step: int) -> Path:
    return CheckpointWriter(directory, keep_last=9, keep_every=0, asynchronous=False).save(engine, _state(step))


def _draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def _resume_is_exact(directory: Path, kind: str) -> dict[str, Any]:
    engine = _engine(kind=kind)
    _train(engine, 0, 4)
    random.seed(dist.get_rank())
    path = _save(engine, directory, 4)
    drawn = _draw()
    losses = _train(engine, 4, 7)
    wanted = _weights(engine)
    fresh = _engine(seed=1, kind=kind)
    before = _weights(fresh)
    state = load_checkpoint(fresh, find_resumable(directory))
    drawn_again = _draw()
    losses_again = _train(fresh, 4, 7)
    found = _weights(fresh)
    return {
        "path": path, "state": state, "drawn": (drawn, drawn_again), "losses": (losses, losses_again),
        "steps": (engine.global_steps, fresh.global_steps),
        "equal": all(torch.equal(wanted[name], found[name]) for name in wanted),
        "moments": all(
            torch.equal(torch.as_tensor(old[key]), torch.as_tensor(new[key]))
            for old, new in zip(_moments(engine), _moments(fresh), strict=True) for key in old
        ),
        "dtypes": {str(weight.dtype) for weight in wanted.values()},
        "loaded": not torch.equal(before["trunk.weight"], found["trunk.weight"]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ENGINES)
def test_resume_continues_bit_for_bit(tmp_path: Path, kind: str) -> None:
    for result in run_on_ranks(_resume_is_exact, tmp_path, kind):
        assert result["state"] == _state(4)
        assert result["equal"] and result["moments"] and result["loaded"]
        assert result["dtypes"] == {"torch.bfloat16" if kind == "bf16" else "torch.float32"}
        assert result["losses"][0] == result["losses"][1]
        assert result["drawn"][0] == result["drawn"][1], "random states were not restored"
        assert result["steps"] == (7, 7)
        assert result["path"] == tmp_path / "step_000004"
    assert (tmp_path / "latest").read_text() == "step_000004\n"
    of_ranks = {f"{name % rank}" for name in ("rng_%05d.json", "shard_%05d.safetensors") for rank in range(2)}
    names = {path.name for path in (tmp_path / "step_000004").iterdir()}
    assert names == {"trainer.json", "manifest.json", "shards.json"} | of_ranks
    assert not list(tmp_path.glob(".tmp*"))


def _save_while_training(directory: Path) -> dict[str, Any]:
    """Save in the background, and write only after three more steps. Then the same without copies: a wrong variant."""
    engine = _engine()
    _train(engine, 0, 4)
    _save(engine, directory / "waiting", 4)
    found: dict[str, Any] = {}
    for name in ("copied", "not copied"):
        trained, real = threading.Event(), writer.write_shards

        def write_shards(*arguments: Any, trained: Any = trained, real: Any = real) -> Any:
            assert trained.wait(60)
            return real(*arguments)

        background = CheckpointWriter(directory / name, keep_last=9, keep_every=0, asynchronous=True)
        without_copies = lambda tensors, buffers: buffers.update(tensors)  # noqa: E731
        copies = writer.start_host_copies if name == "copied" else without_copies
        with mock.patch.multiple(writer, write_shards=write_shards, start_host_copies=copies):
            background.save(engine, _state(4))
            _train(engine, 4, 7)
            found[name] = (directory / name / "latest").exists()
            trained.set()
            background.finish()
        engine = _engine()
        _train(engine, 0, 4)
    return found


def test_a_save_in_the_background_has_the_bytes_of_one_that_waits(tmp_path: Path) -> None:
    assert run_on_ranks(_save_while_training, tmp_path) == [{"copied": False, "not copied": False}] * 2
    folders = {name: tmp_path / name / "step_000004" for name in ("waiting", "copied", "not copied")}
    for path in sorted(folders["waiting"].glob("shard*")):
        content = {name: (folder / path.name).read_bytes() for name, folder in folders.items()}
        assert content["copied"] == content["waiting"]
        assert path.suffix == ".json" or content["not copied"] != content["waiting"], "training changed nothing"


def _fail_on_a_rank(directory: Path, ranks: list[int], can_leave_part: bool) -> dict[str, Any]:
    """A save in the background that fails on some ranks, and the next one."""
    engine, me = _engine(), dist.get_rank()
    _save(engine, directory, 1)
    background = CheckpointWriter(directory, keep_last=9, keep_every=0, asynchronous=True)
    full = OSError(errno.ENOSPC, "no space", str(directory))
    with ExitStack() as faults:
        if me in ranks:
            faults.enter_context(mock.patch.object(writer, "seal_file", side_effect=full))
            if not can_leave_part:
                faults.enter_context(mock.patch.object(writer, "_leave_part", side_effect=full))
        background.save(engine, _state(2))
        if can_leave_part and me == 0:
            background._save.thread.join()  # rank 0 removes the folder without waiting for the next save
            assert not list(directory.glob(".tmp*"))
        try:
            background.finish()
            message = "whole"
        except DiskFullError as error:
            message = str(error)
    dist.barrier()
    left = sorted(path.name for path in directory.iterdir())
    dist.barrier()
    background.save(engine, _state(3))
    background.finish()
    return {"message": message, "left": left, "newest": find_resumable(directory).name}


@pytest.mark.parametrize(("ranks", "can_leave_part"), [([0], True), ([1], True), ([1], False), ([0, 1], True)])
def test_a_failed_save_fails_on_all_ranks_and_leaves_no_file(
    tmp_path: Path, ranks: list[int], can_leave_part: bool
) -> None:
    for result in run_on_ranks(_fail_on_a_rank, tmp_path, ranks, can_leave_part):
        assert "step_000002 cannot be written" in result["message"] and "step_000001 is whole" in result["message"]
        assert result["left"] == ["latest", "step_000001"] and result["newest"] == "step_000003"


def _load_newest(directory: Path) -> int:
    return load_checkpoint(_engine(seed=1), find_resumable(directory)).step


def _save_steps(directory: Path, steps: list[int]) -> None:
    engine = _engine()
    for step in steps:
        _save(engine, directory, step)


def _find_with_warnings(directory: Path) -> tuple[str | None, list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    checkpoint.logger.addHandler(handler)
    try:
        found = find_resumable(directory)
    finally:
        checkpoint.logger.removeHandler(handler)
    return found and found.name, messages


def test_a_flipped_byte_is_named_and_passed_over(tmp_path: Path) -> None:
    run_on_ranks(_save_steps, tmp_path, [1, 2])
    damaged = tmp_path / "step_000002" / "shard_00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (name, messages), (other, silent) = run_on_ranks(_find_with_warnings, tmp_path)
    assert name == other == "step_000001"
    assert len(messages) == 1 and str(damaged) in messages[0] and "checksum" in messages[0]
    assert silent == [], "only one rank may log"


def test_a_whole_checkpoint_is_never_overwritten_a_damaged_one_is_set_aside(tmp_path: Path) -> None:
    run_on_ranks(_save_steps, tmp_path, [3])
    with pytest.raises(RankError, match=r"(?s)rank 0.*not overwritten.*rank 1.*not overwritten"):
        run_on_ranks(_save_steps, tmp_path, [3])
    (tmp_path / "step_000003" / "trainer.json").unlink()
    run_on_ranks(_save_steps, tmp_path, [3])
    assert (tmp_path / "damaged-1-step_000003").is_dir()
    assert run_on_ranks(_load_newest, tmp_path) == [3, 3]


def _train_and_save(directory: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    engine = _engine()
    _train(engine, 0, 4)
    _save(engine, directory, 4)
    return _weights(engine), _moments(engine)


def _load_and_save(directory: Path, out: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    engine = _engine(seed=1)
    load_checkpoint(engine, directory / "step_000004")
    weights, moments = _weights(engine), _moments(engine)
    _save(engine, out, 4)
    return weights, moments


def test_another_world_size_keeps_every_bit_of_weights_and_optimizer(tmp_path: Path) -> None:
    """2 → 1 → 2: back on two ranks, every group is unchanged."""
    saved = run_on_ranks(_train_and_save, tmp_path / "two")
    ((one_weights, one_moments),) = run_on_ranks(_load_and_save, tmp_path / "two", tmp_path / "one", num_ranks=1)
    back = run_on_ranks(_load_and_save, tmp_path / "one", tmp_path / "back")
    for (weights, moments), (back_weights, back_moments) in zip(saved, back, strict=True):
        for name, weight in weights.items():
            assert torch.equal(weight, one_weights[name]) and torch.equal(weight, back_weights[name]), name
        assert len(moments) == len(back_moments) >= 3
        for old, new in zip(moments, back_moments, strict=True):
            assert old.keys() == new.keys()
            assert all(torch.equal(torch.as_tensor(old[key]), torch.as_tensor(new[key])) for key in old)
    steps = {int(moment["index"]): float(moment["step"]) for moment in one_moments}
    assert steps[0] > steps[1] > steps[2], "each group must keep its own step count"
    assert {int(moment["index"]): moment["weight_decay"] for moment in one_moments} == {0: 0.1, 1: 0.0, 2: 0.3}


class _Exploit:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _save_as_deepspeed(directory: Path) -> list[float]:
    """A checkpoint as earlier versions saved it. Each of its pickles has code to run, in several places."""
    engine = _engine()
    _train(engine, 0, 4)
    random.seed(dist.get_rank())
    engine.save_checkpoint(str(directory), tag="step_000004", save_latest=False)
    folder = directory / "step_000004"
    (folder / f"rng_{dist.get_rank():05d}.json").write_text(json.dumps(capture_rng()))
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "trainer.json").write_text(json.dumps(asdict(_state(4))))
        exploit = _Exploit(directory / "ran")
        for path in folder.glob("*.pt"):
            content = torch.load(path, weights_only=False)
            content["more"] = exploit
            optimizer = content.get("optimizer_state_dict")
            if isinstance(optimizer, dict):
                optimizer["loss_scaler"] = exploit
                optimizer["optimizer_state_dict"]["param_groups"][0]["betas"] = exploit
            torch.save(content, path)
            torch.load(path, weights_only=False)
            assert (directory / "ran").exists(), "the pickle would not run anything"
            (directory / "ran").rmdir()
        seal(folder, step=4, world_size=dist.get_world_size())
    dist.barrier()
    return [*_draw(), *_train(engine, 4, 7)]


def _load_and_train(directory: Path) -> list[float]:
    engine = _engine(seed=1)
    assert load_checkpoint(engine, find_resumable(directory)) == _state(4)
    assert engine.global_steps == 4
    return [*_draw(), *_train(engine, 4, 7)]


def test_deepspeeds_files_of_an_earlier_version_resume_bit_for_bit_and_run_no_code(tmp_path: Path) -> None:
    wanted = run_on_ranks(_save_as_deepspeed, tmp_path)
    assert list(tmp_path.glob("step_000004/*optim_states.pt")) and not list(tmp_path.glob("step_000004/shard*"))
    assert run_on_ranks(_load_and_train, tmp_path) == wanted
    (alone,) = run_on_ranks(_load_and_train, tmp_path, num_ranks=1)
    both = [sum(losses) / 2 for losses in zip(*wanted, strict=True)]
    assert alone[3:] == pytest.approx(both[3:], rel=1e-6, abs=0)  # the order of additions differs
    assert alone[3:] != pytest.approx(wanted[0][3:], rel=1e-6, abs=0), "each rank has its own samples"
    assert not (tmp_path / "ran").exists()
