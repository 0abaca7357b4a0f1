"""Loading a config: decoding by type, overrides, variables, and errors that name the place and the remedy."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_ds.config import schema
from arc_ds.config.load import common, config_hash, differences, dump_yaml, flatten, load_config, numerics, to_dict
from arc_ds.config.schema import EncoderConfig, RunConfig
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


def test_float_without_a_point_is_a_float(write):
    assert load_config(write(), ["optimizer.encoder_lr=1e-5"]).optimizer.encoder_lr == 1e-5
    assert load_config(write(), ["optimizer.weight_decay=0"]).optimizer.weight_decay == 0.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=1e4", "whole number"),
        ("steps=3000.0", "whole number"),
        ("steps=true", "whole number"),
        ("steps=null", "whole number"),
        ("optimizer.eps=fast", "a number"),
        ("optimizer.eps=.nan", "a number"),
        ("optimizer.eps=nan", "finite"),
        ("optimizer.betas=[0.9]", "list of 2"),
        ("encoder.causal=1", "true or false"),
        ("encoder.causal=yes", "true or false"),
        ("pooling.factors=8", "a list"),
        ("pooling.factors=[8, x]", "whole number"),
        ("encoder.backbone=null", "text"),
        ("encoder.backbone=", "text"),
        ("encoder.backbone=[a]", "text"),
        ("encoder=deep", "mapping"),
        ("precision=fp16", "one of fp32, bf16"),
        ("data.reconstruction_share=[[0, 1.0], [5]]", "list of 2"),
    ],
)
def test_value_of_another_type_names_key_and_expectation(write, override, expected):
    message = error_of(write(), override)
    assert expected in message
    assert override.partition("=")[0] in message


def test_nearest_literal_is_offered(write):
    assert "Did you mean alternate?" in error_of(write(), "decoder_schedule=alternating")


def test_unknown_key_names_file_line_and_nearest_key(write):
    path = write(MINIMAL + "optimizer:\n  encoder_rl: 1e-5\n")
    message = error_of(path)
    assert f"{path}:11" in message
    assert "optimizer.encoder_rl" in message
    assert "encoder_lr" in message


def test_unknown_key_in_a_list_item_names_its_number(write):
    assert "decoders.0.backbones" in error_of(write(), "decoders.0.backbones=x")


def test_missing_key_is_named_with_its_line(write):
    path = write(MINIMAL.replace("  backbone: models/enc", "  causal: true"))
    message = error_of(path)
    assert "missing encoder.backbone" in message
    assert f"{path}:4" in message


def test_key_given_twice_is_refused(write):
    message = error_of(write(MINIMAL + "steps: 5\n"))
    assert "given twice" in message
    assert ":2" in message


def test_bad_yaml_names_the_line(write):
    path = write(MINIMAL + "optimizer:\n- a\n  b: [\n")
    assert f"{path}:12: not valid YAML" in error_of(path)


def test_missing_and_binary_files_are_config_errors(tmp_path):
    assert "cannot read" in error_of(tmp_path / "none.yaml")
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot read" in error_of(binary)


def test_empty_file_is_a_config_error(write):
    assert "expected a mapping" in error_of(write(""))


def test_overrides_reach_into_lists_and_append(write):
    config = load_config(
        write(), ["decoders.0.backbone=m/b", "decoders.1.name=second", "decoders.1.backbone=m/c", "seed=7", "seed=8"]
    )
    assert [d.name for d in config.decoders] == ["a", "second"]
    assert config.decoders[0].backbone == "m/b"
    assert config.seed == 8


def test_override_makes_a_section_that_the_file_lacks(write):
    assert load_config(write(), ["tracking.mlflow=false"]).tracking.mlflow is False
    assert load_config(write(MINIMAL + "tracking:\n"), ["tracking.mlflow=false"]).tracking.mlflow is False


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "seed.x=1", "decoders.2.name=a", "decoders.a.name=b"])
def test_malformed_override_is_named(write, override):
    assert override in error_of(write(), override)


def test_override_of_null_makes_an_optional_none(write):
    assert load_config(write(), ["bridge.hidden_size=null"]).bridge.hidden_size is None
    assert load_config(write(), ["bridge.hidden_size=~"]).bridge.hidden_size is None


def test_quoted_null_is_text(write):
    assert load_config(write(), ["tracking.run_name='null'"]).tracking.run_name == "null"


def test_digits_in_a_text_field_stay_text(write):
    assert load_config(write(), ["tracking.run_name=010"]).tracking.run_name == "010"


def test_variables_are_filled_in(write, monkeypatch):
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.setenv("NUM", "64")
    monkeypatch.delenv("ABSENT", raising=False)
    path = write(MINIMAL.replace("models/enc", "${MODELS}/enc").replace("runs/x", "${ABSENT:-runs}/x"))
    config = load_config(path, ["data.batch_size=${NUM}"])
    assert config.encoder.backbone == "/models/enc"
    assert config.run_dir == "runs/x"
    assert config.data.batch_size == 64


def test_missing_variable_is_named_with_its_line(write, monkeypatch):
    monkeypatch.delenv("MODELS", raising=False)
    path = write(MINIMAL.replace("models/enc", "${MODELS}/enc"))
    message = error_of(path)
    assert "MODELS" in message
    assert f"{path}:4" in message


def test_share_is_a_number_or_a_schedule(write):
    assert load_config(write(), ["data.reconstruction_share=1"]).data.reconstruction_share == 1.0
    scheduled = load_config(write(), ["data.reconstruction_share=[[0, 1], [50, 0.5]]"])
    assert scheduled.data.reconstruction_share == ((0, 1.0), (50, 0.5))


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


def test_hash_ignores_where_and_how_often_things_are_written(write):
    base = load_config(write())
    for override in (
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
    ):
        assert config_hash(load_config(write(), [override])) == config_hash(base), override


def test_hash_follows_what_changes_the_numbers(write):
    base = load_config(write())
    for override in (
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
    ):
        assert config_hash(load_config(write(), [override])) != config_hash(base), override


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


def test_dict_of_a_config_is_plain(write):
    tree = to_dict(load_config(write()))
    assert tree["pooling"]["factors"] == [8]
    assert tree["decoders"] == [
        {
            "name": "a",
            "backbone": "models/dec",
            "tokenizer": None,
            "rope_scaling": "checkpoint",
            "placement": "auto",
            "activation_checkpointing": False,
            "fresh_bridge": False,
            "chat_template": "none",
        }
    ]


def test_every_field_says_what_it_is():
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert any(node.name == RunConfig.__name__ for node in classes)
    for node in classes:
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                assert isinstance(following, ast.Expr), f"{node.name}.{ast.unparse(statement.target)} has no docstring"


def test_kept_layers_follow_the_one_number_given():
    assert EncoderConfig(backbone="b").kept_layers(28) == 26
    assert EncoderConfig(backbone="b", num_truncated_layers=0).kept_layers(28) == 28
    assert EncoderConfig(backbone="b", num_layers=6).kept_layers(28) == 6


@pytest.mark.parametrize("fields", [{"num_layers": 29}, {"num_truncated_layers": 28}])
def test_keeping_layers_that_are_not_there_is_an_error(fields):
    with pytest.raises(ConfigError, match="expected 1 to 28"):
        EncoderConfig(backbone="b", **fields).kept_layers(28)
