"""DeepSpeed's JSON takes its numbers from the run's config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arc_ds.config.deepspeed import resolve_decoder_deepspeed, resolve_deepspeed
from arc_ds.config.load import load_config
from arc_ds.errors import ConfigError

DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"
MINIMAL = """\
run_dir: runs/x
steps: 2000
micro_batches: 4
encoder: {backbone: models/enc}
decoders: [{name: a, backbone: models/dec}]
data: {batch_size: 64, sources: [{path: shards/train}]}
optimizer: {max_grad_norm: 0.5}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return load_config(path)


@pytest.fixture
def resolve(config, tmp_path):
    """Resolves a JSON of the given content for one rank."""

    def _resolve(given):
        (tmp_path / "ds.json").write_text(json.dumps(given))
        return resolve_deepspeed(tmp_path / "ds.json", config, 1)

    return _resolve


@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "zero3_hpz", "one_gpu", "cpu"])
def test_shipped_file_resolves_to_the_runs_numbers(config, name):
    resolved = resolve_deepspeed(DS_CONFIGS / f"{name}.json", config, 8, local_world_size=4)
    assert resolved["train_batch_size"] == 64
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] is True
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert resolved["zero_optimization"]["stage"] == 3
    assert '"auto"' not in json.dumps(resolved)
    assert resolved["zero_optimization"].get("zero_hpz_partition_size") == (4 if name == "zero3_hpz" else None)


def test_what_the_json_leaves_out_is_filled_in(resolve):
    resolved = resolve({})
    assert resolved["train_micro_batch_size_per_gpu"] == 16
    assert resolved["zero_optimization"] == {"stage": 3}
    assert resolved["zero_allow_untested_optimizer"] is True
    assert resolved["zero_force_ds_cpu_optimizer"] is False, "DeepSpeed would refuse our optimizer with offload"


def zero(**keys):
    return {"zero_optimization": keys}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        # Contradictions of the run.
        ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "0.5"]),
        ({"train_batch_size": 32}, ["train_batch_size is 32", "64"]),
        (zero(stage=2), ["stage is 2", "3"]),
        ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer is True", "False"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "'fp32'"]),
        (zero(stage=3, reduce_bucket_size="auto"), ["zero_optimization.reduce_bucket_size", "only these can be"]),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "Remove"]),
        ({"fp16": {"enabled": True}}, ["'fp16'"]),
        ({"bf16": True}, ["bf16 is True", "'enabled'"]),
        # Keys that DeepSpeed ignores, or reports badly.
        ({"train_batchsize": 64}, ["unknown key train_batchsize.", "Did you mean train_batch_size?"]),
        ({"zero_optimisation": {}}, ["unknown key zero_optimisation.", "Did you mean zero_optimization?"]),
        (zero(stage3_max_live_parameter=1), ["zero_optimization.stage3_max_live_parameter.", "_live_parameters?"]),
        (zero(offload_optimizer={"devise": "cpu"}), [".offload_optimizer.devise.", "Did you mean device?"]),
        (zero(offload_param={"pin_memry": True}), ["offload_param.pin_memry.", "pin_memory?"]),
        ({"bf16": {"enable": True}}, ["unknown key bf16.enable.", "Did you mean enabled?"]),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, ["unknown key data_types.grad_acum_dtype", "grad_accum_dtype?"]),
        ({"activation_checkpointing": {"cpu_checkpoint": 1}}, ["checkpointing.cpu_checkpoint.", "cpu_checkpointing?"]),
        ({"zzz": 1}, ["unknown key zzz. Known: ", "zero_optimization"]),
        # Values that DeepSpeed rejects.
        (zero(reduce_bucket_size="big"), ["zero_optimization.reduce_bucket_size is 'big'", "integer"]),
        (zero(offload_optimizer={"device": "gpu"}), ["offload_optimizer.device is 'gpu'", "'nvme'"]),
    ],
)
def test_json_that_cannot_serve_the_run_is_an_error(resolve, given, words):
    with pytest.raises(ConfigError) as caught:
        resolve(given)
    for word in ("ds.json: ", *words):
        assert word in str(caught.value)


def test_names_and_other_names_of_deepspeeds_fields_are_known(resolve):
    fields = {"prefetch_bucket_size": 7, "stage3_max_reuse_distance": 8, "leaf_module": {"classes": ["a.B"]}}
    others = {"comms_logger": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}, "checkpoint": {}}
    assert resolve({**zero(**fields), **others})["zero_optimization"] == {**fields, "stage": 3}


def test_unreadable_json_names_file_and_line(config, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{\n"a": 1,\n}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"ds\.json:3"):
        resolve_deepspeed(path, config, 1)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="JSON object"):
        resolve_deepspeed(path, config, 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_deepspeed(tmp_path / "none.json", config, 1)


def test_frozen_decoder_gets_no_clipping_and_no_offloaded_optimizer(config):
    resolved = resolve_deepspeed(DS_CONFIGS / "zero3_offload.json", config, 8)
    decoder = resolve_decoder_deepspeed(resolved, "zero3+hpz", 4)
    assert "gradient_clipping" not in decoder
    assert "offload_optimizer" not in decoder["zero_optimization"]
    assert decoder["zero_optimization"]["zero_hpz_partition_size"] == 4
    assert "offload_optimizer" in resolved["zero_optimization"]


def test_groups_of_a_frozen_decoder_follow_its_placement_alone(config):
    resolved = resolve_deepspeed(DS_CONFIGS / "zero3_hpz.json", config, 8, local_world_size=4)
    assert resolve_decoder_deepspeed(resolved, "zero3", 4)["zero_optimization"]["zero_hpz_partition_size"] == 1


def test_a_path_in_the_json_may_begin_with_the_home_folder(resolve, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "nvme_path": "~/swap"}}}
    assert resolve(given)["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/home/me/swap"


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("zero_quantized_weights", True, "zero3_hpz.json"),
        ("zero_quantized_nontrainable_weights", True, "zero3_hpz.json"),
        ("zero_quantized_gradients", True, "zero3_hpz.json"),
        ("offload_optimizer", {"device": "nvme", "nvme_path": "/swap"}, "offload_optimizer.device: cpu"),
        ("offload_param", {"device": "nvme", "nvme_path": "/swap"}, "offload_param.device: cpu"),
    ],
)
def test_an_option_that_no_parity_test_covers_is_refused_by_name(resolve, key, value, remedy):
    with pytest.raises(ConfigError, match=f"zero_optimization.{key}.* not supported.*{remedy}"):
        resolve(zero(**{key: value}))
    off = False if value is True else {"device": "cpu"}
    assert resolve(zero(**{key: off}))["zero_optimization"][key] == off
