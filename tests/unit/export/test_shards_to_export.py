"""From ZeRO shards to an export: any number of ranks, means of checkpoints, bounded reads, checks of the result.

`tests/distributed/test_export.py` has shards that DeepSpeed wrote.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arc_ds import ArcModel
from arc_ds.checkpoints.checkpoint import CheckpointRemoved
from arc_ds.checkpoints.shards import open_shards
from arc_ds.checkpoints.torch_file import StoredTensor
from arc_ds.cli import main
from arc_ds.errors import CheckpointError, WeightsError
from arc_ds.export import formats
from arc_ds.export.consolidate import consolidate, consolidate_newest, with_decoders
from arc_ds.export.formats import write_export
from arc_ds.inference.load import open_arc_checkpoint, open_arc_folder
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from arc_ds.model.weights import lazy_tensor
from tests.helpers.tiny_export import tiny_trained
from tests.helpers.zero_checkpoint import frozen_from, seal, write_deepspeed_checkpoint, write_zero_checkpoint

CHANGES = {"num_layers": 2, "decoder_sizes": (48, 48)}
FROZEN = ("encoder.tok_embeddings", "encoder.layers.0.")
FILES = {
    "arc-ds": ["model.safetensors"],
    "arc": ["bridge_module/consolidated.safetensors", "embedder/consolidated.safetensors"],
}


def written(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


@pytest.mark.parametrize("export_format", ["arc-ds", "arc"])
def test_shards_of_any_number_of_ranks_give_the_bytes_of_the_weights(tmp_path: Path, export_format: str) -> None:
    trained = tiny_trained(tmp_path / "run", **CHANGES)
    write_export(trained, tmp_path / "expected", export_format=export_format)
    expected = written(tmp_path / "expected")
    assert list(expected) == FILES[export_format]
    for world_size in (1, 2, 3, 4):
        ours, theirs = tmp_path / f"ranks{world_size}", tmp_path / f"deepspeed{world_size}"
        write_zero_checkpoint(ours, trained, world_size)
        write_deepspeed_checkpoint(theirs, trained, world_size, frozen=FROZEN)
        for run in (ours, theirs):
            assert main(["export", str(run), str(run / "out"), "--format", export_format]) == 0
            assert written(run / "out") == expected, run
    swapped = dataclasses.replace(trained, tensors={name: -tensor for name, tensor in trained.tensors.items()})
    write_zero_checkpoint(tmp_path / "other", swapped, 2)
    assert main(["export", str(tmp_path / "other"), str(tmp_path / "other" / "out"), "--format", export_format]) == 0
    assert written(tmp_path / "other" / "out") != expected


def test_no_read_is_larger_than_a_block_or_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of an export does not grow with its tensors."""
    trained = tiny_trained(tmp_path / "run", **CHANGES)
    write_zero_checkpoint(tmp_path / "run", trained, 2)
    sizes: list[int] = []
    real = StoredTensor.read

    def read(stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
        if stored.shape:  # others are step counts
            sizes.append(stop - start)
        return real(stored, start, stop)

    monkeypatch.setattr(StoredTensor, "read", read)
    monkeypatch.setattr(lazy_tensor, "_BLOCK_VALUES", 100)
    write_export(consolidate(tmp_path / "run/checkpoints/step_000001"), tmp_path / "out", export_format="both")
    head = trained.spec.backbone.head_dim * trained.spec.backbone.hidden_size
    assert max(sizes) <= max(100, head) < max(t.numel() for t in trained.tensors.values())
    assert sum(sizes) == 2 * sum(t.numel() for t in trained.tensors.values())
    for name, tensor in trained.tensors.items():
        assert torch.equal(open_arc_folder(tmp_path / "out").tensors.tensor(name), tensor)


def test_both_formats_lie_in_one_folder(tmp_path: Path) -> None:
    trained = tiny_trained(tmp_path / "run", **CHANGES)
    for export_format in ("arc-ds", "arc", "both"):
        write_export(trained, tmp_path / export_format, export_format=export_format)
    assert written(tmp_path / "both") == written(tmp_path / "arc-ds") | written(tmp_path / "arc")
    vectors = [ArcModel.from_checkpoint(tmp_path / f, decoders=[]).compress([[5, 9]])[0] for f in ("both", "arc")]
    assert torch.equal(*vectors)
    assert open_arc_checkpoint(tmp_path / "both").spec == trained.spec


@pytest.mark.parametrize("export_format", ["arc-ds", "arc"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chosen", [(1,), (2, 0)])
def test_chosen_decoders_alone_are_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], export_format: str, shared: bool, chosen: tuple[int, ...]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    trained = tiny_trained(run, decoder_sizes=(48, 48, 48), bridge_shared=shared)
    checkpoint = write_zero_checkpoint(run, trained, 2)
    names = [f"decoder{idx}" for idx in chosen]
    options = [f"--decoder={name}" for name in names] + ["--format", export_format]
    assert main(["export", str(run), str(out), *options]) == 0
    assert f"for {', '.join(sorted(names))}\n" in capsys.readouterr().out
    opened = open_arc_folder(out)
    assert [decoder.name for decoder in opened.decoders] == sorted(names)
    assert opened.spec.decoder_sizes == (48,) * len(chosen) and len(opened.tensors.shapes) < len(trained.tensors)
    write_export(consolidate(checkpoint), tmp_path / "all", export_format=export_format)
    models = [ArcModel.from_checkpoint(folder, decoders=[]) for folder in (out, tmp_path / "all")]
    for port, idx in enumerate(sorted(chosen)):
        assert torch.equal(models[0].compress([[5, 9]], port)[0], models[1].compress([[5, 9]], idx)[0])
    assert not torch.equal(*(models[1].compress([[5, 9]], idx)[0] for idx in (0, 1)))
    card = (out / "README.md").read_text()
    assert [f"decoder{idx}" in card for idx in range(3)] == [idx in chosen for idx in range(3)]


def test_a_chosen_decoder_keeps_its_records(tmp_path: Path) -> None:
    weights = {f"decoder{idx}": {"samples": "", "gguf": idx == 1} for idx in range(2)}
    trained = dataclasses.replace(
        tiny_trained(tmp_path, **CHANGES | {"decoder_sizes": (48, 40)}), decoder_ids=("a", "b"), decoder_weights=weights
    )
    write_export(with_decoders(trained, ["decoder1"]), tmp_path / "out")
    opened = open_arc_folder(tmp_path / "out")
    (decoder,) = opened.decoders
    assert (decoder.name, decoder.ids_digest, decoder.weights) == ("decoder1", "b", weights["decoder1"])
    assert opened.spec.decoder_sizes == (40,)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoders", [{"name": "a", "rope_scaling": "none"}]),
        ("decoders", [{"name": "a", "rope_scaling": "none", "of_a_later_version": 1}] * 2),
        ("decoder_ids", ["a"]),
        ("port_places", [0]),
        ("compressor", "none"),
    ],
)
def test_a_trainer_state_of_another_version_is_named(tmp_path: Path, key: str, value: object) -> None:
    folder = write_zero_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run", **CHANGES), 1)
    state = json.loads((folder / "trainer.json").read_text())
    if value == "none":
        del state["extra"][key]
    else:
        state["extra"][key] = value
    (folder / "trainer.json").write_text(json.dumps(state))
    seal(folder, step=1, world_size=1)
    with pytest.raises(CheckpointError, match=r"trainer.json does not describe.*Export it with the version that wrote"):
        consolidate(folder)


