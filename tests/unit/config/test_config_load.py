"""Loading a config: decoding by type, overrides, variables, and errors that name the place and the remedy."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_ds.config.load import common, config_hash, differences, dump_yaml, flatten, load_config, numerics
from arc_ds.config.schema import EncoderConfig
from arc_ds.errors import ConfigError

MINIMAL = """\
run_dir: runs/x
steps: 2000
encoder:
  backbone: models/enc
decoders:
  - {name: a, backbone: models/dec}
data:
  sources:
    - path: shards/train
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str = MINIMAL) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_minimal_config_takes_the_papers_defaults(write):
    config = load_config(write())
    assert config.pooling.factors == (8,)
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.data.reconstruction_share == 0.2
    assert config.decoders[0].placement == "auto"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.encoder_lr=1e-5", 1e-5),  # a float without a point, which YAML 1.1 takes for text
        ("optimizer.weight_decay=0", 0.0),
        ("bridge.hidden_size=null", None),
        ("bridge.hidden_size=~", None),
        ("tracking.run_name='null'", "null"),
        ("tracking.run_name=010", "010"),
        ("tracking.mlflow=false", False),
        ("data.reconstruction_share=1", 1.0),
        ("data.reconstruction_share=[[0, 1], [50, 0.5]]", ((0, 1.0), (50, 0.5))),
    ],
)
def test_value_is_read_by_the_type_of_its_field(write, override, value):
    found = attrgetter(override.partition("=")[0])(load_config(write(), [override]))
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=1e4", "whole number"),
        ("steps=3000.0", "whole number"),
        ("steps=true", "whole number"),
        ("steps=null", "whole number"),
        ("optimizer.eps=fast", "a finite number"),
        ("optimizer.eps=.nan", "a finite number"),
        ("optimizer.eps=nan", "a finite number"),
        ("optimizer.betas=[0.9]", "list of 2"),
        ("encoder.causal=1", "true or false"),
        ("encoder.causal=yes", "true or false"),
        ("pooling.factors=8", "a list"),
        ("pooling.factors=[8, x]", "whole number"),
        ("encoder.backbone=null", "text"),
        ("encoder.backbone=", "text"),
        ("encoder.backbone=''", "text"),
        ("encoder.backbone=[a]", "text"),
        ("encoder=deep", "mapping"),
        ("precision=fp16", "one of fp32, bf16"),
        ("decoder_schedule=alternating", "Did you mean alternate?"),
        ("data.reconstruction_share=[[0, 1.0], [5]]", "list of 2"),
        ("decoders.0.backbones=x", "unknown key decoders.0.backbones. Did you mean backbone?"),
        ("steps", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("a..b=1", "expected key.path=value"),
        ("seed.x=1", "seed is a mapping with the keys x; expected a whole number"),
        ("run_dir.x=1", "run_dir is 'runs/x'"),
        ("decoders.2.name=a", "expected a number from 0 to 1 after it (1 appends), got '2'"),
        ("decoders.a.name=b", "got 'a'"),
    ],
)
def test_wrong_override_names_key_and_expectation(write, override, expected):
    message = error_of(write(), override)
    assert expected in message
    assert override.partition("=")[0] in message and f"override {override!r}" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            MINIMAL + "optimizer:\n  encoder_rl: 1e-5\n",
            ":11: unknown key optimizer.encoder_rl. Did you mean encoder_lr?",
        ),
        (MINIMAL.replace("  backbone: models/enc", "  causal: true"), ":4: missing encoder.backbone. Add it there, or"),
        (MINIMAL + "steps: 5\n", ":2). Remove one of them"),
        (MINIMAL + "optimizer:\n- a\n  b: [\n", ":12: not valid YAML"),
        ("[" * 5000, "not valid YAML: maximum recursion depth exceeded"),
        (MINIMAL.replace("models/enc", "${ABSENT}/enc"), ":4: the environment has no variable ABSENT, "),
        ("", "expected a mapping"),
    ],
)
@pytest.mark.parametrize("name", ["run.yaml", "override.yaml"])
def test_mistake_in_a_file_is_named_with_its_line(tmp_path, monkeypatch, text, words, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ABSENT", raising=False)
    Path(name).write_text(text)
    message = error_of(Path(name))
    assert words in message and message.startswith(name)


def test_missing_and_binary_files_are_config_errors(tmp_path):
    assert "cannot be read" in error_of(tmp_path / "none.yaml")
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\x00\x80")
    assert "is not UTF-8" in error_of(binary)


def test_overrides_reach_into_lists_and_append(write):
    config = load_config(
        write(), ["decoders.0.backbone=m/b", "decoders.1.name=second", "decoders.1.backbone=m/c", "seed=7", "seed=8"]
    )
    assert [d.name for d in config.decoders] == ["a", "second"]
    assert config.decoders[0].backbone == "m/b"
    assert config.seed == 8


def test_override_fills_an_empty_section_of_the_file(write):
    assert load_config(write(MINIMAL + "tracking:\n"), ["tracking.mlflow=false"]).tracking.mlflow is False


def test_variables_are_filled_in(write, monkeypatch):
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.setenv("NUM", "64")
    monkeypatch.delenv("ABSENT", raising=False)
    path = write(MINIMAL.replace("models/enc", "${MODELS}/enc").replace("runs/x", "${ABSENT:-runs}/x"))
    config = load_config(path, ["data.batch_size=${NUM}"])
    assert config.encoder.backbone == "/models/enc"
    assert config.run_dir == "runs/x"
    assert config.data.batch_size == 64


text_values = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="$"), min_size=1)


