"""Result files of an evaluation.

A folder holds `predictions.jsonl`, one `Prediction` a line, sorted by task and index, and `run.json`, a JSON object
with the config, the protocol's fields, digests, versions, dtype, device and metric signatures. Times stand in
`times.json`, since they are not reproducible. Scores are computed from `predictions.jsonl` alone, at any time, by any
process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREDICTIONS, RUN, TIMES = "predictions.jsonl", "run.json", "times.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One line of `predictions.jsonl`. Files of other programs need `id`, `task`, `prediction` and `references` only.

    id: id of the sample, unique within task and system.
    task: name of a task, or "qa", "summary", "translation" for data of one's own.
    prediction: the answer.
    references: all accepted answers.
    cluster: samples of one cluster are not independent. Its default is the id.
    group: samples of one group make one score of a corpus metric.
    system: name of the system.
    decoder: name of the decoder.
    index: place of the sample in its file.
    raw: the answer before it was cut.
    stop: "string", "eos" or "length".
    lengths: counts, see `systems.system.Answer`.
    nll: {"nats", "tokens"} of the first reference.
    prompt_sha: sha256 of the prompt's parts.
    seed: seed of sampling and examples.
    others: fields of the line that are not named here. They are kept.
    """

    id: str
    task: str
    prediction: str
    references: tuple[str, ...]
    cluster: str = ""
    group: str = ""
    system: str = ""
    decoder: str = ""
    index: int = 0
    raw: str | None = None
    stop: str | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)
    nll: Mapping[str, float] | None = None
    prompt_sha: str = ""
    seed: int = 0
    others: Mapping[str, Any] = field(default_factory=dict)