def test_a_decoder_that_the_checkpoint_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_zero_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run", **CHANGES), 1)
    command = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--decoder", "decoder1", "--decoder", "olmo"]
    assert main(command) == EXIT_USER_ERROR
    assert "no decoder olmo; it was trained for decoder0, decoder1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export_format", ["arc-ds", "arc", "both"])
def test_a_lone_decoder_with_a_shared_bridge_is_exported(tmp_path: Path, export_format: str) -> None:
    trained = tiny_trained(tmp_path / "run", bridge_shared=True)
    write_zero_checkpoint(tmp_path / "run", trained, 1)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", export_format]) == 0
    found = open_arc_folder(tmp_path / "out").tensors.tensor("ports.0.bridge.layer1.weight")
    assert torch.equal(found, trained.tensors["bridge.layer1.weight"])


def test_the_checkpoints_of_a_mean_are_ordered_by_their_step(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        write_zero_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run"), 1, step=step)
    assert consolidate_newest(tmp_path / "run", 2)[1].averaged_steps == (999_999, 1_000_000)


def test_a_relative_path_leads_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card's figures are in the run's folder."""
    trained = tiny_trained(tmp_path / "run", **CHANGES)
    for step in (149, 150):
        folder = write_zero_checkpoint(tmp_path / "run", trained, 1, step=step)
    validation = {f"validation/decoder{idx}/recall/gap_closed": 0.25 + idx / 2 for idx in range(2)}
    entries = [{"step": n, "time": 0.0, "metrics": {"train/loss": float(n)}} for n in range(1, 151)]
    entries.append({"step": 150, "time": 0.0, "metrics": validation})
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    monkeypatch.chdir(folder)
    assert main(["export", ".", str(tmp_path / "out"), "--average", "2", "--decoder", "decoder1"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Training loss: 150.0000" in card and "the 100 logged steps from 51 to 150: 100.5000" in card
    assert "| 0.750 |" in card and "0.250" not in card, "decoder0 is not in the export"


def test_shards_of_another_layout_are_one_error(tmp_path: Path) -> None:
    trained = tiny_trained(tmp_path / "run", **CHANGES)
    for step, change in enumerate(
        (
            lambda state: state.update(param_shapes=[[]]),
            lambda state: state["param_shapes"].append({"a": (1,)}),
            lambda state: state.update(frozen_param_fragments={}),
            lambda state: state.update(
                frozen_param_shapes={"encoder.norm": (1 << 40,)}, frozen_param_fragments={"encoder.norm": torch.ones(4)}
            ),
            lambda state: state.update(shared_params={"a": "b"}),
        )
    ):
        folder = write_deepspeed_checkpoint(tmp_path / "run", trained, 1, step=step, frozen=FROZEN)
        (path,) = folder.glob("*model_states.pt")
        state = torch.load(path)
        change(state)
        torch.save(state, path)
        with pytest.raises(CheckpointError, match="do not have the layout of a ZeRO-3 engine"):
            open_shards(folder, 1)


def test_a_tied_parameter_is_written_under_each_of_its_names(tmp_path: Path) -> None:
    trained = tiny_trained(tmp_path / "run")
    folder = write_deepspeed_checkpoint(tmp_path / "run", trained, 2)
    for path in folder.glob("*model_states.pt"):
        state = torch.load(path)
        state["shared_params"] = {"tied": "ports.0.rec"}
        torch.save(state, path)
    seal(folder, step=1, world_size=2)
    parameters = consolidate(folder).tensors
    assert torch.equal(parameters["tied"].whole(), trained.tensors["ports.0.rec"])
    lazy_tensor.write_safetensors(tmp_path / "tied.safetensors", parameters)
    assert torch.equal(load_file(tmp_path / "tied.safetensors")["tied"], trained.tensors["ports.0.rec"])


def three_checkpoints(tmp_path: Path) -> list[dict[str, torch.Tensor]]:
    """Checkpoints of the steps 1, 2, 3 on 1, 2 and 3 ranks; the first layer is frozen."""
    first = tiny_trained(tmp_path / "run", **CHANGES)
    write_export(first, tmp_path / "start")
    extra = {"frozen": frozen_from(tmp_path / "start")}
    found = []
    for step in (1, 2, 3):
        trained = tiny_trained(tmp_path / "run", seed=step, **CHANGES)
        kept = {name: tensor for name, tensor in first.tensors.items() if name.startswith(FROZEN)}
        trained = dataclasses.replace(trained, tensors=dict(trained.tensors) | kept)
        write_zero_checkpoint(tmp_path / "run", trained, step, step=step, frozen=FROZEN, extra=extra)
        found.append(dict(trained.tensors))
    return found


def test_the_mean_of_checkpoints_is_that_of_their_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = three_checkpoints(tmp_path)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out), "--average", "2"]) == 0
    assert "step 3 (mean of steps 2, 3)" in capsys.readouterr().out
    assert "the mean of the checkpoints of the steps 2, 3" in (out / "README.md").read_text()
    for name, tensor in load_file(out / "model.safetensors").items():
        exact = (members[1][name].double() + members[2][name].double()) / 2
        # Two roundings of float32, each at most half a unit in the last place of a member.
        bound = torch.finfo(torch.float32).eps * torch.maximum(members[1][name].abs(), members[2][name].abs())
        assert bool(((tensor.double() - exact).abs() <= bound).all()), name
        assert torch.equal(tensor, members[0][name]) is name.startswith(FROZEN), name
    middle = tmp_path / "run" / "checkpoints" / "step_000002"
    assert consolidate_newest(middle, 2)[1].averaged_steps == (1, 2)
    with pytest.raises(CheckpointError, match=r"holds 3 checkpoints up to step_000003.*mean of 4.*keep_last"):
        consolidate_newest(tmp_path / "run", 4)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "zero"), "--average", "0"]) == EXIT_USER_ERROR


def test_checkpoints_of_other_sizes_have_no_mean(tmp_path: Path) -> None:
    write_zero_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run"), 1, step=1)
    write_zero_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run", **CHANGES), 1, step=2)
    with pytest.raises(CheckpointError, match="steps 1, 2 hold compressors of different sizes"):
        consolidate_newest(tmp_path / "run", 2)


def test_a_checkpoint_that_is_removed_while_it_is_written_gives_the_newest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (tiny_trained(tmp_path / "run", seed=seed) for seed in (1, 2))
    old = write_zero_checkpoint(tmp_path / "run", first, 2, step=1)
    real = StoredTensor.read

    def read(stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
        if stored.shape and old.exists():
            write_zero_checkpoint(tmp_path / "run", second, 2, step=2)
            old.rename(tmp_path / "removed")
        return real(stored, start, stop)

    monkeypatch.setattr(StoredTensor, "read", read)
    trained = consolidate(old)
    with pytest.raises(CheckpointRemoved, match="step_000001 was removed"):
        write_export(trained, tmp_path / "named")
    (tmp_path / "run" / "checkpoints" / "step_000002").rename(tmp_path / "aside")
    (tmp_path / "removed").rename(old)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["ports.0.rec"], second.tensors["ports.0.rec"])
    assert not (tmp_path / "named").exists()


def test_a_checkpoint_without_shards_of_all_ranks_is_named(tmp_path: Path) -> None:
    folder = write_deepspeed_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run"), 2)
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="zero_pp_rank_1_mp_rank_00_optim_states.pt cannot be read"):
        consolidate(folder)
    seal(folder, step=1, world_size=2)
    with pytest.raises(CheckpointError, match="it has 0 files .*rank_1"):
        consolidate(folder)
    seal(folder, step=1, world_size=1)
    with pytest.raises(CheckpointError, match=r"master of sub-group 0 has .* elements on its ranks, expected"):
        consolidate(folder)


def test_a_tensor_that_reads_back_with_other_values_is_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, real = tiny_trained(tmp_path / "run"), formats.write_safetensors

    def on_a_bad_disk(path: Path, *arguments: object) -> str:
        digest = real(path, *arguments)
        _flip(path)
        return digest

    monkeypatch.setattr(formats, "write_safetensors", on_a_bad_disk)
    with pytest.raises(WeightsError, match="`ports.0.rec` was written and reads back with other values"):
        write_export(trained, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_that_lacks_a_tensor_is_not_published(tmp_path: Path) -> None:
    trained = tiny_trained(tmp_path / "run")
    fewer = {name: tensor for name, tensor in trained.tensors.items() if name != "ports.0.rec"}
    with pytest.raises(WeightsError, match="`ports.0.rec` is missing"):
        write_export(dataclasses.replace(trained, tensors=fewer), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", _flip, "model.safetensors has checksum"),
        ("config.json", _lengthen, "config.json has .* bytes, expected"),
        ("tokenizer.model", Path.unlink, "tokenizer.model cannot be read"),
        ("checksums.json", Path.unlink, "has no checksums.json: it is no export, or one of an earlier version"),
        ("checksums.json", lambda path: path.write_text('{"files": [{}]}'), "does not list files"),
    ],
)
def test_verify_names_what_differs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    out = tmp_path / "out"
    write_export(tiny_trained(tmp_path / "run"), out)
    (out / "README.md").write_text("my own words")  # people may edit the card
    assert main(["export", "--verify", str(out)]) == 0
    assert "3 files" in capsys.readouterr().out
    damage(out / name)
    assert main(["export", "--verify", str(out)]) == EXIT_USER_ERROR

    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("export_format", ["arc-ds", "arc"])
def test_weights_of_another_export_are_refused_at_loading(tmp_path: Path, export_format: str) -> None:
    trained, (name, *_) = tiny_trained(tmp_path / "run"), FILES[export_format]
    write_export(trained, tmp_path / "out", export_format=export_format)
    write_export(trained, tmp_path / "half", export_format=export_format, dtype="bfloat16")
    (tmp_path / "out" / name).write_bytes((tmp_path / "half" / name).read_bytes())
    with pytest.raises(WeightsError, match=f"{name} has .* bytes, but checksums.json says .* Copy the export again"):
        ArcModel.from_checkpoint(tmp_path / "out", decoders=[])
    (tmp_path / "out" / "checksums.json").unlink()  # as in an export of an earlier version
    ArcModel.from_checkpoint(tmp_path / "out", decoders=[])


def test_options_of_the_command_reach_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_zero_checkpoint(run, tiny_trained(run), 1)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    again = ["export", str(run), str(tmp_path / "out"), "--dtype", "bf16"]
    assert main(again) == EXIT_USER_ERROR and "exists already" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["ports.0.rec"].dtype == torch.bfloat16
    assert main(["export", str(run)]) == EXIT_USER_ERROR
    assert "no folder to write" in capsys.readouterr().err
    assert main(["export", "--verify", str(run), str(tmp_path / "out")]) == EXIT_USER_ERROR
    assert "two folders were given" in capsys.readouterr().err
