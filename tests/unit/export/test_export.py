"""Exports in both formats: round trip, protection against overwriting, and errors for damaged exports."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds import ArcModel
from arc_ds.batch.groups import GroupRule
from arc_ds.checkpoints.checkpoint import CheckpointRemoved
from arc_ds.checkpoints.shards import SavedShards
from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.errors import CheckpointError, TokenizerError, WeightsError
from arc_ds.export import consolidate, formats
from arc_ds.export.consolidate import TrainedCompressor, consolidate_newest, find_checkpoint
from arc_ds.export.formats import write_export
from arc_ds.inference.load import load_compressor, open_arc_folder
from arc_ds.model.backbone_config import RopeScaling
from arc_ds.tokenizers import ids_digest, load_tokenizer
from tests.helpers.tiny_data import swap_letters, write_json_tokenizer
from tests.helpers.tiny_export import ENCODER, tiny_trained, write_decoder
from tests.helpers.tokenizer_files import write_mistral_tokenizer
from tests.helpers.zero_checkpoint import write_zero_checkpoint

FORMATS = ("arc-ds", "arc")
CONTEXTS = [[5, 9, 80, 3, 77], [1], list(range(200, 217))]
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
SPECS = {
    "default": {},
    "two_decoders": {"decoder_sizes": (48, 48)},
    "shared_bridge": {"decoder_sizes": (48, 48), "bridge_shared": True},
    "shared_bridge_without_markers": {"decoder_sizes": (48, 48), "bridge_shared": True, "bridge": "rms", "markers": ()},
    "fixed_groups": {"rules": (GroupRule("count", 3),)},
    "two_pooled_layers": {"num_layers": 2, "rules": (GroupRule("factor", 2),) * 2},
    "memory": {"rules": (), "memory_tokens": 3, "pooled_queries": False},
    "no_markers": {"markers": ()},
    "one_marker": {"markers": ("rec",)},
    "linear": {"bridge": "linear"},
    "rms": {"bridge": "rms"},
    "no_bridge": {"bridge": "none", "bridge_hidden_size": None, "decoder_sizes": (32,)},
    "similarity": {"strategy": "similarity_cosine", "rules": (GroupRule("floor_factor", 4),)},
    "between": {"strategy": "last", "where": "between", "causal": True, "pooled_queries": False},
    "scaled_positions": {"backbone": dataclasses.replace(ENCODER, rope_scaling=SCALING)},
}
OURS_ALONE = {
    "kmeans": {"strategy": "kmeans"},
    "pruning_by_norm": {"strategy": "prune_norm", "rules": (GroupRule("floor_factor", 4),)},
    "two_widths": {"decoder_sizes": (48, 40)},
    "embedding": {"where": "after", "rules": (GroupRule("count", 1),), "markers": ()},
    "gelu": {"bridge": "mlp_gelu"},
    "two_rms_bridges": {"decoder_sizes": (48, 48), "bridge": "rms"},
}


def trained_model(trained: TrainedCompressor) -> ArcModel:
    """The compressor as it was trained, without files."""
    shapes = {name: tuple(tensor.shape) for name, tensor in trained.tensors.items()}
    source = SimpleNamespace(path=Path("memory"), shapes=shapes, tensor=trained.tensors.__getitem__)
    return ArcModel(trained.spec, load_compressor(trained.spec, source, torch.device("cpu"), torch.float32), [])


def check_same(model: ArcModel, trained: TrainedCompressor) -> None:
    marker = next(iter(trained.spec.markers), None)
    for decoder in range(len(trained.spec.decoder_sizes)):
        found = model.compress(CONTEXTS, decoder, marker)
        for ours, expected in zip(found, trained_model(trained).compress(CONTEXTS, decoder, marker), strict=True):
            assert torch.equal(ours, expected)
            assert ours.abs().max() > 0.01


@pytest.mark.parametrize(
    ("export_format", "name"), [*product(FORMATS, SPECS), *(("arc-ds", name) for name in OURS_ALONE)]
)
def test_an_export_gives_the_same_vectors_to_the_last_bit(tmp_path: Path, export_format: str, name: str) -> None:
    trained = tiny_trained(tmp_path / "run", **{**SPECS, **OURS_ALONE}[name])
    write_export(trained, tmp_path / "out", export_format=export_format)
    model = ArcModel.from_checkpoint(tmp_path / "out", decoders=[])
    assert model.spec == trained.spec
    check_same(model, trained)


@pytest.mark.parametrize("name", OURS_ALONE)
def test_what_the_arc_format_cannot_say_is_refused_without_a_trace(tmp_path: Path, name: str) -> None:
    trained = tiny_trained(tmp_path / "run", **OURS_ALONE[name])
    with pytest.raises(WeightsError, match="se our own export format"):
        write_export(trained, tmp_path / "out", export_format="arc")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_wrong_weights_would_be_seen(tmp_path: Path) -> None:
    write_export(tiny_trained(tmp_path / "run", seed=1), tmp_path / "out")
    with pytest.raises(AssertionError):
        check_same(ArcModel.from_checkpoint(tmp_path / "out", decoders=[]), tiny_trained(tmp_path / "run", seed=0))


@pytest.mark.parametrize("export_format", FORMATS)
def test_bfloat16_halves_the_file_and_keeps_eight_bits(tmp_path: Path, export_format: str) -> None:
    trained = tiny_trained(tmp_path / "run")
    for dtype in ("float32", "bfloat16"):
        write_export(trained, tmp_path / dtype, export_format=export_format, dtype=dtype)
    source = open_arc_folder(tmp_path / "bfloat16")
    for name, tensor in trained.tensors.items():
        assert torch.equal(source.tensors.tensor(name), tensor.bfloat16()), name
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).rglob("*.safetensors")) for d in ("bfloat16", "float32")]
    assert sizes[0] < 0.55 * sizes[1]


@pytest.mark.parametrize("export_format", FORMATS)
def test_the_exports_tokenizer_is_the_encoders(tmp_path: Path, export_format: str) -> None:
    trained = tiny_trained(tmp_path / "run")
    write_export(trained, tmp_path / "out", export_format=export_format)
    original = load_tokenizer(trained.encoder_tokenizer)
    Path(trained.encoder_tokenizer).unlink()
    model = ArcModel.from_checkpoint(tmp_path / "out", decoders=[])
    assert model.encoder_tokenizer is not None
    assert model.encoder_tokenizer.fingerprint == original.fingerprint
    assert torch.equal(model.compress(["the sea"])[0], model.compress([original.encode("the sea")])[0])


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
@pytest.mark.parametrize("export_format", FORMATS)
def test_mistral_s_tokenizers_are_found_in_an_export_and_next_to_a_decoder(
    tmp_path: Path, export_format: str, name: str
) -> None:
    trained = tiny_trained(tmp_path / "run")
    tokenizer = write_mistral_tokenizer(tmp_path / "run" / name)
    write_export(trained, tmp_path / "out", export_format=export_format, tokenizer=tokenizer)
    decoder = write_decoder(tmp_path / "decoder")
    (decoder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    write_mistral_tokenizer(decoder / name)
    model = ArcModel.from_checkpoint(tmp_path / "out", decoders=[decoder])
    for found in (model.encoder_tokenizer, model.decoder_tokenizers[0]):
        assert found is not None and found.fingerprint == load_tokenizer(tokenizer).fingerprint


def trained_with_json(folder: Path) -> TrainedCompressor:
    """A compressor whose checkpoint records the tokenizers of its encoder and decoder."""
    trained = tiny_trained(folder)
    encoder, decoder = write_json_tokenizer(folder / "encoder"), write_decoder(folder / "decoder")
    return dataclasses.replace(
        trained,
        encoder_tokenizer=str(encoder),
        encoder_fingerprint=load_tokenizer(encoder).fingerprint,
        decoder_ids=(ids_digest(load_tokenizer(decoder)),),
    )


@pytest.mark.parametrize("export_format", FORMATS)
def test_another_tokenizer_than_in_training_is_refused_at_export_and_at_loading(
    tmp_path: Path, export_format: str
) -> None:
    trained = trained_with_json(tmp_path / "run")
    out, other = tmp_path / "out", swap_letters(write_json_tokenizer(tmp_path / "other"))
    with pytest.raises(
        TokenizerError, match=r"other is not the one that the encoder was trained with.*\(--tokenizer\)"
    ):
        write_export(trained, out, export_format=export_format, tokenizer=other)
    assert not out.exists()
    write_export(trained, out, export_format=export_format, tokenizer=Path(trained.encoder_tokenizer))
    ArcModel.from_checkpoint(out, decoders=[tmp_path / "run" / "decoder"])
    swap_letters(tmp_path / "run" / "decoder")
    with pytest.raises(TokenizerError, match=r"decoder/tokenizer.json gives other ids.*Restore the tokenizer"):
        ArcModel.from_checkpoint(out, decoders=[tmp_path / "run" / "decoder"])
    swap_letters(out)
    with pytest.raises(TokenizerError, match=r"out/tokenizer.json is not the one.*Restore the file, or export"):
        ArcModel.from_checkpoint(out, decoders=[])
    (out / "tokenizer.json").unlink()  # the tokenizer of `encoder_backbone` replaces it
    with pytest.raises(TokenizerError, match="other/tokenizer.json is not the one"):
        ArcModel.from_checkpoint(out, decoders=[], encoder_backbone=other)
    model = ArcModel.from_checkpoint(out, decoders=[], encoder_backbone=trained.encoder_tokenizer)
    assert model.encoder_tokenizer is not None


def test_an_export_of_a_gguf_tokenizer_is_that_of_training(tmp_path: Path) -> None:
    """It is saved as tokenizer.json, which has another fingerprint."""
    trained = trained_with_json(tmp_path / "run")
    saved = load_tokenizer(trained.encoder_tokenizer)
    gguf = SimpleNamespace(fingerprint="gguf", text_vocab_size=saved.text_vocab_size, save=saved.save)
    ids = {"encoder_fingerprint": gguf.fingerprint, "encoder_tokenizer": "x.gguf"}
    with pytest.MonkeyPatch.context() as patch:
        real = formats.load_tokenizer
        patch.setattr(formats, "load_tokenizer", lambda path: gguf if path == "x.gguf" else real(path))
        write_export(dataclasses.replace(trained, **ids), tmp_path / "out")
    assert ArcModel.from_checkpoint(tmp_path / "out", decoders=[]).encoder_tokenizer is not None
    assert "gguf" in open_arc_folder(tmp_path / "out").encoder_fingerprints


@pytest.mark.parametrize(("export_format", "name"), [("arc-ds", "config.json"), ("arc", "decoders.json")])
def test_an_export_of_an_earlier_version_is_read(tmp_path: Path, export_format: str, name: str) -> None:
    write_export(trained_with_json(tmp_path / "run"), tmp_path / "out", export_format=export_format)
    plain = json.loads((tmp_path / "out" / name).read_text())
    plain["decoders"][0].pop("ids_digest")
    plain["decoders"][0].pop("chat_template")
    plain.pop("encoder_tokenizer")
    (tmp_path / "out" / name).write_text(json.dumps(plain))
    swap_letters(tmp_path / "run" / "decoder")
    ArcModel.from_checkpoint(tmp_path / "out", decoders=[tmp_path / "run" / "decoder"])
    own = load_tokenizer(tmp_path / "out").fingerprint
    assert open_arc_folder(tmp_path / "out").encoder_fingerprints == (own,)


@pytest.mark.parametrize("export_format", FORMATS)
def test_an_export_says_how_its_decoders_were_read(tmp_path: Path, export_format: str) -> None:
    trained = tiny_trained(tmp_path / "run", decoder_sizes=(48, 48))
    decoders = (
        TrainedFor(name="a", rope_scaling="none"),
        TrainedFor(name="b", rope_scaling="checkpoint", bos=False, chat_template="llama2"),
    )
    trained = dataclasses.replace(trained, decoders=decoders)
    write_export(trained, tmp_path / "out", export_format=export_format)
    readings = open_arc_folder(tmp_path / "out").decoders
    found = [(reading.rope_scaling, reading.bos, reading.chat_template) for reading in readings]
    assert found == [("none", True, None), ("checkpoint", False, "llama2")]


def test_a_scaling_that_the_reference_ignores_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = tiny_trained(tmp_path / "run", **SPECS["scaled_positions"])
    with caplog.at_level(logging.WARNING):
        write_export(trained, tmp_path / "out", export_format="arc")
    assert "the reference ignores" in caplog.text


@pytest.mark.parametrize("export_format", FORMATS)
def test_nothing_is_overwritten_unasked(tmp_path: Path, export_format: str) -> None:
    first, second = tiny_trained(tmp_path / "run"), tiny_trained(tmp_path / "run", seed=1)
    write_export(first, tmp_path / "out", export_format=export_format)
    with pytest.raises(WeightsError, match="exists already"):
        write_export(second, tmp_path / "out", export_format=export_format)
    check_same(ArcModel.from_checkpoint(tmp_path / "out", decoders=[]), first)
    write_export(second, tmp_path / "out", export_format=export_format, overwrite=True)
    check_same(ArcModel.from_checkpoint(tmp_path / "out", decoders=[]), second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def _model_folder(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "params.json").write_text('{"dim": 64}')


@pytest.mark.parametrize("make", [_model_folder, lambda out: out.write_text("a letter")], ids=["model", "file"])
def test_overwriting_takes_nothing_but_an_export(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "out")
    for export_format in FORMATS:
        with pytest.raises(WeightsError, match="is not an export"):
            write_export(tiny_trained(tmp_path / "run"), tmp_path / "out", export_format=export_format, overwrite=True)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("export_format", FORMATS)
@pytest.mark.parametrize("is_earlier", [False, True])
def test_overwriting_deletes_no_file_of_the_user(tmp_path: Path, export_format: str, is_earlier: bool) -> None:
    trained, out = tiny_trained(tmp_path / "run"), tmp_path / "out"
    write_export(trained, out, export_format=export_format)
    if is_earlier:  # an export that lists none of its files
        (out / "checksums.json").unlink()
    (out / ".git").mkdir()
    (out / "notes.txt").write_text("my own words")  # among the files of an earlier export it might be its tokenizer
    names = r"\.git in it" if is_earlier else r"\.git, notes\.txt in it"
    with pytest.raises(WeightsError, match=f"no export wrote {names}"):
        write_export(trained, out, export_format=export_format, overwrite=True)
    (out / ".git").rename(tmp_path / "git")
    (out / "notes.txt").unlink()
    write_export(trained, out, export_format=export_format, overwrite=True)


def test_a_folder_that_appears_during_an_export_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_checksums(*_: object) -> None:
        (tmp_path / "out" / "mine").mkdir(parents=True)

    monkeypatch.setattr(formats, "write_checksums", write_checksums)
    with pytest.raises(WeightsError, match="is not an export"):
        write_export(tiny_trained(tmp_path / "run"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine").is_dir()


def test_a_checkpoint_of_the_reference_is_not_overwritten(tmp_path: Path) -> None:
    trained, out = tiny_trained(tmp_path / "run"), tmp_path / "out"
    write_export(trained, out, export_format="arc")
    (out / "encoder_backbone.json").unlink()  # the reference does not write it
    with pytest.raises(WeightsError, match="is not an export"):
        write_export(trained, out, overwrite=True)


def test_a_link_to_another_disk_stays(tmp_path: Path) -> None:
    first, second = (tiny_trained(tmp_path / "run", seed=seed) for seed in (0, 1))
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "export")
    write_export(first, tmp_path / "out")
    write_export(second, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out", "run"]
    check_same(ArcModel.from_checkpoint(tmp_path / "disk" / "export", decoders=[]), second)


def test_a_tokenizer_that_moved_is_named_and_can_be_given(tmp_path: Path) -> None:
    trained = tiny_trained(tmp_path / "run")
    moved = dataclasses.replace(trained, encoder_tokenizer=str(tmp_path / "gone"))
    with pytest.raises(
        TokenizerError, match=r"gone: no such file.*If it has moved since the run, give its path to --tokenizer"
    ):
        write_export(moved, tmp_path / "out")
    write_export(moved, tmp_path / "out", tokenizer=Path(trained.encoder_tokenizer))
    with pytest.raises(TokenizerError, match="do not belong together"):
        spec = dataclasses.replace(trained.spec, backbone=dataclasses.replace(ENCODER, vocab_size=100))
        write_export(dataclasses.replace(trained, spec=spec), tmp_path / "other")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        plain = json.loads(path.read_text())
        change(plain)
        path.write_text(json.dumps(plain))

    return apply


def _quantise(path: Path) -> None:
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)


DAMAGE = [
    ("config.json", Path.unlink, "is neither an export of ARC-DS"),
    ("config.json", _cut, "not valid JSON"),
    ("config.json", _edit(lambda c: c.update(format="other")), "`format` in config.json is 'other'"),
    ("config.json", _edit(lambda c: c.update(version=2)), "version 2"),
    ("config.json", _edit(lambda c: c.pop("compressor")), "does not match this version"),
    ("config.json", _edit(lambda c: c["compressor"].update(strategy="x")), "does not match this version"),
    ("config.json", _edit(lambda c: c["compressor"].update(markers=["mid"])), "does not match this version"),
    ("config.json", _edit(lambda c: c["compressor"]["rules"][0].update(kind="x")), "the grouping x 4 is unknown"),
    ("config.json", _edit(lambda c: c["compressor"]["rules"][0].update(value=0)), "the grouping factor 0 is unknown"),
    ("config.json", _edit(lambda c: c["compressor"].update(num_layers=9)), "an invalid compressor"),
    ("config.json", _edit(lambda c: c["compressor"].update(decoder_sizes=[40])), "does not fit the model"),
    ("config.json", _edit(lambda c: c.pop("decoders")), "expected `decoders` to give the rope_scaling"),
    ("config.json", _edit(lambda c: c["decoders"][0].update(rope_scaling="x")), "expected `decoders` to give"),
    ("config.json", _edit(lambda c: c["decoders"][0].update(bos="x")), "expected `decoders` to give"),
    ("config.json", _edit(lambda c: c["decoders"][0].update(chat_template=[])), "and a chat_template"),
    ("model.safetensors", _quantise, "expected floats of 16, 32 or 64 bits"),
    ("model.safetensors", Path.unlink, "has no model.safetensors"),
    ("model.safetensors", _cut, "not a complete safetensors file"),
    ("model.safetensors", lambda p: p.write_bytes(b""), "not a complete safetensors file"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_export_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "out")
    damage(tmp_path / "out" / name)
    with pytest.raises(WeightsError, match=message):
        ArcModel.from_checkpoint(tmp_path / "out", decoders=[])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params.json", "is neither an export of ARC-DS"),
        ("embedder/consolidated.safetensors", "is not an ARC checkpoint"),
        ("bridge_module/consolidated.safetensors", "has no bridge_module"),
        ("encoder_backbone.json", "pass the backbone's folder as encoder_backbone"),
    ],
)
def test_a_missing_file_of_the_arc_format_is_named(tmp_path: Path, name: str, message: str) -> None:
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "out", export_format="arc")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(WeightsError, match=message):
        ArcModel.from_checkpoint(tmp_path / "out", decoders=[])


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="(?i)expected a run's folder"):
            find_checkpoint(path)


@pytest.fixture
def run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that saves step 2 and removes step 1 while the shards of step 1 are read."""
    write_zero_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run"), 1, step=1)

    def open_shards(checkpoint: Path, world_size: int) -> SavedShards:
        if checkpoint.name == "step_000001":
            write_zero_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run"), 1, step=2)
            shutil.rmtree(checkpoint)
            raise FileNotFoundError(2, "of DeepSpeed", str(checkpoint))
        return SavedShards(trained={}, counters={})

    monkeypatch.setattr(consolidate, "open_shards", open_shards)
    return tmp_path / "run"


