"""Plans at the paper's size, from published sizes and without any file of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.cli import main
from arc_ds.commands.plan import load_for_plan, read_model
from arc_ds.config.load import load_config
from arc_ds.data.loading.estimates import Estimate
from arc_ds.errors import ConfigError
from arc_ds.planning.batches import Kind, micro_batch
from arc_ds.planning.hardware import GIB, Machine, check_machine
from arc_ds.planning.plan import Plan, RunModel, make_plan, read_settings
from arc_ds.planning.published import with_published_sizes
from arc_ds.planning.search import _changes, nearest_fit, sweep
from arc_ds.planning.sizes import largest_sample
from arc_ds.planning.zero import Weights, simulate_gathers
from tests.helpers.tiny_run import ROOT

PAPER = str(ROOT / "ds_configs" / "recipes" / "pretrain_llama31_8b.yaml")
DEEPSPEED = f"deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"
PAPER_TFLOP = 260  # design 4: on meta tensors, with attention
PAPER_STEP_S = 0.390  # design 4: at 800 TFLOP/s and 3 TB/s
# Llama 3.2 3B without its last two layers, two markers, and a bridge of 3072 x 2048 and 2048 x 4096.
PAPER_TRAINED = 3_212_749_824 - 2 * 100_669_440 - 3072 + 2 * 3072 + 2048 * (3072 + 4096)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RunModel:
    return read_model(with_published_sizes(_load(), tmp_path_factory.mktemp("sizes"))[0])


def _load(*overrides: str) -> Any:
    return load_for_plan(PAPER, (DEEPSPEED, *overrides))


def _plan(model: RunModel, machine: Machine, *overrides: str) -> Plan:
    return make_plan(_load(*overrides), model, machine)


def test_the_paper_s_step_takes_what_the_design_counts(model: RunModel) -> None:
    plan = _plan(model, Machine("h100-80", 8))
    # The mixture has a fifth of reconstructions, which are shorter than the design's continuations.
    assert plan.flops / 1e12 == pytest.approx(PAPER_TFLOP, rel=0.05)
    assert plan.time.total == pytest.approx(PAPER_STEP_S, rel=0.1)
    assert plan.num_trained == PAPER_TRAINED
    assert plan.checkpoint_bytes == 12 * PAPER_TRAINED
    assert plan.num_checkpoints == 2 + 8 + 1  # the last ones, every 10,000th, and the one that is being written
    assert plan.hours == pytest.approx(80_000 * plan.time.total / 3600)
    short = _plan(model, Machine("h100-80", 8), "steps=1500", "optimizer.warmup_steps=0")
    assert short.num_checkpoints == 2
    # Design 17: 2 Φ / W, 4 Φ / W and 12 Φ / W; every parameter is padded to a multiple of 8 elements.
    for part, share in (("parameters", 2), ("gradients", 4), ("optimizer", 12)):
        assert plan.memory[part] == pytest.approx(share * PAPER_TRAINED / 8, rel=1e-6)
    assert plan.memory["gradient buckets"] == 2 * 200e6 * 2  # bfloat16; a second one is laid out by rank
    alone = _plan(model, Machine("h100-80", 1), "data.batch_size=1")
    assert alone.memory["gradient buckets"] == 200e6 * 2 and alone.memory["gathered parameters"] == 0
    # The update's copy of one sub-group of gradients, less the activations that are free by then.
    assert alone.memory["update beyond activations"] == 4e9 - alone.memory["activations"]
    assert plan.fits


def test_only_the_first_gather_and_the_last_reduction_are_exposed_if_the_rest_overlaps(
    model: RunModel, tmp_path: Path
) -> None:
    machine = Machine("h100-80", 8)
    plan = _plan(model, machine)
    embeddings = 128_256 * 3072
    assert plan.time.exposed == pytest.approx(2 * machine.ring_s(2 * embeddings, 1, 8)) and plan.time.hidden > 0
    ds_config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    ds_config["zero_optimization"]["overlap_comm"] = False
    (tmp_path / "zero3.json").write_text(json.dumps(ds_config))
    one_by_one = _plan(model, machine, f"deepspeed={tmp_path / 'zero3.json'}").time
    assert one_by_one.hidden == 0 and one_by_one.exposed == pytest.approx(plan.time.exposed + plan.time.hidden)


def test_products_of_the_trace_are_those_of_the_formulas(model: RunModel) -> None:
    plan = _plan(model, Machine("h100-80", 8), "data.batch_size=8")
    assert plan.traced_flops == plan.flops
    recomputed = _plan(model, Machine("h100-80", 8), "data.batch_size=8", "encoder.activation_checkpointing=full")
    assert recomputed.flops == plan.flops < recomputed.traced_flops
    assert recomputed.memory["activations"] < plan.memory["activations"]
    # Gathered parameters, too, are free by the time of the update.
    pair = _plan(model, Machine("h100-80", 2), "data.batch_size=2", "encoder.activation_checkpointing=full").memory
    assert 0 < pair["update beyond activations"] == 4e9 - pair["activations"] - pair["gathered parameters"]


def test_the_nearest_fit_is_accepted_again_and_fits(tmp_path: Path) -> None:
    backbone = _write_sizes(tmp_path / "two_layers", hidden_size=2048, intermediate_size=8192, vocab_size=32000)
    given = (
        f"encoder.backbone={backbone}",
        "encoder.num_truncated_layers=0",
        f"decoders.0.backbone={backbone}",
        "data.batch_size=4096",
    )
    model, machine = read_model(_load(*given)), Machine("4090", 8)
    assert not _plan(model, machine, *given).fits
    fit = nearest_fit(_load(*given), model, machine, lambda more: _load(*given, *more))
    assert fit is not None and fit.overrides
    again = _plan(model, machine, *given, *fit.overrides)
    assert again.fits and again.time.total == fit.plan.time.total
    # No part of these overrides is enough.
    for left_out in range(len(fit.overrides)):
        fewer = [override for idx, override in enumerate(fit.overrides) if idx != left_out]
        assert not _plan(model, machine, *given, *fewer).fits


def _write_sizes(folder: Path, **sizes: Any) -> Path:
    """A folder that has the config.json of a model with two layers and nothing else."""
    folder.mkdir(parents=True)
    every = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps({**every, "rms_norm_eps": 1e-5, **sizes}))
    return folder


def test_a_sweep_says_where_scaling_breaks_and_what_can_be_divided(
    model: RunModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _load("data.batch_size=16")
    rows = {
        row.machine.num_gpus: row
        for row in sweep(config, model, Machine("h100-80", 16, 2), lambda more: _load("data.batch_size=16", *more))
    }
    assert rows[16].plan is not None and rows[16].machine.num_hosts == 2
    assert rows[8].plan is not None and rows[8].plan.time.total > rows[16].plan.time.total
    assert rows[32].plan is None
    assert "data.batch_size=16 cannot be divided by 32 ranks; 32 can" in rows[32].limit
    assert make_plan(_load("data.batch_size=32"), model, rows[32].machine).fits
    assert rows[16].limit.startswith("too few sequences per GPU (1)")
    assert rows[1024].grown_batch == 1024
    fixed = {number: row.plan for number, row in rows.items() if row.plan is not None and row.plan.fits}
    grown = {number: row.grown for number, row in rows.items() if row.grown.fits}
    for plans, name in ((fixed, "efficiency"), (grown, "grown_efficiency")):
        rates = {number: plan.tokens / plan.time.total / number for number, plan in plans.items()}
        assert {number: getattr(rows[number], name) for number in plans} == pytest.approx(
            {number: rate / max(rates.values()) for number, rate in rates.items()}
        )
        assert len(set(rates.values())) > 1
    slow = Machine("h100-80", 16, 2, interconnect="25g")
    row = next(row for row in sweep(config, model, slow, lambda more: _load(*more)) if row.machine.num_gpus == 16)
    assert row.limit.startswith("communication")
    monkeypatch.setattr("arc_ds.planning.search.SWEEP", (1,))
    small = Machine("l4", 16, 2)
    few, many = sweep(config, model, small, lambda more: _load("data.batch_size=16", *more))
    assert few.plan is not None and not few.plan.fits and few.limit == "does not fit"
    assert (few.efficiency, many.efficiency) == (few.grown_efficiency, many.grown_efficiency) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "parts", "fitting"),
    [(("data.batch_size=24",), "16 ranks", 32), (("data.batch_size=32", "micro_batches=4"), "16 ranks × 4 micro-", 64)],
    ids=["ranks", "ranks and micro-batches"],
)
def test_a_sweep_goes_on_past_gpus_that_do_not_divide_the_batch(
    model: RunModel, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], parts: str, fitting: int
) -> None:
    monkeypatch.setattr("arc_ds.planning.search.SWEEP", (16,))
    first, row = sweep(_load(*given), model, Machine("h100-80", 8), lambda more: _load(*given, *more))
    assert first.plan is not None and row.plan is None
    assert f"{given[0]} cannot be divided by {parts}" in row.limit and row.limit.endswith(f"; {fitting} can")
    assert make_plan(_load(*given, f"data.batch_size={fitting}"), model, row.machine).samples > 0


def test_placement_follows_the_memory_that_the_encoder_leaves(model: RunModel) -> None:
    (large,) = _plan(model, Machine("h100-80", 8)).placed
    (small,) = _plan(model, Machine("l4", 8)).placed
    on_hosts = _plan(model, Machine("l4", 16, 2), "data.batch_size=16")
    (hosts,) = on_hosts.placed
    assert [one.placement for one in (large, small, hosts)] == ["replicated", "zero3", "zero3+hpz"]
    # hpZ: a shard of the copy that all GPUs share, and one of the host's own.
    assert on_hosts.memory["decoders"] == pytest.approx(2 * hosts.num_parameters * (1 / 16 + 1 / 8), rel=1e-6)
    assert "22%" in large.why and "whole up to 40%" in large.why


def test_a_decoder_is_placed_in_the_memory_that_those_before_it_leave(tmp_path: Path) -> None:
    decoders = "decoders=[{name: a, backbone: none/Llama-2-13b}, {name: b, backbone: none/Llama-2-13b}]"
    config = _load(decoders, "data.batch_size=8")
    model, machine = read_model(with_published_sizes(config, tmp_path)[0]), Machine("h100-80", 8)
    plan = make_plan(config, model, machine)
    assert [one.placement for one in plan.placed] == ["replicated", "zero3"]
    # The sharded one is gathered layer by layer, in addition to the encoder's layers.
    encoder_alone = simulate_gathers(Weights.of(model.compressor(config)), read_settings(config, machine)).peak
    assert plan.memory["gathered parameters"] > 2 * encoder_alone


def test_the_command_prints_the_verdict_first_and_json_has_stable_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arc_ds.planning.search.SWEEP", (8,))
    arguments = ["plan", PAPER, DEEPSPEED, "data.batch_size=8", "--gpus=8", "--price=2"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("fits: ")
    assert "unset_MODELS/Llama-3.2-3B does not exist; the published sizes of Llama 3.2 3B stand." in text
    assert "(1 sequence in a micro-batch, 1 micro-batch per step)" in text
    assert "no usable shards on this machine" in text and "GPU-hours, cost" in text.splitlines()[0]
    # Overrides and options may be in any order, as for `arc-ds train`.
    assert main(["plan", PAPER, "--json", DEEPSPEED, "--gpus=8", "data.batch_size=8", "--price=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"plan", "nearest_fit", "sweep", "notes"}
    assert set(found["plan"]) == {
        "fits", "machine", "batch_size", "micro_batches", "sequences", "passes", "memory_bytes", "activation_bytes",
        "used_bytes", "usable_bytes", "host_bytes", "decoders", "collectives", "flops", "flops_with_recomputation",
        "mfu", "step_s", "tokens_per_s", "hours", "gpu_hours", "cost", "trained_parameters", "checkpoint_bytes",
        "checkpoints", "kernels",
    }  # fmt: skip
    assert set(found["plan"]["step_s"]) == {
        "products", "other", "optimizer", "transfers", "launches", "hidden", "exposed", "total",
    }  # fmt: skip
    assert found["plan"]["cost"] == pytest.approx(2 * found["plan"]["gpu_hours"])
    assert sum(found["plan"]["memory_bytes"].values()) == pytest.approx(found["plan"]["used_bytes"], abs=10)


def test_unset_variables_are_placeholders_in_plans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELS", raising=False)
    monkeypatch.setenv("SHARDS", "/data/shards")
    monkeypatch.delenv("RUNS", raising=False)
    config = _load()
    assert config.encoder.backbone == "unset_MODELS/Llama-3.2-3B"
    assert config.data.sources[0].path == "/data/shards/pretrain"
    assert config.run_dir == "runs/pretrain_llama31_8b"
    with pytest.raises(ConfigError, match="no variable MODELS"):
        load_config(PAPER)


def test_a_decoder_through_transformers_is_refused_before_its_weights_are_missed(tmp_path: Path) -> None:
    sized, _ = with_published_sizes(_load("decoders.0.implementation=transformers"), tmp_path)
    with pytest.raises(ConfigError, match=r"decoders.0 \(llama31_8b\) runs through transformers"):
        read_model(sized)


def test_a_run_that_trains_nothing_is_refused_as_by_train(tmp_path: Path) -> None:
    backbone = _write_sizes(tmp_path / "two_layers", hidden_size=64, intermediate_size=128, vocab_size=99)
    frozen = ("encoder.train=bridge", "bridge.kind=none", "markers.rec=false", "markers.cont=false")
    given = (
        f"encoder.backbone={backbone}",
        "encoder.num_truncated_layers=0",
        f"decoders.0.backbone={backbone}",
        *frozen,
    )
    with pytest.raises(ConfigError, match="nothing is trained"):
        _plan(read_model(_load(*given)), Machine("h100-80", 8), *given)


def test_an_unknown_model_is_an_error_whose_remedy_works(tmp_path: Path) -> None:
    unknown = tmp_path / "models" / "Gemma-7B"
    with pytest.raises(ConfigError, match=r"Gemma-7B is no model whose sizes.*config.json") as error:
        with_published_sizes(_load(f"decoders.0.backbone={unknown}"), tmp_path)
    assert "Llama 3.1 8B" in str(error.value)
    _write_sizes(unknown, hidden_size=64, intermediate_size=128, vocab_size=99)
    folder = tmp_path / "sizes"
    folder.mkdir()
    changed, notes = with_published_sizes(_load(f"decoders.0.backbone={unknown}"), folder)
    assert read_model(changed).decoders[0].hidden_size == 64
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Meta-Llama-3.1-8B-Instruct", "Llama 3.1 8B"),
        ("Llama-2-7b-chat-hf", "Llama 2 7B"),
        ("Mistral-7B-Instruct-v0.3", "Mistral 7B v0.3"),
        ("OLMo-2-1124-7B", "OLMo 2 7B"),
        ("Qwen2.5-7B-Instruct", "Qwen 2.5 7B"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2 135M"),
    ],
)
def test_folders_are_named_like_models_in_many_ways(folder: str, name: str, tmp_path: Path) -> None:
    _, notes = with_published_sizes(_load(f"encoder.backbone=/none/{folder}"), tmp_path)
    assert f"the published sizes of {name} stand" in notes[0]


def test_machines_with_unequal_hosts_are_refused() -> None:
    assert check_machine("h200", 24, None, "400g") == Machine("h200", 24, 3, "400g")
    with pytest.raises(ConfigError, match="multiple of --hosts"):
        check_machine("h200", 9, 2, "400g")
    with pytest.raises(ConfigError, match="--gpus is 0; expected at least 1"):
        check_machine("h200", 0, None, "400g")
    with pytest.raises(ConfigError, match="--hosts is -1; expected at least 1"):
        check_machine("h200", 8, -1, "400g")


def test_the_slowest_link_decides() -> None:
    within, across = Machine("h100-80", 8), Machine("h100-80", 16, 2, "100g")
    assert within.ring_s(GIB, 1, 8) == pytest.approx(7 / 8 * GIB / (450e9 * 0.8) + 5e-6)
    assert across.ring_s(GIB, 1, 16) == pytest.approx(1 / 2 * GIB / (12.5e9 * 0.8) + 2 * 5e-6)
    assert across.ring_s(GIB, 1, 8) == within.ring_s(GIB, 1, 8)  # hpZ: the group is one host
    assert within.ring_s(GIB, 1, 1) == 0.0


@pytest.mark.parametrize(
    ("recipe", "machine"),
    [
        ("one_gpu_24gb", Machine("l4", 1)),
        ("one_gpu_80gb", Machine("h100-80", 1)),
        ("one_host_8x80gb", Machine("h100-80", 8)),
        ("hosts_16x8x80gb", Machine("h100-80", 128, 16)),
        ("finetune_llama31_8b", Machine("h100-80", 8)),
        ("finetune_two_decoders", Machine("h100-80", 8)),
        *((f"baselines/{name}_llama31_8b", Machine("h100-80", 8)) for name in ("icae", "icae_finetune", "pisco")),
        *((f"baselines/{name}_llama31_8b", Machine("h100-80", 8)) for name in ("xrag", "xrag_finetune")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.gpu,
)
def test_a_recipe_fits_the_machine_in_its_name_or_comment(
    recipe: str, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("MODELS", "SHARDS", "RUNS", "START"):
        monkeypatch.delenv(name, raising=False)
    config = load_for_plan(ROOT / "ds_configs" / "recipes" / f"{recipe}.yaml", ())
    plan = make_plan(config, read_model(with_published_sizes(config, tmp_path)[0]), machine)
    assert plan.fits
    # The GPU works for most of the step: it does not wait for transfers, launches or communication.
    assert plan.time.products + plan.time.other > 0.5 * plan.time.total


def test_offloaded_states_pass_the_bus_in_every_micro_batch(model: RunModel) -> None:
    offload = f"deepspeed={ROOT / 'ds_configs' / 'zero3_offload.json'}"
    few = _plan(model, Machine("h100-80", 8), offload, "micro_batches=2")
    many = _plan(model, Machine("h100-80", 8), offload, "micro_batches=4")
    trained = PAPER_TRAINED / 8
    # float32 gradients to the host and back for each micro-batch; then a copy of them, and the bfloat16 weights.
    assert few.time.transfers == pytest.approx((8 * 2 + 4 + 2) * trained / (64e9 * 0.8), rel=1e-4)
    assert many.time.transfers == pytest.approx((8 * 4 + 4 + 2) * trained / (64e9 * 0.8), rel=1e-4)
    assert few.host_bytes == pytest.approx((12 + 8) * trained, rel=1e-4)
    assert _plan(model, Machine("h100-80", 8), "micro_batches=2").time.transfers == 0


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"reduce_bucket_size": "auto"}, r"reduce_bucket_size is \"auto\"; only these can be"),
        ({"reduce_bucket_size": "large"}, r"reduce_bucket_size is 'large'; expected a number from 0 on"),
        ({"stage": 2}, r"stage is 2, but the run says 3"),
        ({"offload_optimizer": {"device": "nvme"}}, r"device is nvme, which is not supported"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_deepspeed_json_that_training_refuses_is_not_planned(
    model: RunModel, zero: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ConfigError, match=message):
        _plan(model, Machine("h100-80", 8), f"deepspeed={path}")


def test_offload_is_proposed_only_if_its_json_is_next_to_the_config_s(tmp_path: Path) -> None:
    for name in ("zero3", "zero3_offload"):
        (tmp_path / f"{name}.json").write_text((ROOT / "ds_configs" / f"{name}.json").read_text())

    def offloads(deepspeed: str) -> set[str]:
        config = _load(f"deepspeed={tmp_path / deepspeed}")
        overrides = {each for changes in _changes(config, Machine("h100-80", 8)) for each in changes}
        return {each for each in overrides if each.startswith("deepspeed=")}

    assert offloads("zero3.json") == {f"deepspeed={tmp_path / 'zero3_offload.json'}"}
    assert not offloads("zero3_offload.json")
    (tmp_path / "zero3_offload.json").unlink()
    assert not offloads("zero3.json")


def test_only_more_recomputation_is_proposed() -> None:
    config = _load("encoder.activation_checkpointing=selective")
    overrides = {each for changes in _changes(config, Machine("h100-80", 8)) for each in changes}
    assert {each for each in overrides if "activation" in each} == {
        "encoder.activation_checkpointing=full",
        "decoders.0.activation_checkpointing=selective",
        "decoders.0.activation_checkpointing=full",
    }


def test_samples_have_lengths_from_all_of_a_source_s_records() -> None:
    estimates = tuple(Estimate((length,), 0, 32) for length in (8, 16, 32, 64))
    batches = [
        pack(micro_batch([Kind(1.0, estimates, 4)], number, _load(), PoolingSpec()).samples, PoolingSpec())
        for number in (2, 4)
    ]
    assert [batch.num_encoder_tokens for batch in batches] == [16 + 64, 8 + 16 + 32 + 64]


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "ds_configs" / "recipes").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_can_be_planned_before_anything_is_downloaded(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODELS", "SHARDS", "RUNS", "START"):
        monkeypatch.delenv(name, raising=False)
    config = load_for_plan(str(recipe), ())
    sized, notes = with_published_sizes(config, tmp_path)
    model = read_model(sized)
    assert len(notes) == 1 + len(config.trained_decoders)
    micro, batch = model.batch(config, max(config.data.batch_size // config.micro_batches // 8, 1))
    assert micro.samples and batch.num_labels > 0
    tokens, rows = map(max, zip(*(largest_sample(config, source) for source in config.data.sources), strict=True))
    assert batch.encoder_max_seqlen <= tokens and batch.decoder_max_seqlen <= rows