@settings(max_examples=25)
@given(
    name=st.none() | text_values,
    lr=st.floats(0, 1, allow_nan=False),
    factors=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    share=st.floats(0, 1) | st.just(((0, 0.5), (3, 1.0))),
)
def test_resolved_yaml_loads_to_an_equal_config(tmp_path_factory, name, lr, factors, share):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    base = load_config(path)
    config = dataclasses.replace(
        base,
        tracking=dataclasses.replace(base.tracking, run_name=name),
        optimizer=dataclasses.replace(base.optimizer, encoder_lr=lr),
        pooling=dataclasses.replace(base.pooling, factors=tuple(factors)),
        data=dataclasses.replace(base.data, reconstruction_share=share),
    )
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_flatten_has_one_scalar_for_each_leaf(write):
    flat = flatten(load_config(write()))
    assert flat["decoders.0.backbone"] == "models/dec"
    assert flat["pooling.factors"] == "[8]"
    assert flat["optimizer.encoder_lr"] == 1e-5
    assert flat["encoder.tokenizer"] is None
    assert all(value is None or isinstance(value, str | int | float | bool) for value in flat.values())


SAME_RUN = (
    "run_dir=elsewhere",
    "log_every=1",
    "checkpoint.every=3",
    "checkpoint.resume=never",
    "tracking.mlflow=false",
    "data.num_workers=0",
    "data.cache_dir=elsewhere",
    "data.cache_gib=3",
    "data.max_encoder_tokens=4096",
    "data.max_decoder_rows=8192",
    "data.validation=[{path: held_out, task: few_shot}]",
    "decoders.0.placement=zero3",
    "micro_batches=2",
    "validation.num_samples=4",
    "deepspeed=elsewhere.json",
    "encoder.backbone=elsewhere",
    "encoder.tokenizer=elsewhere",
    "encoder.init_from=elsewhere",
    "decoders.0.backbone=elsewhere",
    "decoders.0.tokenizer=elsewhere",
    "data.sources.0.path=elsewhere",
)
OTHER_NUMBERS = (
    "seed=1",
    "steps=2001",
    "precision=fp32",
    "optimizer.bridge_lr=1e-4",
    "pooling.factors=[4]",
    "data.batch_size=64",
    "data.sources.0.task=long_context",
    "data.max_answer_tokens=8",
    "decoders.0.chat_template=chatml",
    "decoder_schedule=same_batch",
    "encoder.causal=true",
)


