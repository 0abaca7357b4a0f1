"""The runner: equal predictions for any number of ranks and after any kill, each sample once, and clear refusals."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arc_ds.errors import ArcError, ConfigError, DataError, LostRankError, OutOfMemoryError
from arc_ds.evaluation import runner
from arc_ds.evaluation.config import TaskConfig, load_eval_config
from arc_ds.evaluation.parts import part_path, part_paths
from arc_ds.evaluation.plan import Batch, load_task, make_plan
from arc_ds.evaluation.protocol import CLEAN, Protocol
from arc_ds.evaluation.results import PREDICTIONS, RUN, TIMES
from arc_ds.inference.reader import Nll
from tests.helpers import fake_eval
from tests.helpers.waiting import LIMIT_S


def _evaluate(config: Path, *overrides: str, rank: int = 0, num_ranks: int = 1) -> Path:
    """One rank in this process. Ranks meet only in the file system."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(num_ranks))
        return runner.run_evaluation(load_eval_config(config, overrides))


def _all_ranks(config: Path, num_ranks: int, *overrides: str) -> bytes:
    """The predictions of several ranks, one after another; rank 0 is the last and merges."""
    for rank in reversed(range(num_ranks)):
        folder = _evaluate(config, *overrides, rank=rank, num_ranks=num_ranks)
    return (folder / PREDICTIONS).read_bytes()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return fake_eval.write_config(tmp_path / "in")


@pytest.fixture
def expected(config: Path, tmp_path: Path) -> bytes:
    """The predictions of one rank."""
    return _all_ranks(config, 1, f"output={tmp_path / 'expected'}")


def test_predictions_are_equal_for_1_2_and_3_ranks(config: Path, expected: bytes, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in expected.splitlines()]
    assert len(lines) == 80 and {line["raw"].count(",") > 0 for line in lines} == {True}  # real batches
    assert all(line["prediction"] == line["references"][0] for line in lines if line["system"] == "open")
    for num_ranks in (2, 3):
        out = tmp_path / f"of_{num_ranks}"
        _evaluate(config, f"output={out}", rank=900, num_ranks=901)  # has no batch
        assert _all_ranks(config, num_ranks, f"output={out}") == expected
        assert sorted(path.name for path in out.iterdir()) == sorted([PREDICTIONS, RUN, TIMES])
    run = json.loads((out / RUN).read_text())
    assert run["samples"] == {"open": {"qa": 40}, "closed": {"qa": 40}} and run["protocol"]["name"] == "clean"
    assert run == json.loads((tmp_path / "expected" / RUN).read_text())


def test_a_kill_at_any_byte_loses_at_most_one_batch(config: Path, expected: bytes, tmp_path: Path) -> None:
    """A part file is cut at random places, as by a kill in the middle of a write; other numbers of ranks go on."""
    draw = random.Random(0)
    for attempt in range(3):
        out = tmp_path / f"out{attempt}"
        for rank in (1, 2):
            _evaluate(config, f"output={out}", rank=rank, num_ranks=3)
        part = part_path(out, 2).read_bytes()
        part_path(out, 2).write_bytes(part[: draw.randrange(len(part))])
        assert _all_ranks(config, 1 + attempt, f"output={out}") == expected


def test_kill_9_of_a_process_and_the_same_command_again(config: Path, tmp_path: Path) -> None:
    slow = ["systems.0.batch_s=0.05", "systems.1.batch_s=0.05"]
    expected = _all_ranks(config, 1, f"output={tmp_path / 'expected'}", *slow)
    out = tmp_path / "out"
    process = _forked(config, f"output={out}", *slow)
    part = part_path(out, 0)
    deadline = time.monotonic() + LIMIT_S
    wanted = random.SystemRandom().randint(1, 5)
    while not part.exists() or part.read_bytes().count(b"\n") < wanted:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    before = part.read_bytes()
    assert before.count(b"\n") >= wanted and not (out / PREDICTIONS).exists()
    assert _all_ranks(config, 1, f"output={out}", *slow) == expected


