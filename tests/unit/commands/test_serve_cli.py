"""`arc-ds serve`: a mistake on the command line is one message, before any weights are read."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from arc_ds.cli import main
from arc_ds.export.formats import write_export
from arc_ds.serving.server import Server
from arc_ds.serving.service import Service
from tests.helpers.tiny_export import tiny_trained, write_decoder
from tests.unit.serving.test_prompts import TEMPLATE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_export(tiny_trained(folder / "run", markers=("rec",)), folder / "export")
    write_decoder(folder / "decoder")
    (write_decoder(folder / "without") / "tokenizer.json").unlink()
    return folder


MISTAKES = {
    "no decoder": ([], "give --decoder FOLDER"),
    "no name": (["--upstream", "http://x"], "--upstream needs --upstream-model; http://x/v1/models lists the names"),
    "no address": (["--upstream", "x", "--upstream-model", "y"], "expected an address such as http://127.0.0.1:8001"),
    "index": (["--decoder", "decoder", "--decoder-idx", "1"], "--decoder-idx is 1, but there are 1 decoders"),
    "tokenizer": (["--decoder", "without"], "has no tokenizer: copy the model's own tokenizer into the folder"),
    "marker": (["--decoder", "decoder", "--marker", "cont"], "--marker is cont; this compressor has rec"),
    "template": (["--decoder", "decoder", "--chat-template", "chatml"], "needs the special tokens <|im_start|>"),
    "cache": (["--decoder", "decoder", "--cache-dir", "decoder/tokenizer.json"], "cannot be written"),
    "host": (["--decoder", "decoder", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 0"),
    "port": (["--decoder", "decoder", "--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message(folders: Path, capsys, monkeypatch, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    monkeypatch.chdir(folders)
    assert main(["serve", "--model", "export", "--port", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_port_that_is_taken_is_named(folders: Path, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(folders / "export"), "--decoder", "x", "--port", port]) == 2
    assert f"port {port}: Address already in use. Give another --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recorded", "option", "written"),
    [
        ("llama2", [], "llama2"),
        ("none", [], "none"),
        (None, [], "tokenizer"),
        ("none", ["--chat-template", "llama2"], "llama2"),
        ("llama2", ["--chat-template", "none"], "none"),
    ],
)
def test_chats_are_written_in_the_template_of_training_unless_an_option_says_otherwise(
    tmp_path: Path, monkeypatch, recorded, option: list[str], written: str
) -> None:
    write_export(tiny_trained(tmp_path / "run", chat_templates=(recorded,)), tmp_path / "export")
    (write_decoder(tmp_path / "decoder") / "chat_template.jinja").write_text(TEMPLATE)
    found: list[str] = []
    monkeypatch.setattr(Service, "__init__", lambda self, model, decoder, layout, *_: found.append(layout.name))
    monkeypatch.setattr(Server, "__init__", lambda *_: None)
    monkeypatch.setattr(Server, "run", lambda *_, **__: None)
    files = ["--model", str(tmp_path / "export"), "--decoder", str(tmp_path / "decoder")]
    assert main(["serve", *files, "--port", "0", *option]) == 0
    assert found == [written]


def test_with_an_upstream_only_the_embedding_table_is_read(folders: Path, monkeypatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(Service, "__init__", lambda self, model, *rest: found.extend((model, rest)))
    monkeypatch.setattr(Server, "__init__", lambda *_: None)
    monkeypatch.setattr(Server, "run", lambda *_, **__: None)
    monkeypatch.chdir(folders)
    options = ["--upstream", "http://x", "--upstream-model", "y", "--port", "0", "--max-tokens", "99"]
    assert main(["serve", "--model", "export", "--decoder", "decoder", *options]) == 0
    model, (_, _, _, settings, upstream) = found
    assert model.decoder_parts == "embedding" and (upstream.url, upstream.model) == ("http://x", "y")
    assert (settings.max_tokens, settings.default_tokens) == (99, 99), "a request without max_tokens is no mistake"


@pytest.mark.parametrize("variable", ["ARC_API_KEY", "ARC_UPSTREAM_API_KEY"])
@pytest.mark.parametrize("key", ["secret\r", " secret", "sec\nret", "\udcff"])
def test_a_key_that_no_header_carries_is_refused_and_not_printed(capsys, monkeypatch, variable: str, key: str) -> None:
    monkeypatch.setenv(variable, key)
    assert main(["serve", "--model", "x", "--upstream", "http://x", "--upstream-model", "x", "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert variable in error and "secret" not in error


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5"])
def test_limits_are_numbers_of_at_least_one(folders: Path, capsys, number: str) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--model", str(folders / "export"), "--decoder", "x", "--max-documents", number])
    assert "--max-documents" in capsys.readouterr().err
