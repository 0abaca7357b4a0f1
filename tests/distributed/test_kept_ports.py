"""A third decoder joins a trained encoder: its run trains one port on two ranks, and the two old ports do not change.

The old weights are float32 values that bfloat16 cannot represent, so a port that went through the engine of a bfloat16
run would be rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arc_ds import ArcModel
from arc_ds.checkpoints.kept_ports import KEPT_NAME
from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.config.load import load_config
from arc_ds.export.consolidate import TrainedCompressor, consolidate, find_checkpoint
from arc_ds.export.formats import write_export
from arc_ds.inference.load import open_arc_folder
from arc_ds.launch.signals import StopRequest
from arc_ds.model.weights.lazy_tensor import as_lazy
from arc_ds.tokenizers import ids_digest, load_tokenizer
from arc_ds.training.build import build_run
from arc_ds.training.build_model import compressor_spec
from arc_ds.training.loop import fit
from arc_ds.training.run_folder import RunFolder
from tests.distributed.test_resume_world_sizes import StopAt
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_export import random_trained
from tests.helpers.tiny_run import write_inputs

pytestmark = pytest.mark.distributed

OLD = ("wide", "other")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run with two decoders, and a float32 export for both next to it."""
    config = write_inputs(tmp_path_factory.mktemp("inputs"))
    folder = config.parent
    spec = compressor_spec(load_config(config))
    decoders = [TrainedFor(name=name, rope_scaling="checkpoint", chat_template="llama2") for name in OLD]
    ids = tuple(ids_digest(load_tokenizer(folder / name)) for name in OLD)
    write_export(random_trained(spec, folder / "encoder", decoders, decoder_ids=ids), folder / "old")
    return config


def train(config: str, overrides: Sequence[str], stop_at: int) -> tuple[list[str], dict[str, int]]:
    """Start or resume a run and save it at a step. Returns its decoders, and its number of parameters by module."""
    settings = load_config(config, ["tracking.mlflow=false", "data.num_workers=0", "micro_batches=1", *overrides])
    run = build_run(settings, torch.device("cpu"))
    folder = RunFolder(settings, run)
    fit(run, [StopAt(stop_at)], StopRequest())
    folder.save(run)
    folder.close("FINISHED")
    return list(run.decoder_names), {n: len(list(m.parameters())) for n, m in run.engine.module.named_children()}


def whole(trained: TrainedCompressor) -> dict[str, torch.Tensor]:
    """The tensors of a trained compressor in memory."""
    return {name: as_lazy(tensor).whole() for name, tensor in trained.tensors.items()}


def same_bits(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], ports: Mapping[str, str]) -> None:
    """Check that ports of two exports are equal. ports: prefix in `new` for each prefix in `old`."""
    for before, after in ports.items():
        names = [name for name in old if name.startswith(before)]
        assert len(names) == 4
        for name in names:
            found = new[after + name.removeprefix(before)]
            assert found.dtype == old[name].dtype and torch.equal(found, old[name]), name


@pytest.mark.parametrize(("precision", "listed"), [("fp32", "all"), ("bf16", "the new one")])
def test_a_third_decoder_leaves_two_old_ports_equal_to_the_bit(
    config: Path, tmp_path: Path, precision: str, listed: str
) -> None:
    folder = config.parent
    third = {"name": "third", "backbone": str(folder / "wide"), "fresh_bridge": "true"}
    decoders = [third] if listed == "the new one" else [*({"name": name, "train": "false"} for name in OLD), third]
    written = "[" + ", ".join("{" + ", ".join(f"{k}: {v}" for k, v in d.items()) + "}" for d in decoders) + "]"
    overrides = [
        f"decoders={written}", f"encoder.init_from={folder / 'old'}", f"run_dir={tmp_path / 'run'}",
        f"precision={precision}", "encoder.trained_layers=0", "encoder.train_embeddings=false",
    ]  # fmt: skip
    for step in (1, 3):  # the second call resumes the run
        names, parameters = run_on_ranks(train, str(config), overrides, step)[0]
        assert names == ["third"] and parameters == {"encoder": 19, "ports": 4}
    checkpoint = find_checkpoint(tmp_path / "run")
    old = load_file(folder / "old" / "model.safetensors")
    same_bits(old, load_file(checkpoint / KEPT_NAME), {"ports.0.": "ports.0.", "ports.1.": "ports.1."})
    trained = consolidate(checkpoint)
    assert trained.step == 3 and [decoder.name for decoder in trained.decoders] == [*OLD, "third"]
    assert not torch.equal(whole(trained)["ports.2.cont"], torch.ones(1, 32)), "the new port did not train"
    write_export(trained, tmp_path / "out")
    new, opened = load_file(tmp_path / "out" / "model.safetensors"), open_arc_folder(tmp_path / "out")
    same_bits(old, new, {"ports.0.": "ports.0.", "ports.1.": "ports.1."})
    assert opened.decoders[:2] == open_arc_folder(folder / "old").decoders and opened.decoders[2].name == "third"
    assert opened.decoders[2].chat_template == "none"
    if precision == "fp32":  # a bfloat16 run stores its frozen encoder in bfloat16
        models = [ArcModel.from_checkpoint(path, decoders=[]) for path in (folder / "old", tmp_path / "out")]
        for decoder in range(2):
            before, after = (model.compress(["the sea"], decoder)[0] for model in models)
            assert torch.equal(before, after)
    write_export(trained, tmp_path / "half", dtype="bfloat16")
    half = {name: t.float() for name, t in load_file(tmp_path / "half" / "model.safetensors").items()}
    write_export(dataclasses.replace(trained, tensors=half), tmp_path / "half_again", dtype="bfloat16")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "half_again")]
    assert files[0] == files[1]


def test_an_old_port_that_is_trained_with_the_others_does_change(config: Path, tmp_path: Path) -> None:
    """The test above would prove nothing if a run could not change an old port."""
    folder = config.parent
    decoders = f"decoders=[{{name: other, backbone: {folder / 'other'}}}]"
    overrides = [decoders, f"encoder.init_from={folder / 'old'}", f"run_dir={tmp_path / 'run'}"]
    assert run_on_ranks(train, str(config), overrides, 2)[0][0] == ["other"]
    trained, old = consolidate(find_checkpoint(tmp_path / "run")), load_file(folder / "old" / "model.safetensors")
    assert [decoder.name for decoder in trained.decoders] == list(OLD)
    new = whole(trained)
    same_bits(old, new, {"ports.0.": "ports.0."})
    for name in ("ports.1.bridge.layer1.weight", "ports.1.cont", "encoder.layers.0.attention.wq.weight"):
        assert not torch.equal(new[name], old[name]), name