def test_nothing_is_computed_twice(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    answer = fake_eval.Echo.answer

    def counted(self: fake_eval.Echo, prompts: Sequence[Any]) -> list[Any]:
        seen.extend(f"{self.name}/{prompt.sample.id}" for prompt in prompts)
        return answer(self, prompts)

    monkeypatch.setattr(fake_eval.Echo, "answer", counted)
    for rank in (1, 0):
        _evaluate(config, rank=rank, num_ranks=2)
    _all_ranks(config, 3)  # complete: nothing is left to do
    assert len(seen) == len(set(seen)) == 80


def test_kept_work_is_dropped_after_the_last_batch_of_a_system(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    answer = fake_eval.Echo.answer
    monkeypatch.setattr(fake_eval.Echo, "answer", lambda self, ps: [calls.append(self.name), answer(self, ps)][1])
    monkeypatch.setattr(fake_eval.Echo, "forget", lambda self: calls.append(f"forget {self.name}"), raising=False)
    monkeypatch.setattr(fake_eval.Echo, "num_shared_rows", lambda *_: 0, raising=False)
    _evaluate(config)
    assert list(dict.fromkeys(calls)) == ["open", "forget open", "closed"] and calls.count("forget open") == 1


def test_prompts_with_the_same_examples_are_asked_one_after_another(tmp_path: Path) -> None:
    """Each direction of a translation has its own examples. Examples that few prompts share make no small batches."""
    for language in ("eng", "spa", "fra", "deu", "dan"):
        lines = [f"{language}{number} " * (1 + number % 7) for number in range(12)]
        (tmp_path / f"{language}_Latn.dev").write_text("\n".join(lines))
    batches = _planned(TaskConfig(name="flores", path=str(tmp_path), num_examples=2), CLEAN)
    examples = [{each.prompt.shared for each in batch.prompts} for batch in batches]
    assert [len(found) for found in examples] == [1] * len(batches) and len(batches) >= 8
    runs = [found for found, before in zip(examples, [None, *examples], strict=False) if found != before]
    assert len(runs) == 4 and sum(len(batch.prompts) for batch in batches) == 40
    files = [fake_eval.write_questions(tmp_path / f"{n}.jsonl", n, first=1000 * n) for n in (40, 6)]
    task = TaskConfig(name="qa", path=str(files[0]), examples=str(files[1]), num_examples=2)
    mixed = _planned(task, dataclasses.replace(CLEAN, examples="per_sample"))
    assert max(len(batch.prompts) for batch in mixed) > 4 and len(mixed) < 12
    assert {each.prompt.shared for batch in mixed for each in batch.prompts} == {()}


def test_questions_on_one_document_are_asked_together(tmp_path: Path) -> None:
    """So a batch compresses it once. Documents follow one another by their longest prompt."""
    lines = [
        {"id": f"{n:02}", "question": "Why? " * (1 + 5 * n % 7), "answer": "x", "passages": [f"Text {n % 8}. " * 3]}
        for n in range(40)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batches = _planned(TaskConfig(name="qa", path=str(tmp_path / "q.jsonl"), num_examples=0), CLEAN)
    asked = [each for batch in batches for each in batch.prompts]
    documents = [each.prompt.sample.passages[0] for each in asked]
    assert len([text for text, before in zip(documents, ["", *documents], strict=False) if text != before]) == 8
    longest = [max(each.rows for each in asked if each.prompt.sample.passages[0] == text) for text in documents]
    assert longest == sorted(longest, reverse=True)
    assert all(batch.rows == len(batch.prompts) * max(each.rows for each in batch.prompts) for batch in batches)
    assert max(batch.rows for batch in batches) <= 600 and len({each.prompt.sample.id for each in asked}) == 40


def test_rows_that_a_batch_shares_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_eval.write_questions(tmp_path / "q.jsonl", 45)
    task = TaskConfig(name="qa", path=str(path), num_examples=5)
    apart = _planned(task, CLEAN)
    shared = [dataclasses.replace(each.prompt, parts=each.prompt.shared) for each in apart[0].prompts]
    sizes = [_echo().num_rows(each) for each in shared]
    monkeypatch.setattr(fake_eval.Echo, "num_shared_rows", lambda *_: sizes[0], raising=False)
    monkeypatch.setattr(fake_eval.Echo, "forget", lambda _: None, raising=False)
    together = _planned(task, CLEAN)
    assert len(set(sizes)) == 1 and len(together) <= len(apart) / 2
    for batch in together:
        longest = max(each.rows for each in batch.prompts)
        assert batch.rows == sizes[0] + len(batch.prompts) * (longest - sizes[0]) <= 600
    assert sum(len(batch.prompts) for batch in together) == sum(len(batch.prompts) for batch in apart) == 40


def _echo() -> fake_eval.Echo:
    settings: Any = SimpleNamespace(name="echo")
    return fake_eval.Echo(fake_eval.EchoSection(), settings)


def _planned(task: TaskConfig, protocol: Protocol) -> Sequence[Batch]:
    system = _echo()
    loaded = load_task(task, protocol)
    return make_plan([system], [loaded], protocol, arc_names=(), seed=0, max_batch_rows=600).batches


def _without_memory(*_: Any) -> Any:
    raise MemoryError("none left.")


def test_an_nll_that_is_not_finite_stops_and_one_of_no_tokens_is_left_out(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nlls(nats: float, tokens: int) -> None:
        monkeypatch.setattr(fake_eval.Echo, "answer_nll", lambda _self, prompts, _: [Nll(nats, tokens)] * len(prompts))

    nlls(float("nan"), 2)
    with pytest.raises(DataError, match=r"open, qa: the NLL of q\d+ is nan.*set dtype to bfloat16"):
        _evaluate(config)
    with monkeypatch.context() as patch:
        patch.setattr(fake_eval.Echo, "answer", _without_memory)
        with pytest.raises(
            OutOfMemoryError, match=r"open, qa: a batch of \d+ samples .* Lower max_batch_rows \(now 220"
        ):
            _evaluate(config)
    nlls(0.0, 0)
    lines = [json.loads(line) for line in (_evaluate(config) / PREDICTIONS).read_text().splitlines()]
    assert {line["nll"] for line in lines} == {None} and len(lines) == 80


def test_a_changed_config_or_changed_data_is_refused_with_the_difference(config: Path, tmp_path: Path) -> None:
    _evaluate(config, rank=1, num_ranks=2)
    with pytest.raises(ConfigError, match=r"config\.max_batch_rows: 220 there, 500 here"):
        _evaluate(config, "max_batch_rows=500")
    questions = config.parent / "questions.jsonl"
    questions.write_text(questions.read_text().replace('"end3"', '"end4"'))
    with pytest.raises(ConfigError, match=r"data_digest\.qa: .* there, .* here"):
        _evaluate(config)
    fake_eval.write_questions(questions, 40)
    _evaluate(config)
    with pytest.raises(ConfigError, match=r"config\.seed: 0 there, 1 here"):
        _evaluate(config, "seed=1")


def test_a_path_relative_to_another_folder_is_the_same_path(
    config: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    _evaluate(config, rank=1, num_ranks=2)
    monkeypatch.chdir(config.parent)
    assert _all_ranks(config, 2, "tasks.0.path=../in/questions.jsonl") == expected


def test_part_files_of_another_evaluation_are_refused(config: Path) -> None:
    (_evaluate(config, rank=1, num_ranks=2) / RUN).unlink()
    with pytest.raises(DataError, match="holds part files of another evaluation. Delete them"):
        _evaluate(config, "seed=1")


def test_a_folder_without_finished_batches_may_get_another_config(config: Path) -> None:
    out = Path(load_eval_config(config).output)
    out.mkdir()
    (out / RUN).write_text('{"plan_digest": "of a start that was killed at once"}')
    assert _evaluate(config) == out


def test_rank_0_names_the_ranks_that_are_missing(config: Path) -> None:
    with pytest.raises(LostRankError, match=r"batches of rank 1 are missing, and part_00001\.jsonl did not grow"):
        _evaluate(config, "wait_s=0.1", rank=0, num_ranks=2)
    _all_ranks(config, 1)  # its own batches are kept


def test_rank_0_waits_for_a_rank_that_is_slower(config: Path, expected: bytes) -> None:
    late = _forked(config, rank=1, num_ranks=2, after_s=1.0)
    _evaluate(config, rank=0, num_ranks=2)
    late.join()
    assert (Path(load_eval_config(config).output) / PREDICTIONS).read_bytes() == expected


def test_two_evaluations_do_not_write_one_folder(config: Path) -> None:
    out = Path(load_eval_config(config).output)
    out.mkdir()
    for name in ("part_00000.jsonl", "part_00003.jsonl"):  # the rank itself, and a rank of a larger start
        with (out / name).open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # locks of two descriptors exclude each other in one process, too
            with pytest.raises(DataError, match=f"another evaluation is writing .*{name}"):
                _evaluate(config)
    _evaluate(config)


def test_an_id_that_occurs_twice_in_the_parts_is_an_error(config: Path) -> None:
    _evaluate(config, rank=1, num_ranks=2)
    out = Path(load_eval_config(config).output)
    part_path(out, 7).write_bytes(part_path(out, 1).read_bytes())
    with pytest.raises(DataError, match="do not occur exactly once in the part files: .*open/qa/q"):
        _evaluate(config)


def test_a_damaged_line_of_a_part_file_is_named(config: Path) -> None:
    _evaluate(config, rank=1, num_ranks=2)
    (part,) = part_paths(Path(load_eval_config(config).output))
    part.write_bytes(b"{}\n" + part.read_bytes())
    with pytest.raises(DataError, match=r"part_00001\.jsonl:1 is no batch of an evaluation"):
        _evaluate(config)


def test_samples_that_are_too_long_are_counted_and_left_out(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _evaluate(config, "systems.0.window=48")
    run = json.loads((folder / RUN).read_text())
    skipped = run["skipped"]["too long"]["open"]["qa"]
    assert 0 < len(skipped) < 40 and "closed" not in run["skipped"]["too long"]
    assert run["samples"]["open"]["qa"] == 40 - len(skipped)
    assert f"open, qa: {len(skipped)} samples skipped: too long" in caplog.text
    done = [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]
    assert not {line["id"] for line in done if line["system"] == "open"} & set(skipped)


def test_a_mistake_in_the_data_comes_before_the_systems_are_built(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_eval.Echo, "__init__", lambda *_: pytest.fail("the systems were built first"))
    with pytest.raises(ArcError, match="nowhere"):
        _evaluate(config, "tasks.0.path=nowhere")


def _forked(config: Path, *overrides: str, after_s: float = 0.0, **place: int) -> multiprocessing.Process:
    """A rank as a process of its own. The fake system needs no threads of torch, so a fork is safe."""

    def work() -> None:
        time.sleep(after_s)
        _evaluate(config, *overrides, **place)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process
