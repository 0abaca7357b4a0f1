"""Mistakes of a user: each gives one clear error with a remedy before training starts (issue 2, "Bad input").

Most tests run the code of `arc_ds.train.main` before its first engine in this process. Two tests run the real command.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds.config.load import config_hash, dump_yaml, load_config
from arc_ds.config.schema import RunConfig
from arc_ds.config.validate import check_paths
from arc_ds.data.loading.workers import BatchLoader
from arc_ds.errors import ArcError, CheckpointError, ConfigError, DataError, TokenizerError, WeightsError
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from arc_ds.shards.building.writer import build_shards
from arc_ds.training.build import read_parts
from arc_ds.training.run_folder import check_run_folder, find_start
from tests.helpers.tiny_data import numbered_texts, write_json_tokenizer, write_shards
from tests.helpers.tiny_run import train, write_inputs
from tests.helpers.zero_checkpoint import seal

CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _start(config: RunConfig) -> Path | None:
    """Run the part of `arc_ds.train.main` before the engine; return the checkpoint that the run would resume from."""
    check_paths(config)
    check_run_folder(config)
    return find_start(config, read_parts(config, CPU).inputs)


def _refusal(kind: type[ArcError], config: Path, run: Path, overrides: Sequence[str] = ()) -> str:
    """Message of the error that stops this start. The run's folder must stay unchanged."""
    before = _content(run)
    with pytest.raises(kind) as caught:
        _start(load_config(config, [f"run_dir={run}", *overrides]))
    assert type(caught.value) is kind
    assert _content(run) == before, "a refused start must not leave files"
    return str(caught.value)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_the_inputs_are_good_before_they_are_spoilt(config: Path, run: Path) -> None:
    assert _start(load_config(config, [f"run_dir={run}"])) is None


def test_a_world_size_that_does_not_divide_the_batch_is_refused(
    config: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = _refusal(ConfigError, config, run)
    assert "data.batch_size is 8" in message and "3 × 2 = 6" in message and "data.batch_size=12" in message


def _broken_backbone(config: Path, folder: Path) -> Path:
    """A copy of the encoder's backbone without one of its tensors."""
    shutil.copytree(config.parent / "encoder", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[Q_PROJ]
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_weights_with_a_missing_tensor_are_refused(config: Path, run: Path, tmp_path: Path) -> None:
    broken = _broken_backbone(config, tmp_path / "broken")
    for key in ("encoder.backbone", "decoders.0.backbone"):
        message = _refusal(WeightsError, config, run, [f"{key}={broken}"])
        assert str(broken) in message and Q_PROJ in message


def test_a_tokenizer_of_other_weights_is_refused(config: Path, run: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "tokenizer.model"
    lines = (config.parent / "other" / "tokenizer.model").read_bytes().splitlines()
    lines += [base64.b64encode(b"word %d" % rank) + b" %d" % rank for rank in range(len(lines), 400)]
    foreign.write_bytes(b"\n".join(lines))
    for key in ("encoder.tokenizer", "decoders.0.tokenizer"):
        message = _refusal(TokenizerError, config, run, [f"{key}={foreign}"])
        assert "352 rows" in message and "came with these weights" in message
    assert "the special token <|begin_of_text|> has the id 400" in message  # the decoder's sequences begin with it


def test_a_tar_that_is_cut_short_is_refused(config: Path, run: Path, tmp_path: Path) -> None:
    for key, name in (("data.sources.0.path", "train"), ("data.validation", "held_out")):
        shards = shutil.copytree(config.parent / name, tmp_path / name)
        tar = sorted(shards.glob("*.tar"))[-1]
        with tar.open("r+b") as file:
            file.truncate(tar.stat().st_size // 2)
        message = _refusal(DataError, config, run, [f"{key}={shards}"])
        assert str(tar) in message and "cut short" in message and "arc-ds shards build" in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_record_met_in_training_is_one_message(
    config: Path, run: Path, tmp_path: Path, num_workers: int
) -> None:
    shards = shutil.copytree(config.parent / "train", tmp_path / "train")
    for tar in shards.glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"Tower", b"Tover"))
    data = read_parts(load_config(config, [f"run_dir={run}", f"data.sources.0.path={shards}"]), CPU).data
    with pytest.raises(DataError) as caught, BatchLoader(data, range(9), num_workers=num_workers) as batches:
        next(batches)
    message = str(caught.value)
    assert message.startswith(f"{shards}/shard-") and "checksum" in message and "data.on_error: skip" in message
    assert len(message.splitlines()) == 1


def test_texts_without_a_token_make_no_shards(config: Path, tmp_path: Path) -> None:
    source = tmp_path / "empty.jsonl"
    source.write_text('{"text": ""}\n{"text": "  \\n"}\n')
    with pytest.raises(DataError) as caught:
        build_shards([source], tmp_path / "shards", config.parent / "encoder", max_tokens=64)
    assert not (tmp_path / "shards").exists()
    message = str(caught.value)
    assert "empty.jsonl" in message and "2 empty left out" in message and "Give other inputs" in message


def _used_run(
    config: Path, run: Path, *, steps: Sequence[int] = (), overrides: Sequence[str] = (), num_ranks: int = 1
) -> RunConfig:
    """Folder of a stopped run: config, metrics, and whole checkpoints without shards."""
    loaded = load_config(config, [f"run_dir={run}", *overrides])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_yaml(loaded))
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 0.0, "metrics": {"train/loss": 2.0}}\n')
    inputs = read_parts(loaded, CPU).inputs
    for step in steps:
        folder = run / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        state = {
            "step": step,
            "data_position": 8 * step,
            "data_fingerprint": inputs.data,
            "config_hash": config_hash(loaded),
            "extra": {"tokenizers": inputs.tokenizers, "backbones": inputs.backbones},
        }
        (folder / "trainer.json").write_text(json.dumps(state))
        seal(folder, step=step, world_size=num_ranks)
    return loaded


