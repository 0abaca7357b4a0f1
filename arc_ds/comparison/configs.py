"""Differences between the configs of runs, and groups of runs that differ in their seed only."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arc_ds.comparison.runs import ComparedRun
from arc_ds.config.load import defines_results
from arc_ds.errors import DataError
from arc_ds.pages.axes import without_middle
from arc_ds.pages.tables import ABSENT
from arc_ds.tracking.mlflow_server import HELD_OUT

SEED = "seed"
VALIDATION = "validation/"
# They name a run or a job.
_LABELS = re.compile(r"run_dir|tracking\.(run_name|uri)|slurm_job")
# Paths of inputs. Their content defines the results.
_PATH = re.compile(r"(encoder|decoders\.\d+)\.(backbone|tokenizer|init_from)|data\.(sources|validation)(\.\d+\.path)?")
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
    """The values of all runs, by key, for the keys in which they differ; first the keys that define results.

    The names of runs are left out, and so are paths of inputs whose digests are known: these tell what differs.
    """
    known = [run.config for run in runs if run.config]
    found = _differing(known, [run.config for run in runs])
    left = {key: values for key, values in found.items() if not all(_has_digest(key, config) for config in known)}
    return dict(sorted(left.items(), key=lambda item: not _defines_results(item[0])))


def _defines_results(key: str) -> bool:
    return _PATH.fullmatch(key) is not None or defines_results(key)


def _has_digest(key: str, config: Mapping[str, str]) -> bool:
    """Whether a key is the path of an input, and the config has the digest of its content, if it has the input."""
    if _PATH.fullmatch(key) is None:
        return False
    if key.startswith("data.validation"):
        name = HELD_OUT
    else:
        name = Path(config.get(key, "")).name if key.startswith("data.") else key
    return config.get(key, "null") == "null" or f"digest.{name}" in config


def is_incomparable(metric: str, runs: Sequence[ComparedRun]) -> bool:
    """Whether a metric is a score on held-out data, and the runs that have it were validated on different data."""
    return metric.startswith(VALIDATION) and len(_by_held_out(run for run in runs if metric in run.curves)) > 1


def check_held_out(runs: Sequence[ComparedRun], best: str | None) -> None:
    """Raise DataError if the user orders runs by a score on different held-out data. best: as the user gives it."""
    if best is not None and is_incomparable(best.removesuffix(":min").removesuffix(":max"), runs):
        raise DataError(
            f"--best {best} cannot order these runs: {held_out_notes(runs)[0]} Leave out some of the runs, or order by "
            "another metric, such as train/loss."
        )


def held_out_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """A sentence that warns about different held-out data, if there are any. Unknown data do not count."""
    groups = _by_held_out(runs)
    if len(groups) < 2:
        return []
    listed = "; ".join(
        f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''} ({digest[:8]})" for digest, names in groups.items()
    )
    return [f"validation/ was measured on different held-out data, so its values are not comparable: {listed}."]


def _by_held_out(runs: Iterable[ComparedRun]) -> dict[str, list[str]]:
    """Names of the runs by the digest of their held-out data, if it is known."""
    groups: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        if (digest := run.config.get(f"digest.{HELD_OUT}")) is not None:
            groups[digest].append(run.name)
    return groups


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
    """Group runs that share all keys that define results, except the seed.

    The groups follow the order of their first runs. Each has a unique label.

    differences: `config_differences` of the runs.
    """
    keys = [key for key in differences if key != SEED and _defines_results(key)]
    members: dict[object, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        values = tuple(differences[key][place] for key in keys)
        members[values if run.config else place].append(place)
    groups = [RunGroup(_group_label([runs[place] for place in found]), tuple(found)) for found in members.values()]
    labels = [group.label for group in groups]
    return [
        group
        if labels.count(group.label) == 1
        else RunGroup(f"{group.label} [{runs[group.members[0]].name}]", group.members)
        for group in groups
    ]


def _group_label(runs: Sequence[ComparedRun]) -> str:
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    common = _END_OF_SEEDS.sub("", _common_start(names))
    is_of_seeds = len({run.config.get(SEED) for run in runs}) == len(runs)  # else some are repetitions
    return f"{common or names[0]} ({len(names)} {'seeds' if is_of_seeds else 'runs'})"


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
