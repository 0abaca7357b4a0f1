"""The configuration of an evaluation. Loading, overrides, ranges and errors are those of `arc_ds.config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from arc_ds.config.decode import decode, nearest
from arc_ds.config.ranges import Count, Positive, PositiveFloat, Range
from arc_ds.config.schema import DeviceName, FilePath
from arc_ds.config.tree import Entry, apply_override, parse_yaml
from arc_ds.errors import ConfigError
from arc_ds.evaluation.datasets import find_task
from arc_ds.evaluation.protocol import CLEAN, REFERENCE, Protocol
from arc_ds.evaluation.systems import KINDS
from arc_ds.evaluation.systems.served import identity_keys
from arc_ds.system.user_files import read_user_text
from arc_ds.system.user_paths import user_path

_PRESETS = {preset.name: preset for preset in (CLEAN, REFERENCE)}


def _task_name(text: str) -> str:
    return find_task(text).name


@dataclass(frozen=True, kw_only=True)
class ProtocolChoice:
    """A protocol as a config writes it: `clean`, `reference`, or `{name: reference, truncation: head}`."""

    protocol: Protocol = CLEAN
    """The resolved protocol. If a field differs from its preset, the name says so."""

    @classmethod
    def decode_entry(cls, entry: Entry, path: str) -> ProtocolChoice:
        """Decode a preset's name, or a mapping with the name of a preset (clean by default) and other fields."""
        fields = {} if not isinstance(entry.value, dict) else dict(entry.value)
        name = fields.pop("name", Entry(entry.where, CLEAN.name)) if isinstance(entry.value, dict) else entry
        if not isinstance(name.value, str) or name.value not in _PRESETS:
            raise ConfigError(
                f"{name.where}: {path} is {name.describe()}; expected {' or '.join(_PRESETS)}, or a mapping with one "
                f"of them as `name` and the fields that differ ({', '.join(f.name for f in dataclasses.fields(CLEAN))})"
            )
        given = decode(Entry(entry.where, fields), Protocol, path)
        preset = _PRESETS[name.value]
        chosen = replace(preset, **{key: getattr(given, key) for key in fields})
        return cls(protocol=chosen if chosen == preset else replace(chosen, name=f"{preset.name}, changed"))


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """One system: `kind`, the keys of that kind, and a `name` that is the kind's by default."""

    kind: str
    """One of `systems.KINDS`."""
    name: str
    """Its name in results and tables. The default is the kind."""
    section: Any
    """The keys of the kind, as its own dataclass."""

    @classmethod
    def decode_entry(cls, entry: Entry, path: str) -> SystemConfig:
        """Decode the keys by the kind. Unknown kinds and keys raise ConfigError with the nearest one."""
        fields = dict(entry.value) if isinstance(entry.value, dict) else {}
        kind = fields.pop("kind", None)
        if kind is None or not isinstance(kind.value, str):
            raise ConfigError(f"{entry.where}: {path} needs `kind: …`, one of {', '.join(KINDS)}")
        if kind.value not in KINDS:
            raise ConfigError(f"{kind.where}: {path}.kind is {kind.value!r}. {nearest(kind.value, KINDS)}")
        name = fields.pop("name", kind)
        if not isinstance(name.value, str) or not name.value:
            raise ConfigError(f"{name.where}: {path}.name is {name.describe()}; expected a text")
        section: Any = decode(Entry(entry.where, fields), KINDS[kind.value].section, path)
        return cls(kind=kind.value, name=name.value, section=section)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task: its files, and how many of its samples are asked."""

    name: Annotated[str, _task_name]
    """One of `datasets.TASKS`, or a pair of FLORES (`flores:eng-fra`)."""
    path: FilePath
    """File or folder of the tested samples, in a format that the task reads."""
    examples: FilePath | None = None
    """File or folder of the in-context examples. None: samples of the tested file, which are not tested."""
    max_samples: Positive | None = None
    """How many samples are asked, of each direction if the task translates. None: all."""
    num_examples: Count | None = None
    """In-context examples before each question. None: the task's own. Tasks with one long document have none."""
    num_passages: Positive | None = None
    """Passages of a document, joined by a newline. None: the task's own."""
    max_new_tokens: Positive | None = None
    """Limit of an answer in the decoder's tokens. None: the task's own."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A whole evaluation. Relative paths start at the folder in which the command runs."""

    output: FilePath
    """Folder for predictions and scores. It is created if it does not exist. If it holds an unfinished evaluation of
    this config, the evaluation goes on."""
    protocol: ProtocolChoice = ProtocolChoice()
    """clean, reference, or a mapping with one of them as `name` and the fields that differ (`protocol.py`)."""
    seed: Annotated[int, Range(at_least=0, below=2**63)] = 0
    """Seed of the choice of examples, and of sampling if the protocol samples."""
    tasks: tuple[TaskConfig, ...]
    """The tasks; at least one."""
    systems: tuple[SystemConfig, ...] = ()
    """The systems. A training evaluates its own model instead (`evaluation` in a run's config)."""
    max_batch_rows: Positive = 16384
    """Decoder rows of a batch: its number of samples times its longest prompt plus the answer. In-context examples that
    all samples share count once. A sample that exceeds this alone is a batch of its own. Memory grows with it: keys and
    values of a row take 128 KiB for Llama 3.1 8B."""
    nll: bool = True
    """Whether to compute the NLL of each sample's first reference."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of all weights."""
    device: DeviceName = "auto"
    """auto: GPUs if there are any, otherwise the CPU."""
    wait_s: PositiveFloat = 3600.0
    """Seconds without a new batch of any other rank after which rank 0 gives up. It must be longer than a batch."""


def load_eval_config(path: str | Path, overrides: Sequence[str] = (), *, needs_systems: bool = True) -> EvalConfig:
    """Read a YAML config of an evaluation, apply `key.path=value` overrides in order, and check it.

    needs_systems: whether an empty list of systems is an error.

    Raises ConfigError that names the file and line or the override, the expected value, and the remedy.
    """
    remedy = "Give the path of a YAML file, such as one in ds_configs/eval."
    text = read_user_text(Path(user_path(path) if isinstance(path, str) else path), ConfigError, remedy=remedy)
    root = parse_yaml(text, str(path))
    for override in overrides:
        apply_override(root, override)
    config = decode(root, EvalConfig)
    problems = [*_doubles("tasks", [task.name for task in config.tasks])]
    problems += _doubles("systems", [system.name for system in config.systems])
    if not config.tasks:
        problems.append("tasks is an empty list; expected at least one task ({name: …, path: …})")
    if needs_systems and not config.systems:
        problems.append("systems is empty; expected at least one system ({kind: …})")
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}." for problem in problems))
    return config


def as_tree(config: EvalConfig) -> dict[str, Any]:
    """The keys that define the results, as dicts, lists and scalars: all but `output`, `device` and `wait_s`.

    Of a `server`, the model alone is left: another address or number of requests does not change results.
    """
    tree = dataclasses.asdict(config)
    for key in ("output", "device", "wait_s"):
        del tree[key]
    tree["protocol"] = tree["protocol"]["protocol"]
    tree["systems"] = [
        {"kind": each["kind"], "name": each["name"], **identity_keys(each["section"])} for each in tree["systems"]
    ]
    return tree


def _doubles(key: str, names: Sequence[str]) -> list[str]:
    return [
        f"{key}.{idx}.name is {name!r}, like that of {key}.{names.index(name)}. Give it another name"
        for idx, name in enumerate(names)
        if name in names[:idx]
    ]