def test_a_run_that_removes_the_checkpoint_that_is_read_gives_its_newest_one(run_that_goes_on: Path) -> None:
    path, trained = consolidate_newest(run_that_goes_on)
    assert path.name == "step_000002" and trained.step == 2


def test_a_named_checkpoint_that_is_removed_is_one_error(run_that_goes_on: Path) -> None:
    with pytest.raises(CheckpointRemoved, match=r"step_000001 was removed while it was read.*keep_last"):
        consolidate_newest(run_that_goes_on / "checkpoints" / "step_000001")


def test_a_run_that_removes_every_checkpoint_ends_the_attempts(
    run_that_goes_on: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Path] = []

    def open_shards(checkpoint: Path, world_size: int) -> None:
        steps.append(checkpoint)
        write_zero_checkpoint(run_that_goes_on, tiny_trained(run_that_goes_on), 1, step=len(steps) + 1)
        shutil.rmtree(checkpoint)
        raise FileNotFoundError

    monkeypatch.setattr(consolidate, "open_shards", open_shards)
    with pytest.raises(CheckpointRemoved):
        consolidate_newest(run_that_goes_on)
    assert len(steps) > 1


def test_a_fault_of_a_checkpoint_that_is_still_there_stays_itself(
    run_that_goes_on: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_shards(checkpoint: Path, world_size: int) -> None:
        raise ValueError("another fault")

    monkeypatch.setattr(consolidate, "open_shards", open_shards)
    with pytest.raises(ValueError, match="another fault"):
        consolidate_newest(run_that_goes_on)


def test_every_kind_of_tokenizer_saves_itself(golden: Path, tmp_path: Path) -> None:
    sources = [golden / "tokenizers" / name for name in ("sp384.model", "sp512.model", "llama_tiny.tiktoken")]
    sources += [write_json_tokenizer(tmp_path / "json"), write_json_tokenizer(tmp_path / "json_bare", bos=False)]
    for idx, source in enumerate(sources):
        original = load_tokenizer(source)
        (tmp_path / str(idx)).mkdir()
        original.save(tmp_path / str(idx))
        again = load_tokenizer(tmp_path / str(idx))
        text = "The  lamp – “grey” 北 ,\n\n été 12,345 <s> <|begin_of_text|>"
        assert again.encode(text) == original.encode(text)
        assert again.decode(again.encode(text)) == original.decode(original.encode(text))
        found = (again.bos_id, again.eos_id, again.vocab_size, again.fingerprint)
        assert found == (original.bos_id, original.eos_id, original.vocab_size, original.fingerprint), source
