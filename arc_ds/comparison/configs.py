"""Differences between the configs of runs, and groups of runs that differ in their seed only."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arc_ds.comparison.runs import ComparedRun
from arc_ds.pages.axes import without_middle
from arc_ds.pages.tables import ABSENT

SEED = "seed"
_LABELS = re.compile(r"run_dir|tracking\.(run_name|uri)")  # they name a run
_OF_SEEDS = re.compile(rf"{SEED}|tracking\..*")
_END_OF_SEEDS = re.compile(r"[\s_\-./]*(seed|run|s)?[\s_\-./=]*$")
_MAX_CHARS = 36
_KEPT_CHARS = 6  # of a common part, on each side


@dataclass(frozen=True)
class RunGroup:
    """Runs whose configs differ in the seed only, or a single run.

    label: name of the run, or the common part of the names.
    members: places of the runs.
    """

    label: str
    members: tuple[int, ...]


def config_differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """The values of all runs, by key, for the keys in which they differ. The names of runs are left out."""
    return _differing([run.config for run in runs if run.config], [run.config for run in runs])


def fact_differences(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """The facts (status, host, device, versions, commit) in which runs differ, by name."""
    return _differing([run.facts for run in runs if run.facts], [run.facts for run in runs])


def _differing(known: Sequence[Mapping[str, str]], every: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Values of every mapping by key, for keys in which the known ones differ."""
    keys = sorted({key for each in known for key in each if not _LABELS.fullmatch(key)})
    return {
        key: [each.get(key, ABSENT) for each in every]
        for key in keys
        if len({each.get(key, ABSENT) for each in known}) > 1
    }


def group_by_seed(runs: Sequence[ComparedRun], differences: Mapping[str, Sequence[str]]) -> list[RunGroup]:
    """Group the runs that differ in the seed only, in the order of their first runs. Each group has a unique label.

    differences: `config_differences` of the runs.
    """
    keys = [key for key in differences if not _OF_SEEDS.fullmatch(key)]
    members: dict[object, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        values = tuple(differences[key][place] for key in keys)
        # Two runs of one seed are repetitions, not seeds, but they share a config all the same.
        members[values if run.config else place].append(place)
    groups = [RunGroup(_group_label([runs[place].name for place in found]), tuple(found)) for found in members.values()]
    labels = [group.label for group in groups]
    return [
        group
        if labels.count(group.label) == 1
        else RunGroup(f"{group.label} [{runs[group.members[0]].name}]", group.members)
        for group in groups
    ]


def _group_label(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    common = _END_OF_SEEDS.sub("", _common_start(names))
    return f"{common or names[0]} ({len(names)} seeds)"


def shorten(values: Sequence[str]) -> list[str]:
    """Short forms of the values of one key. Equal values stay equal, and different ones stay different.

    The parts that all long values share become an ellipsis. A value that is still long loses its middle.
    """
    long = [value for value in dict.fromkeys(values) if len(value) > _MAX_CHARS]
    if not long:
        return list(values)
    others = [value for value in dict.fromkeys(values) if value != ABSENT]
    start = _boundary(_common_start(others)) if len(others) > 1 else 0
    tails = [value[start:][::-1] for value in others]
    end = _boundary(_common_start(tails)) if len(others) > 1 else 0
    short = {}
    for value in dict.fromkeys(values):
        inner = value
        if value != ABSENT:
            inner = inner[: len(inner) - end] + ("…" if end else "") if end > _KEPT_CHARS else inner
            inner = "…" + inner[start:] if start > _KEPT_CHARS else inner
        short[value] = without_middle(inner, _MAX_CHARS)
    if len(set(short.values())) < len(short):
        short = {value: f"{text} #{hashlib.sha256(value.encode()).hexdigest()[:4]}" for value, text in short.items()}
    return [short[value] for value in values]


def _common_start(texts: Sequence[str]) -> str:
    """The characters with which all texts begin."""
    low, high = min(texts), max(texts)
    differs = (idx for idx, (one, other) in enumerate(zip(low, high, strict=False)) if one != other)
    return low[: next(differs, min(len(low), len(high)))]


def _boundary(common: str) -> int:
    """Characters of a common part up to its last separator."""
    return max((match.end() for match in re.finditer(r"[/,.:;_\-\s]", common)), default=0)