def test_a_used_folder_is_resumed_from_its_newest_checkpoint(config: Path, run: Path) -> None:
    """Control: without this test, the others would pass even if every folder were refused."""
    assert _start(_used_run(config, run, steps=(8, 16))) == run / "checkpoints" / "step_000016"


@pytest.mark.parametrize("steps", [(), (8,)], ids=["before its first checkpoint", "with a checkpoint"])
def test_a_new_run_or_another_config_is_refused_in_a_used_folder(
    config: Path, run: Path, steps: tuple[int, ...]
) -> None:
    _used_run(config, run, steps=steps)
    message = _refusal(ConfigError, config, run, ["seed=1"])
    assert "seed: 0 there, 1 here" in message and "another run_dir" in message
    message = _refusal(ConfigError, config, run, ["checkpoint.resume=never"])
    assert "saved work is not overwritten" in message and "resume=auto" in message


def test_an_older_checkpoint_is_not_resumed_over_newer_ones(config: Path, run: Path) -> None:
    _used_run(config, run, steps=(8, 16))
    message = _refusal(ConfigError, config, run, [f"checkpoint.resume={run}/checkpoints/step_000008"])
    assert "step_000016" in message and "another run_dir" in message


def test_a_checkpoint_of_another_config_is_refused_though_the_config_file_is_gone(config: Path, run: Path) -> None:
    _used_run(config, run, steps=(8,))
    (run / "config.yaml").unlink()
    assert "another config" in _refusal(ConfigError, config, run, ["optimizer.bridge_lr=1e-3"])


