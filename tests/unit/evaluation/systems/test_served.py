"""Systems whose decoder a server runs: the answers of a decoder here, exactly once each, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.responses import JSONResponse

from arc_ds import ArcModel
from arc_ds.errors import ArcError, ConfigError, ServerError
from arc_ds.evaluation import runner
from arc_ds.evaluation.config import load_eval_config
from arc_ds.evaluation.parts import read_parts
from arc_ds.evaluation.results import PREDICTIONS, RUN
from arc_ds.evaluation.systems import KINDS
from arc_ds.evaluation.systems.served import ServerSection
from arc_ds.evaluation.systems.system import Answer
from arc_ds.export.formats import write_export
from arc_ds.inference.prompt_embeds import cache_salt
from tests.helpers import tiny_models as tiny
from tests.helpers.fake_eval import write_questions
from tests.helpers.fake_vllm import FakeVllm, serving
from tests.helpers.served import Served, served
from tests.helpers.tiny_export import DECODER, tiny_trained, write_decoder
from tests.helpers.vllm_wire import decode_prompt_embeds
from tests.unit.evaluation.test_decoder_system import prompt, settings

SYSTEMS = ("closed", "open", "truncated", "arc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export and its decoder, whose answers depend on the prompt."""
    folder = tmp_path_factory.mktemp("varied")
    write_export(tiny_trained(folder / "run"), folder / "export")
    write_decoder(folder / "decoder")
    tensors = tiny.random_tensors(DECODER, 1)
    tiny.write_hf(folder / "decoder", DECODER, {k: v + 1 if "norm" in k else v for k, v in tensors.items()})
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ArcModel:
    return ArcModel.from_checkpoint(folder / "export", decoders=[folder / "decoder"])


@pytest.fixture(scope="module")
def own(model: ArcModel) -> Iterator[Served]:
    """`arc-ds serve --prompt-embeds`."""
    with served(model, prompt_embeds=True, name="tiny") as found:
        yield found


@pytest.fixture(scope="module")
def vllm(model: ArcModel) -> Iterator[str]:
    with serving(FakeVllm(model)) as url:
        yield url


