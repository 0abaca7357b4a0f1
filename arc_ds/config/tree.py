"""Parse YAML into a tree that knows the file and line of each value. Fills in `${VAR}` and applies overrides.

Scalars stay text until the type of their field is known (`decode.py`). So YAML 1.1's guesses (`no` is False, `1e-5`
is a string, `010` is 8) never reach a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import yaml

from arc_ds.errors import ConfigError

Variables = Callable[[str, str | None], str | None]
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass
class Entry:
    """One value of the tree.

    where: a file and line, or an override.
    value: the text of a scalar, or the entries of a mapping or a sequence.
    quoted: whether the scalar has quotes in the YAML.
    """

    where: str
    value: str | dict[str, Entry] | list[Entry]
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        """Whether this is YAML's null without quotes."""
        return not self.quoted and self.value in ("", "~", "null", "Null", "NULL")

    def describe(self) -> str:
        """The value in words, for an error message."""
        if isinstance(self.value, dict):
            return f"a mapping with the keys {', '.join(self.value) or '(none)'}"
        if isinstance(self.value, list):
            return f"a list of {len(self.value)}"
        return "null" if self.is_null else repr(self.value)


def parse_yaml(text: str, source: str, variables: Variables = os.environ.get) -> Entry:
    """Parse YAML. An empty document is a null scalar.

    text: the YAML.
    source: its name in errors.
    variables: gives the value of a `${VAR}` by its name and default, None for an error.

    Raises ConfigError on bad YAML, a duplicate key, a key that is not a plain word, or a missing variable.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return Entry(source, "") if node is None else _convert(node, source, variables)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}. Check the indentation and the quotes there.") from error


def apply_override(root: Entry, override: str) -> None:
    """Set one `key.path=value` in the tree. The value is YAML.

    A number selects an item of a list (`decoders.0.backbone=…`), and the next free number appends one. Raises
    ConfigError if there is no `=`, or if the path goes through a value that has no keys.
    """
    path, equals, value_text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected key.path=value, for example data.batch_size=16")
    new = parse_yaml(value_text, f"override {override!r}")
    entry = root
    for depth, key in enumerate(keys):
        entry = _child(entry, key, ".".join(keys[:depth]), new.where)
    entry.where, entry.value, entry.quoted = new.where, new.value, new.quoted


def _convert(node: yaml.Node, source: str, variables: Variables) -> Entry:
    where = source if source.startswith("override ") else f"{source}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return Entry(where, [_convert(child, source, variables) for child in node.value])
    if isinstance(node, yaml.MappingNode):
        entries: dict[str, Entry] = {}
        for key_node, child in node.value:
            entries[_key(key_node, entries, source)] = _convert(child, source, variables)
        return Entry(where, entries)
    return Entry(where, _expand(node.value, where, variables), quoted=node.style is not None)


def _key(node: yaml.Node, siblings: dict[str, Entry], source: str) -> str:
    where = f"{source}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: a key must be a plain word; got a list or mapping")
    if node.value in siblings:
        first = siblings[node.value].where
        raise ConfigError(f"{where}: the key {node.value!r} is given twice (first at {first}). Remove one of them.")
    return node.value


def _expand(text: str, where: str, variables: Variables) -> str:
    def fill(match: re.Match[str]) -> str:
        name, default = match.groups()
        value = variables(name, default)
        if value is None:
            raise ConfigError(
                f"{where}: the environment has no variable {name}, which {text!r} needs. "
                f"Set it (export {name}=…), or write ${{{name}:-default}}."
            )
        return value

    return _VARIABLE.sub(fill, text)


def _child(entry: Entry, key: str, path: str, where: str) -> Entry:
    """The entry under `key`. A missing key, or the next number of a list, becomes an empty mapping."""
    if entry.is_null:
        entry.value = {}
    if isinstance(entry.value, str):
        raise ConfigError(f"{where}: {path or 'the config'} is {entry.describe()} ({entry.where}) and has no keys")
    if isinstance(entry.value, dict):
        return entry.value.setdefault(key, Entry(where, {}))
    count = len(entry.value)
    if not key.isdecimal() or int(key) > count:
        raise ConfigError(
            f"{where}: {path} is a list of {count} ({entry.where}); expected a number from 0 to {count} after it "
            f"({count} appends), got {key!r}"
        )
    if int(key) == count:
        entry.value.append(Entry(where, {}))
    return entry.value[int(key)]