@pytest.mark.parametrize("override", [*SAME_RUN, *OTHER_NUMBERS])
def test_hash_follows_what_changes_the_numbers_alone(write, override):
    changed, base = config_hash(load_config(write(), [override])), config_hash(load_config(write()))
    assert (changed == base) == (override in SAME_RUN)


def test_a_run_of_the_first_version_has_its_hash_and_can_be_resumed(write):
    assert config_hash(load_config(write())) == "f97c06171f455311"  # computed by that version
    later = ("encoder.keep_ports=false", "bridge.shared=true", "encoder.train=bridge", "encoder.lora.rank=4")
    for override in (*later, "decoders.0.lora.rank=4"):
        assert config_hash(load_config(write(), [override])) != "f97c06171f455311"


def test_old_words_for_recomputation_are_those_of_today(write):
    keys = [f"{part}.activation_checkpointing" for part in ("encoder", "decoders.0")]
    for old, new in (("true", "full"), ("True", "full"), ("false", "none"), ("selective", "selective")):
        config = load_config(write(), [f"{key}={old}" for key in keys])
        assert (config.encoder.activation_checkpointing, config.decoders[0].activation_checkpointing) == (new, new)
        assert config_hash(config) == config_hash(load_config(write()))
    with pytest.raises(ConfigError, match="expected one of none, selective, full"):
        load_config(write(), [f"{keys[0]}=yes"])


def test_trained_parts_in_words_and_with_the_old_keys(write):
    def parts(*overrides):
        return tuple(load_config(write(), overrides).encoder.trained_parts.values())

    assert parts() == (None, True, True, 0)
    assert parts("encoder.trained_layers=0", "encoder.train_embeddings=false") == (0, False, True, 0)
    assert parts("encoder.train=bridge") == (0, False, False, 0)
    assert parts("encoder.lora={rank: 4}") == (0, False, True, 4)


def test_a_decoder_that_is_only_kept_needs_no_path_and_survives_the_resolved_yaml(write, tmp_path):
    kept = "decoders=[{name: old, train: false}, {name: new, backbone: b}]"
    config = load_config(write(), ["encoder.init_from=export", kept])
    assert list(config.trained_decoders) == [1]
    (tmp_path / "resolved.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_hash_follows_the_parts_only_where_the_loss_is_a_mean_over_them(write):
    one, two = (load_config(write(), ["loss.normalize=rank_mean", f"micro_batches={n}"]) for n in (1, 2))
    assert config_hash(one) != config_hash(two)
    assert config_hash(load_config(write(), ["micro_batches=2"])) == config_hash(load_config(write()))


def test_hosts_share_all_but_where_things_lie(write):
    own = ["run_dir=x", "data.sources.0.path=x", "encoder.backbone=x", "data.validation=x", "data.num_workers=0"]
    assert common(load_config(write(), own)) == common(load_config(write()))
    held_out = [
        [f"data.validation=[{{path: {path}, task: few_shot, max_passages: {num}}}]"] for path, num in ("a1", "b1", "a2")
    ]
    first, elsewhere, other = (common(load_config(write(), overrides)) for overrides in held_out)
    assert first == elsewhere != other


def test_differences_name_what_a_run_folder_of_another_config_changed(write):
    old, new = load_config(write()), load_config(write(), ["seed=1", "log_every=3"])
    assert differences(numerics(old), numerics(new)) == ("seed: 0 there, 1 here",)


def test_kept_layers_follow_the_one_number_given():
    assert EncoderConfig(backbone="b").kept_layers(28) == 26
    assert EncoderConfig(backbone="b", num_truncated_layers=0).kept_layers(28) == 28
    assert EncoderConfig(backbone="b", num_layers=6).kept_layers(28) == 6


@pytest.mark.parametrize("fields", [{"num_layers": 29}, {"num_truncated_layers": 28}])
def test_keeping_layers_that_are_not_there_is_an_error(fields):
    with pytest.raises(ConfigError, match="expected 1 to 28"):
        EncoderConfig(backbone="b", **fields).kept_layers(28)
