"""Result folders with made-up questions: several systems and tasks, clusters, lengths and NLLs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from arc_ds.evaluation.protocol import CLEAN, Protocol
from arc_ds.evaluation.results import Prediction, data_digest, write_results

PLACES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Accra", "Perth", "Turin", "Malmö", "Izmir", "Cusco")
THINGS = ("harbour", "old library", "tram line", "north gate", "observatory", "salt market", "museum of clocks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeSystem:
    """How a made-up system answers.

    skill: chance of a right answer.
    factor: document tokens per row; None without documents.
    nats: mean NLL per token of the reference.
    has_vectors: whether its rows are vectors, with one marker.
    """

    name: str
    kind: str
    skill: float
    factor: float | None
    nats: float
    has_vectors: bool = False


SYSTEMS = (
    FakeSystem(name="open book", kind="open_book", skill=0.72, factor=1, nats=1.6),
    FakeSystem(name="closed book", kind="closed_book", skill=0.35, factor=None, nats=3.4),
    FakeSystem(name="ARC4", kind="arc", skill=0.70, factor=4, nats=1.8, has_vectors=True),
    FakeSystem(name="ARC8", kind="arc", skill=0.62, factor=8, nats=2.1, has_vectors=True),
    FakeSystem(name="LLMLingua-2", kind="llmlingua", skill=0.5, factor=3.6, nats=2.6),
    FakeSystem(name="BM25 sentences", kind="bm25", skill=0.55, factor=4, nats=2.4),
)
TASKS = {"nq": 400, "triviaqa": 400, "hotpotqa": 300, "squad": 600, "flores": 200, "cnn": 120}


def fake_results(
    folder: Path,
    system: FakeSystem,
    tasks: Mapping[str, int],
    *,
    protocol: Protocol = CLEAN,
    seed: int = 0,
    questions: str = "",
) -> Path:
    """Write a result folder and return it. Systems of one `seed` answer the same questions.

    tasks: number of samples by task.
    questions: a word in all questions and references; other words are other data.
    """
    predictions = [
        _answer(system, task, index, f"{seed} {questions}", questions)
        for task, num in tasks.items()
        for index in range(num)
    ]
    samples = {task: [(each.id, each.references) for each in predictions if each.task == task] for task in tasks}
    run = {
        "config": {"tasks": [{"name": task, "path": f"/data/{task}.jsonl"} for task in tasks]},
        "protocol": dataclasses.asdict(protocol),
        "data_digest": {task: data_digest(of) for task, of in samples.items()},
        "systems": {system.name: {"kind": system.kind, "checkpoint": "3f9c2a71" if system.has_vectors else None}},
        "device": "cpu",
        "versions": {"arc_ds": "0.16", "torch": "2.9.1", "sacrebleu": "2.6.0"},
        "skipped": {"too long": {system.name: {"hotpotqa": ["h1", "h2"]} if system.factor == 1 else {}}},
        "plan_digest": f"plan of {system.name}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, predictions, run)
    return folder


def _answer(system: FakeSystem, task: str, index: int, key: str, word: str) -> Prediction:
    question = random.Random(f"question {key} {task} {index}")
    answer = random.Random(f"answer {key} {task} {index} {system.name}")
    hardness = question.gauss(0, 0.15) + random.Random(f"cluster {key} {task} {index // 5}").gauss(0, 0.12)
    is_right = answer.random() < system.skill - hardness
    place, thing = question.choice(PLACES), question.choice(THINGS)
    text = f"the {thing} of {place} {word}".strip()
    if task in ("flores", "cnn"):
        words = f"a boat left {text} at noon and nobody in the {question.choice(THINGS)} saw where it went".split()
        text = " ".join(words)
        given = " ".join(each for each in words if answer.random() < 0.55 + system.skill / 2 - hardness)
    else:
        given = text if is_right else f"the {answer.choice(THINGS)} of {place}" if answer.random() < 0.6 else ""
    tokens = question.randrange(100, 200) * (8 if task in ("hotpotqa", "cnn") else 1)
    rows = 0 if system.factor is None else round(tokens / system.factor)
    stop = "length" if answer.random() < 0.03 else "eos" if answer.random() < 0.1 else "string"
    return Prediction(
        id=f"{task}-{index:05d}",
        task=task,
        prediction=given,
        references=(text, f"{place}'s {thing}") if task in ("nq", "triviaqa", "squad") else (text,),
        cluster=f"passage {index // 5}",
        group=f"eng-{('fra', 'deu', 'spa', 'dan')[index % 4]}" if task == "flores" else "",
        system=system.name,
        decoder="Llama 3.1 8B",
        index=index,
        raw=given + "\n\n",
        stop=stop,
        lengths={
            "document_decoder_tokens": tokens,
            "prompt_rows": 60 + rows + (1 if system.has_vectors else 0),
            "open_book_rows": 60 + tokens,
            "new_tokens": 1 + len(given.split()),
            **({"vectors": rows, "markers": 1} if system.has_vectors else {}),
        },
        nll={"nats": max(0.1, answer.gauss(system.nats + hardness, 0.4)) * 5, "tokens": 5},
        prompt_sha="0" * 64,
        others={"question": f"Which building in {place} is <older> than the {question.choice(THINGS)}?"},
    )


def fake_folders(root: Path, systems: Sequence[FakeSystem] = SYSTEMS, tasks: Mapping[str, int] = TASKS) -> list[str]:
    """Result folders of several systems, as arguments of a command."""
    return [str(fake_results(root / system.kind / system.name, system, tasks)) for system in systems]