def _change_shards(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    write_shards(folder / "train", folder / "encoder", numbered_texts(40))


def _change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[Q_PROJ][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")


def _change_tokenizer(folder: Path) -> None:
    write_json_tokenizer(folder, bos=False)


@pytest.mark.parametrize(
    ("change", "folder", "kind", "words"),
    [
        (_change_shards, "", DataError, ("have changed", "Restore")),
        (_change_weights, "encoder", WeightsError, ("the weights at encoder.backbone differ", "Name the files")),
        (_change_weights, "wide", WeightsError, ("the weights at decoders.0.backbone differ", "Name the files")),
        (_change_tokenizer, "encoder", TokenizerError, ("the tokenizer of encoder differs", "Restore")),
        (_change_tokenizer, "wide", TokenizerError, ("the tokenizer of decoders.0 differs", "Restore")),
    ],
)
def test_inputs_that_changed_since_the_checkpoint_are_refused(
    run: Path, tmp_path: Path, change: Callable[[Path], None], folder: str, kind: type[ArcError], words: tuple[str, str]
) -> None:
    config = write_inputs(tmp_path / "own")
    _used_run(config, run, steps=(8,))
    change(tmp_path / "own" / folder)
    message = _refusal(kind, config, run)
    assert all(word in message for word in ("step_000008", *words))


def test_a_run_goes_on_where_its_models_and_shards_lie_elsewhere(run: Path, tmp_path: Path) -> None:
    config = write_inputs(tmp_path / "own")
    _used_run(config, run, steps=(8,))
    (tmp_path / "own").rename(tmp_path / "moved")
    config = tmp_path / "moved" / "config.yaml"
    config.write_text(config.read_text().replace(str(tmp_path / "own"), str(tmp_path / "moved")))
    assert _start(load_config(config, [f"run_dir={run}"])) == run / "checkpoints" / "step_000008"


def test_a_mean_over_parts_is_not_resumed_with_other_parts(config: Path, run: Path) -> None:
    overrides = ["loss.normalize=rank_mean"]
    _used_run(config, run, steps=(8,), overrides=overrides)
    assert _start(load_config(config, [f"run_dir={run}", *overrides])) == run / "checkpoints" / "step_000008"
    message = _refusal(ConfigError, config, run, [*overrides, "micro_batches=1"])
    assert "micro_batches: 2 there, 1 here" in message


@pytest.mark.parametrize("normalize", ["rank_mean", "global"])
def test_a_mean_over_ranks_is_not_resumed_with_other_ranks(config: Path, run: Path, normalize: str) -> None:
    overrides = [f"loss.normalize={normalize}"]
    _used_run(config, run, steps=(8,), overrides=overrides, num_ranks=2)
    if normalize == "global":
        assert _start(load_config(config, [f"run_dir={run}", *overrides])) == run / "checkpoints" / "step_000008"
    else:
        message = _refusal(ConfigError, config, run, overrides)
        assert "written by 2 ranks, but this run has 1" in message and "Resume with 2 ranks" in message


def test_a_folder_whose_checkpoints_are_all_torn_is_not_started_anew(config: Path, run: Path) -> None:
    _used_run(config, run, steps=(8, 16))
    for trainer in run.glob("checkpoints/*/trainer.json"):
        trainer.write_text("{}")
    message = _refusal(CheckpointError, config, run)
    assert "none of the checkpoints" in message and "another run_dir" in message
    message = _refusal(CheckpointError, config, run, [f"checkpoint.resume={run}/checkpoints/step_000016"])
    assert "trainer.json has 2 bytes" in message and "Name a whole step_NNNNNN, or auto" in message


def test_a_config_of_the_users_own_in_the_folder_is_not_overwritten(config: Path, run: Path) -> None:
    run.mkdir()
    (run / "config.yaml").write_text("# notes of mine\nsteps: 3\n")
    assert "would overwrite" in _refusal(ConfigError, config, run)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_say_it_once_and_end_with_code_2(config: Path, run: Path, tmp_path: Path) -> None:
    broken = _broken_backbone(config, tmp_path / "broken")
    code, console = train(config, [f"run_dir={run}", f"decoders.1.backbone={broken}"], num_ranks=2)
    assert code == EXIT_USER_ERROR, console
    waiting, message = console.splitlines()
    assert "waiting for all 2 ranks" in waiting and message.startswith("arc-ds train: "), console
    assert str(broken) in message and Q_PROJ in message
    assert not run.exists()


def test_the_command_finds_a_wrong_key_without_starting_ranks(config: Path, run: Path) -> None:
    code, console = train(config, [f"run_dir={run}", "poolin.factors=[4]"], num_ranks=2)
    assert code == EXIT_USER_ERROR
    assert len(console.splitlines()) == 1 and "poolin" in console and "pooling" in console
    assert not run.exists()
