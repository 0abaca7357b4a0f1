"""Parse YAML into a tree that knows the file and line of each value. Fills in `${VAR}` and applies overrides.

Scalars stay text until the type of their field is known (`decode.py`). So YAML 1.1's guesses (`no` is False, `1e-5`
is a string, `010` is 8) never reach a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from arc_ds.errors import ConfigError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_INDEX = re.compile(r"[0-9]+")


@dataclass
class Entry:
    """One value of the tree: a scalar, a mapping or a sequence.

    where: a file and line, or an override.
    scalar, mapping, sequence: the value; only the field of its `kind` is used.
    quoted: whether the scalar has quotes in the YAML.
    """

    where: str
    scalar: str | None = None
    quoted: bool = False
    mapping: dict[str, Entry] = field(default_factory=dict)
    sequence: list[Entry] = field(default_factory=list)
    kind: str = "scalar"  # "scalar" | "mapping" | "sequence"

    @property
    def is_null(self) -> bool:
        """Whether this is YAML's null without quotes."""
        return self.kind == "scalar" and not self.quoted and self.scalar in ("", "~", "null", "Null", "NULL")

    def describe(self) -> str:
        """The value in words, for an error message."""
        if self.kind == "mapping":
            return f"a mapping with the keys {', '.join(self.mapping) or '(none)'}"
        if self.kind == "sequence":
            return f"a list of {len(self.sequence)}"
        return "null" if self.is_null else repr(self.scalar)


def parse_yaml(text: str, source: str, environ: Mapping[str, str] | None = None) -> Entry:
    """Parse YAML. An empty document is a null scalar.

    text: the YAML.
    source: its name in errors.
    environ: the variables for `${VAR}` (default: the environment).

    Raises ConfigError on bad YAML, a duplicate key, a key that is not a plain word, or a missing variable.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}. Check the indentation and the quotes there.") from error
    if node is None:
        return Entry(source, scalar="")
    return _convert(node, source, os.environ if environ is None else environ)


def apply_override(root: Entry, override: str, environ: Mapping[str, str] | None = None) -> None:
    """Set one `key.path=value` in the tree. The value is YAML.

    A number selects an item of a list (`decoders.0.backbone=…`), and the next free number appends one. Raises
    ConfigError if there is no `=`, or if the path goes through a value that has no keys.
    """
    path, equals, value_text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected key.path=value, for example data.batch_size=16")
    value = parse_yaml(value_text, f"override {override!r}", environ)
    entry = root
    for depth, key in enumerate(keys[:-1]):
        entry = _child(entry, key, ".".join(keys[:depth]), value.where)
    _set(entry, keys[-1], value, ".".join(keys[:-1]))


def _convert(node: yaml.Node, source: str, environ: Mapping[str, str]) -> Entry:
    where = source if source.startswith("override") else f"{source}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return Entry(where, kind="sequence", sequence=[_convert(child, source, environ) for child in node.value])
    if isinstance(node, yaml.MappingNode):
        entry = Entry(where, kind="mapping")
        for key_node, child in node.value:
            entry.mapping[_key(key_node, entry, source)] = _convert(child, source, environ)
        return entry
    return Entry(where, scalar=_expand(node.value, where, environ), quoted=node.style is not None)


def _key(node: yaml.Node, parent: Entry, source: str) -> str:
    where = f"{source}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: a key must be a plain word; got a list or mapping")
    if node.value in parent.mapping:
        first = parent.mapping[node.value].where
        raise ConfigError(f"{where}: the key {node.value!r} is given twice (first at {first}). Remove one of them.")
    return node.value


def _expand(text: str, where: str, environ: Mapping[str, str]) -> str:
    def fill(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name in environ:
            return environ[name]
        if default is not None:
            return default
        raise ConfigError(
            f"{where}: the environment has no variable {name}, which {text!r} needs. "
            f"Set it (export {name}=…), or write ${{{name}:-default}}."
        )

    return _VARIABLE.sub(fill, text)


def _child(entry: Entry, key: str, path: str, where: str) -> Entry:
    """The entry under `key`. A missing key, or the next number of a list, becomes an empty mapping."""
    if entry.kind == "sequence":
        idx = _list_idx(entry, key, path, where)
        if idx == len(entry.sequence):
            entry.sequence.append(Entry(where, kind="mapping"))
        return entry.sequence[idx]
    _require_mapping(entry, path, where)
    return entry.mapping.setdefault(key, Entry(where, kind="mapping"))


def _set(entry: Entry, key: str, value: Entry, path: str) -> None:
    if entry.kind == "sequence":
        idx = _list_idx(entry, key, path, value.where)
        entry.sequence[idx : idx + 1] = [value]
        return
    _require_mapping(entry, path, value.where)
    entry.mapping[key] = value


def _require_mapping(entry: Entry, path: str, where: str) -> None:
    if entry.is_null:
        entry.kind, entry.scalar = "mapping", None
    if entry.kind != "mapping":
        raise ConfigError(f"{where}: {path or 'the config'} is {entry.describe()} ({entry.where}) and has no keys")


def _list_idx(entry: Entry, key: str, path: str, where: str) -> int:
    count = len(entry.sequence)
    if not _INDEX.fullmatch(key) or int(key) > count:
        raise ConfigError(
            f"{where}: {path} is a list of {count} ({entry.where}); expected a number from 0 to {count} after it "
            f"({count} appends), got {key!r}"
        )
    return int(key)
