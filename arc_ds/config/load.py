"""Load a run's config, and write it as YAML, as flat parameters, or as a hash of the keys that define the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from arc_ds.config.decode import decode
from arc_ds.config.schema import RunConfig
from arc_ds.config.tree import Variables, apply_override, parse_yaml
from arc_ds.config.validate import check_exclusions
from arc_ds.errors import ConfigError
from arc_ds.system.user_files import read_user_text
from arc_ds.system.user_paths import user_path

Scalar = str | int | float | bool | None

# Keys in which hosts may differ: paths, and how a host does its share. The content at the paths is compared by
# fingerprints (`training.build`, `training.run_folder`). Flat keys; "*" stands for a list index.
_OF_HOSTS = (
    "run_dir",
    "device",
    "stall_limit_s",
    "distributed.*",
    "deepspeed",
    "encoder.backbone",
    "encoder.tokenizer",
    "encoder.init_from",
    "decoders.*.backbone",
    "decoders.*.tokenizer",
    "data.sources.*.path",
    "data.validation",
    "data.validation.*.path",
    "data.num_workers",
    "data.cache_dir",
    "data.cache_gib",
    "evaluation.config",
    "tracking.*",
)
# Further keys that a run may change between a stop and a resume: outputs, measurements, their frequency, and the way
# in which the same mathematics is distributed over machines.
_OF_STARTS = (
    "log_every",
    "encoder.activation_checkpointing",
    "decoders.*.implementation",  # another one in effect changes the digest of the decoder
    "decoders.*.trust_remote_code",
    "decoders.*.placement",
    "decoders.*.activation_checkpointing",
    "data.max_encoder_tokens",
    "data.max_decoder_rows",
    "data.validation.*.*",
    "data.on_error",
    "checkpoint.*",
    "validation.*",
    "evaluation",
    "evaluation.*",
)
# Keys that the first version lacked, with the value that stands for its behaviour. With this value they are not hashed,
# so that runs of the first version can be resumed.
_LATER: Mapping[str, Scalar] = {
    "encoder.keep_ports": True,
    "encoder.train": "all",
    "encoder.lora": None,
    "bridge.shared": False,
    "decoders.*.train": True,
    "decoders.*.lora": None,
    "optimizer.skip_spikes": None,
}


def load_config(path: str | Path, overrides: Sequence[str] = (), variables: Variables = os.environ.get) -> RunConfig:
    """Read a YAML config, apply `key.path=value` overrides in order, decode it by type and check its ranges.

    `variables` gives the values of `${VAR}` and `${VAR:-default}` in the file. Relative paths stay as written. Raises
    ConfigError that names the file and line or the override, the expected value, and the remedy.
    """
    remedy = "Give the path of a YAML file, such as one in ds_configs/recipes."
    text = read_user_text(Path(user_path(path) if isinstance(path, str) else path), ConfigError, remedy=remedy)
    root = parse_yaml(text, str(path), variables)
    for override in overrides:
        apply_override(root, override)
    config = decode(root, RunConfig)
    check_exclusions(config, str(path))
    return config


def _to_dict(config: RunConfig) -> dict[str, Any]:
    """The whole tree, including defaults, as dicts, lists and scalars that YAML and JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # JSON turns tuples into lists


def dump_yaml(config: RunConfig) -> str:
    """The resolved tree as YAML. `load_config` reads it back as an equal config."""
    tree = _to_dict(config)
    for decoder in tree["decoders"]:
        if not decoder["backbone"]:
            del decoder["backbone"]  # a path must not be empty
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def flatten(config: RunConfig) -> dict[str, Scalar]:
    """Scalars by dotted key (`decoders.0.backbone`), for trackers. A list of numbers is one JSON text (`[2, 2]`)."""
    return flatten_tree(_to_dict(config))


def flatten_tree(value: Any, prefix: str = "") -> dict[str, Scalar]:
    """`flatten` of dicts, lists and scalars. prefix: dotted key of the value itself."""
    if isinstance(value, list) and any(isinstance(child, dict) for child in value):
        value = {str(idx): child for idx, child in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: json.dumps(value) if isinstance(value, list) else value}
    flat: dict[str, Scalar] = {}
    for key, child in value.items():
        flat |= flatten_tree(child, f"{prefix}.{key}" if prefix else key)
    return flat


def common(config: RunConfig) -> dict[str, Scalar]:
    """The part of `flatten` that all hosts of a run must share: everything except paths and how a host works."""
    return {key: value for key, value in flatten(config).items() if not _matches(key, _OF_HOSTS)}


def numerics(config: RunConfig) -> dict[str, Scalar]:
    """The part of `common` that defines the run's results, without how it is distributed, watched and saved."""
    # With rank_mean, the loss is a mean of the parts' means, so it depends on the number of parts.
    free = (*_OF_STARTS, "micro_batches") if config.loss.normalize == "global" else _OF_STARTS
    return {key: value for key, value in common(config).items() if not _matches(key, free)}


def defines_results(key: str) -> bool:
    """Whether a flat key is one of `numerics`, so that its value may change the results of a run."""
    return not _matches(key, (*_OF_HOSTS, *_OF_STARTS))


def config_hash(config: RunConfig) -> str:
    """16 hex digits, equal for two configs exactly if their `numerics` are equal. The world size is not in a config."""
    keys = {
        key: value
        for key, value in numerics(config).items()
        if not any(_matches(key, [later]) and value == first for later, first in _LATER.items())
    }
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Scalar], new: Mapping[str, Scalar]) -> tuple[str, ...]:
    """One line for each key in which two flat configs differ, for the message about a run folder of another config."""
    absent = "(absent)"
    keys = sorted(old.keys() | new.keys())
    pairs = [(key, old.get(key, absent), new.get(key, absent)) for key in keys]
    return tuple(f"{key}: {before} there, {now} here" for key, before, now in pairs if before != now)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    """Whether a flat key matches one of the patterns. "*" stands for one part."""
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), key) for pattern in patterns)
