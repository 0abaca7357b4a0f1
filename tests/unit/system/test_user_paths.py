"""Paths of users: the home folder, wherever a path may stand."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from arc_ds import cli
from arc_ds.config.load import flatten, load_config
from arc_ds.errors import ConfigError
from arc_ds.shards.storage.cache import open_cache
from arc_ds.system.user_paths import absolute_path, path_argument, user_path
from arc_ds.tracking.mlflow_server import resolve_uri
from tests.unit.config.test_config_load import MINIMAL


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "home")


def test_a_tilde_at_the_beginning_is_the_home_folder_and_other_text_stays(home: str) -> None:
    assert user_path("~") == home and user_path("~/runs/x") == f"{home}/runs/x"
    assert user_path("file:~/x") == user_path("file:///~/x") == f"file://{home}/x"
    assert user_path("sqlite:///~/m.db") == f"sqlite:///{home}/m.db"
    assert user_path("~root/x") == "/root/x"
    assert absolute_path("~/x") == f"{home}/x" and absolute_path("a/../b") == f"{os.getcwd()}/b"
    assert absolute_path("s3://bucket/a/../b") == "s3://bucket/a/../b"
    for text in ("./~x", "a/~/x", "auto", "-", "s3://b/~/x", "pipe:cat ~/$DIR/{}", "https://h/x?$top=1", "cost$"):
        assert user_path(text) == text


@pytest.mark.parametrize(
    ("text", "remedy"), [("~nobody-here/x", "./~nobody-here"), ("$HOME/x", "${HOME}"), ("/data/$USER/x", "${USER}")]
)
def test_notation_that_is_not_replaced_is_refused_with_its_remedy(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        user_path(text)
    assert remedy in str(caught.value)


def test_a_path_that_exists_may_have_a_dollar_sign(tmp_path: Path) -> None:
    (tmp_path / "$HOME").mkdir()
    assert user_path("$HOME") == "$HOME"


def test_a_folder_that_is_really_named_so_stays_so_in_every_form(tmp_path: Path) -> None:
    assert path_argument("./~x") == tmp_path / "~x" and path_argument(".") == Path(".")
    (tmp_path / "~x").mkdir()
    (tmp_path / "~x" / "config.yaml").write_text(MINIMAL)
    run_dir = load_config(Path("./~x") / "config.yaml", ["run_dir=./~x"]).run_dir
    assert run_dir == "./~x"
    load_config(Path(run_dir) / "config.yaml")  # as the check of a run's folder reads it


PATHS = (
    "run_dir",
    "deepspeed",
    "encoder.backbone",
    "encoder.tokenizer",
    "encoder.init_from",
    "decoders.0.backbone",
    "decoders.0.tokenizer",
    "data.sources.0.path",
    "data.validation",
    "data.cache_dir",
    "checkpoint.resume",
    "tracking.uri",
)


@pytest.mark.parametrize("key", PATHS)
def test_every_path_of_a_config_may_begin_with_the_home_folder(home: str, tmp_path: Path, key: str) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    assert flatten(load_config("run.yaml", [f"{key}=~/x"]))[key] == f"{home}/x"
    with pytest.raises(ConfigError, match=rf"override '{key}=.*{key}: \$NO/x: .*\$\{{NO\}}"):
        load_config("run.yaml", [f"{key}=$NO/x"])


def test_a_config_in_the_home_folder_a_variable_and_a_held_out_source(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "run.yaml").write_text(MINIMAL.replace("runs/x", "${RUNS}/x"))
    monkeypatch.setenv("RUNS", "~/runs")
    config = load_config("~/run.yaml", ["data.validation=[{path: ~/held}]"])
    assert config.run_dir == f"{home}/runs/x" and config.data.held_out[0].path == f"{home}/held"
    with pytest.raises(ConfigError, match=r"run_dir is null; expected .* The home folder is ~/"):
        load_config("~/run.yaml", ["run_dir=~"])


def test_environment_variables_with_paths_may_begin_with_the_home_folder(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/mlflow.db")
    assert resolve_uri(tmp_path, None) == f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("ARC_DS_CACHE_DIR", "~/cache")
    assert str(open_cache().folder) == f"{home}/cache"
    monkeypatch.setenv("ARC_DS_CACHE_DIR", "~nobody-here/cache")
    with pytest.raises(ConfigError, match="no home folder ~nobody-here"):
        open_cache()


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _arguments(inner)
        else:
            yield action


NO_PATHS = {
    *("overrides", "format", "prompt", "stop", "text_field", "quality_field", "member", "register", "help"),
    *("upstream", "upstream_model", "host", "api_key", "name", "ray_address"),
    *("system", "task", "tasks", "baseline", "experiment", "log", "best", "metrics"),
}
NAMES_OF_DECODERS = {("import", "decoder"), ("export", "decoder")}


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("train", "doctor")])
def test_every_path_argument_of_a_command_may_begin_with_the_home_folder(home: str, command: str) -> None:
    """Arguments of text without choices are paths, apart from those named above."""
    found = [
        action
        for action in _arguments(cli._parser(command))
        if action.nargs != 0
        and action.choices is None
        and action.dest not in NO_PATHS
        and (command, action.dest) not in NAMES_OF_DECODERS
    ]
    assert found and all(action.type is not Path and action.type is not None for action in found)
    paths = [action for action in found if not isinstance(action.type("1"), int | float)]
    assert paths and all(str(action.type("~/x")) == f"{home}/x" for action in paths)