@pytest.fixture(scope="module")
def tokenizer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder's folder without its weights."""
    path = tmp_path_factory.mktemp("files") / "decoder"
    shutil.copytree(folder / "decoder", path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def make(folder: Path, kind: str, tokenizer: Path | None = None, **server: Any) -> Any:
    """A system. Without keys of a server, its decoder runs here."""
    keys: dict[str, Any] = {"server": ServerSection(**server)} if server else {}
    keys |= {"tokens": 5} if kind == "truncated" else {}
    if kind == "arc":
        keys |= {"model": str(folder / "export"), "decoders": (str(folder / "decoder"),)}
    else:
        keys["decoder"] = str(tokenizer or folder / "decoder")
    return KINDS[kind].build(KINDS[kind].section(**keys), settings(kind))


def write_config(folder: Path, work: Path, **changes: Any) -> Path:
    """Four systems over 12 questions, in batches of several."""
    decoder = {"decoder": str(folder / "decoder")}
    arc = {"kind": "arc", "model": str(folder / "export"), "decoders": [decoder["decoder"]]}
    texts = [{"kind": kind, **decoder} for kind in ("closed", "open")]
    systems = [*texts, {"kind": "truncated", "tokens": 5, **decoder}, arc]
    server = changes.pop("server", None)
    systems = [{**each, **({"server": server} if server else {})} for each in systems]
    work.mkdir(parents=True, exist_ok=True)
    task = {"name": "qa", "path": str(write_questions(folder / "questions.jsonl", 14)), "num_examples": 2}
    config = {
        "output": str(work / "out"),
        "tasks": [{**task, "max_new_tokens": 6}],
        "systems": systems,
        "max_batch_rows": 900,
        "nll": False,
        "device": "cpu",
        **changes,
    }
    (work / "eval.yaml").write_text(yaml.safe_dump(config))
    return work / "eval.yaml"


def run(config: Path, *overrides: str) -> Path:
    return runner.run_evaluation(load_eval_config(config, overrides))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The predictions with the decoder in this process."""
    return (run(write_config(folder, tmp_path_factory.mktemp("local"))) / PREDICTIONS).read_bytes()


def test_predictions_are_those_of_a_decoder_here(
    folder: Path, own: Served, expected: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = run(write_config(folder, tmp_path, server={"url": own.url, "in_flight": 7}, nll=True))
    assert (out / PREDICTIONS).read_bytes() == expected and expected.count(b"\n") == 48
    assert len({json.loads(line)["raw"] for line in expected.splitlines()}) > 12, "the answers differ"
    record = json.loads((out / RUN).read_text())
    for system in SYSTEMS:
        assert {key: record["systems"][system]["server"][key] for key in ("name", "model")} == {
            "name": "arc-ds",
            "model": "tiny",
        }
        assert record["systems"][system]["server"]["version"]
    assert own.url not in (out / RUN).read_text(), "the address does not define the results"
    (warning,) = [line.message for line in caplog.records if "NLL" in line.message]
    assert warning.startswith("closed, open, truncated, arc: "), "this server gives none"


@pytest.mark.parametrize("kind", ["open", "arc"])
def test_answers_end_as_here(
    folder: Path, tokenizer: Path, own: Served, vllm: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a stop text, at the decoder's end of text, and at the limit; of each server with the tokens it names."""
    local = make(folder, kind)
    asked = [prompt(n, max_new_tokens=12) for n in range(3)]
    whole = [answer.raw for answer in local.answer(asked)]
    stop = whole[0][4:6]
    asked += [dataclasses.replace(each, stop=(stop, "\n\n")) for each in asked]
    here = local.answer(asked)
    assert {answer.stop for answer in here} == {"string", "length"} and here[3].raw != here[0].raw
    for url in (own.url, vllm):
        assert make(folder, kind, tokenizer, url=url).answer(asked) == here
    parts = local._read(local._all_parts(asked)[0])[0]
    (line,) = local.reader.answer_rows([local.reader.rows(parts, 0)], max_new_tokens=9)
    there = make(folder, kind, tokenizer, url=vllm)
    for reader in (local.reader, there.reader):
        monkeypatch.setattr(reader, "stop_ids", (line.ids[5],))
    here = local.answer(asked)
    assert here[0].stop == "eos" and there.answer(asked) == here


def test_a_server_that_names_no_tokens_gives_the_same_texts(folder: Path, model: ArcModel) -> None:
    local = make(folder, "open")
    asked = [prompt(n, max_new_tokens=12) for n in range(3)]
    stop = local.answer(asked)[0].raw[4:6]
    asked += [dataclasses.replace(each, stop=(stop,)) for each in asked]

    def seen(answers: Sequence[Answer]) -> list[Any]:
        return [(answer.text, answer.stop, answer.lengths) for answer in answers]

    with serving(FakeVllm(model, names_tokens=False)) as url:
        assert seen(make(folder, "open", url=url).answer(asked)) == seen(local.answer(asked))


def test_prompts_are_ids_or_rows_with_a_salt_of_their_own(folder: Path, tokenizer: Path, model: ArcModel) -> None:
    fake, asked = FakeVllm(model), [prompt(0), prompt(1)]
    with serving(fake) as url:
        make(folder, "open", tokenizer, url=url).answer(asked)
        arc = make(folder, "arc", url=url)
        fake.bodies.clear()
        arc.answer(asked)
    local = make(folder, "arc")
    bodies = sorted(fake.bodies, key=lambda body: body["cache_salt"])
    rows = [decode_prompt_embeds(body["prompt_embeds"], 48) for body in bodies]
    assert [body["cache_salt"] for body in bodies] == [cache_salt([each]) for each in rows]
    assert bodies[0]["cache_salt"] != bodies[1]["cache_salt"]
    assert sorted(map(len, rows)) == sorted(local.num_rows(each) for each in asked)
    for name, value in {"temperature": 0.0, "repetition_penalty": 1.0, "top_p": 1.0, "stop": ["\n\n"]}.items():
        assert [body[name] for body in bodies] == [value, value], name
    assert arc.model.decoder_parts == "embedding"


@pytest.mark.parametrize("method", ["prompt_logprobs", "echo"])
def test_the_nll_is_that_of_a_decoder_here(folder: Path, tokenizer: Path, model: ArcModel, method: str) -> None:
    asked, answers = [prompt(0), prompt(1), prompt(2)], ["by the sea", "", "stone"]
    with serving(FakeVllm(model, names_tokens=method == "prompt_logprobs")) as url:
        system = make(folder, "open", tokenizer, url=url)
        found = system.answer_nll(asked, answers)
    assert system.describe()["server"]["nll"] == method
    for one, other in zip(found, make(folder, "open").answer_nll(asked, answers), strict=True):
        assert one.tokens == other.tokens and one.nats == pytest.approx(other.nats, rel=1e-4)
    assert found[0].nats > 1


def test_what_was_finished_is_kept_when_the_server_dies(
    folder: Path, model: ArcModel, expected: bytes, tmp_path: Path
) -> None:
    def dying(body: dict[str, Any]) -> JSONResponse | None:
        return JSONResponse({}, 500) if len(fake.bodies) > 14 else None

    fake = FakeVllm(model, behaviour=dying)
    config = write_config(folder, tmp_path)
    lines = yaml.safe_load(config.read_text())
    lines["systems"] = lines["systems"][1::2]  # open and arc
    expected = b"".join(line for line in expected.splitlines(True) if json.loads(line)["system"] in ("open", "arc"))

    def at(url: str, in_flight: int) -> None:
        for system in lines["systems"]:
            system["server"] = {"url": url, "in_flight": in_flight, "retry_s": 0.0}
        config.write_text(yaml.safe_dump(lines))

    with serving(fake) as url:
        at(url, 2)
        with pytest.raises(ServerError, match=r"answered 500.*start the same command again"):
            run(config)
    kept = sum(len(each.predictions) for each in read_parts(tmp_path / "out"))
    assert 0 < kept < 16
    fake = FakeVllm(model)
    with serving(fake) as url:
        at(url, 5)
        out = run(config)
    assert (out / PREDICTIONS).read_bytes() == expected
    asked = [body for body in fake.bodies if body["max_tokens"] > 1]  # others ask what the server can do
    assert len(asked) == 24 - kept, "nothing is computed twice"


def test_samples_beyond_the_servers_window_are_left_out(
    folder: Path, model: ArcModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arc_ds.inference.reader.find_max_positions", lambda _: 100)
    with serving(FakeVllm(model, max_rows=70)) as url:
        assert make(folder, "open", url=url).max_rows == 70


def test_a_scaling_that_the_server_must_not_apply_is_named(
    folder: Path, model: ArcModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    path = shutil.copytree(folder / "decoder", tmp_path / "decoder")
    config = path / "config.json"
    scaling = {"rope_type": "linear", "factor": 2.0}
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_scaling": scaling}))
    section = KINDS["open"].section
    with serving(FakeVllm(model)) as url:
        for changes in ({}, {"implementation": "transformers"}, {"rope_scaling": "none"}):
            caplog.clear()
            server = ServerSection(url=url)
            KINDS["open"].build(section(decoder=str(path), server=server, **changes), settings("open"))
            assert ("must run without rotary scaling" in caplog.text) == ("rope_scaling" in changes), changes


Fault = Callable[[Path, ArcModel], FakeVllm]
REFUSALS: dict[str, tuple[Fault, str, dict[str, Any], str]] = {
    "no embeddings": (
        lambda _, model: FakeVllm(model, takes_embeddings=False),
        "arc",
        {},
        r"You must set .*vLLM: --enable-prompt-embeds; arc-ds serve: --prompt-embeds",
    ),
    "model": (lambda _, model: FakeVllm(model), "open", {"model": "other"}, "has no model 'other'; it has decoder"),
    "key": (lambda _, model: FakeVllm(model), "open", {"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY.*export it"),
    "other tokens": (
        lambda _, model: FakeVllm(model, behaviour=lambda body: JSONResponse(reply(prompt_tokens=3))),
        "open",
        {},
        "read 3 tokens of a prompt of",
    ),
    "window": (
        lambda _, model: FakeVllm(model, behaviour=lambda body: JSONResponse(reply(completion_tokens=2))),
        "open",
        {},
        "after 2 of 6 tokens: its window is too small",
    ),
    "no choices": (
        lambda _, model: FakeVllm(model, behaviour=lambda body: JSONResponse({"choices": []})),
        "open",
        {},
        "does not speak OpenAI's Completions API",
    ),
    "aborted": (
        lambda _, model: FakeVllm(model, behaviour=lambda body: JSONResponse(reply("abort"))),
        "open",
        {},
        "ended with the reason 'abort'",
    ),
}


def reply(finish: str = "length", **usage: int) -> dict[str, Any]:
    return {"choices": [{"text": " a", "finish_reason": finish}], "usage": usage}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_refusal_says_what_to_do(folder: Path, model: ArcModel, fault: str) -> None:
    fake, kind, keys, words = REFUSALS[fault]
    with serving(fake(folder, model)) as url, pytest.raises((ServerError, ConfigError), match=words):
        make(folder, kind, url=url, **keys).answer([prompt()])


def test_a_wrong_config_of_a_server_is_named(folder: Path, tmp_path: Path) -> None:
    for key, value, words in [
        ("url", "localhost:8000", "is no address; expected one such as http://"),
        ("in_flight", "0", "systems.0.server.in_flight is 0; expected 1 or more"),
        ("modle", "x", "unknown key systems.0.server.modle. Did you mean model"),
    ]:
        config = write_config(folder, tmp_path, server={"url": "http://x", key: value})
        with pytest.raises(ArcError, match=words):
            load_eval_config(config)
