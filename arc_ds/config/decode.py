"""Decode a tree of text (`tree.py`) into dataclasses by the type of each field. Errors name path, file and line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from arc_ds.config.ranges import Range
from arc_ds.config.tree import Entry
from arc_ds.errors import ConfigError

T = TypeVar("T")


def decode(entry: Entry, cls: type[T], path: str = "") -> T:
    """Build the dataclass `cls` from a mapping.

    path: key of the mapping in the config, for errors.

    Field types: str, int, float, bool, Literal of strings, unions (also with None), tuples, dataclasses and tuples of
    them, numbers annotated with a `Range`, text annotated with a function that returns the value or raises ConfigError,
    and Literals annotated with a dict of their old spellings. A dataclass with a class method `decode_entry(entry,
    path)` decodes itself.

    Raises ConfigError on an unknown key (with the nearest one), a missing key, or a value of another type. One
    ConfigError lists all numbers out of range.
    """
    out_of_range: list[str] = []
    decoded = _dataclass(entry, cls, path, out_of_range)
    if out_of_range:
        raise ConfigError("\n".join(out_of_range))
    return decoded


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence for an error message: the choice nearest to a wrong word, or all choices if none is near."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(choices)}."


def _value(entry: Entry, kind: Any, path: str, out_of_range: list[str]) -> Any:
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        allowed = members[1]
        if isinstance(allowed, dict):
            old = entry.value.lower() if isinstance(entry.value, str) else None
            return allowed[old] if old in allowed else _value(entry, members[0], path, out_of_range)
        value = _value(entry, members[0], path, out_of_range)
        if not isinstance(allowed, Range):
            return _converted(entry, value, allowed, path)
        if not allowed.holds(value):
            out_of_range.append(f"{entry.where}: {path} is {value}; expected {allowed}. {allowed.cure}".rstrip())
        return value
    if origin in (Union, types.UnionType):
        return _union(entry, members, path, out_of_range)
    if origin is tuple:
        return _tuple(entry, members, path, out_of_range)
    if (own := getattr(kind, "decode_entry", None)) is not None:
        return own(entry, path)
    if dataclasses.is_dataclass(kind):
        return _dataclass(entry, kind, path, out_of_range)  # type: ignore[arg-type]
    if origin is Literal:
        expected = f"one of {', '.join(members)}"
        text = _text(entry, path, expected)
        return text if text in members else _mismatch(entry, path, expected, nearest(text, members))
    expected, parse = _SCALARS[kind]
    try:
        return parse(_text(entry, path, expected))
    except ValueError:
        return _mismatch(entry, path, expected)


def _converted(entry: Entry, value: Any, convert: Callable[[Any], Any], path: str) -> Any:
    try:
        return convert(value)
    except ConfigError as error:
        raise ConfigError(f"{entry.where}: {path}: {error}") from error


def _union(entry: Entry, members: tuple[Any, ...], path: str, out_of_range: list[str]) -> Any:
    """Decode by the member that fits the shape of the value: null, a list, or a scalar."""
    if type(None) in members and entry.is_null:
        return None
    kinds = [member for member in members if member is not type(None)]
    is_list = isinstance(entry.value, list)
    chosen = next((kind for kind in kinds if (get_origin(kind) is tuple) == is_list), kinds[0])
    return _value(entry, chosen, path, out_of_range)


def _tuple(entry: Entry, members: tuple[Any, ...], path: str, out_of_range: list[str]) -> tuple[Any, ...]:
    if not isinstance(entry.value, list):
        return _mismatch(entry, path, "a list, for example [8]")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(entry.value)
    if len(members) != len(entry.value):
        return _mismatch(entry, path, f"a list of {len(members)}")
    pairs = zip(entry.value, members, strict=True)
    return tuple(_value(child, kind, f"{path}.{i}", out_of_range) for i, (child, kind) in enumerate(pairs))


def _dataclass(entry: Entry, cls: type[T], path: str, out_of_range: list[str]) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(entry.value, dict):
        return _mismatch(entry, path or "the config", f"a mapping with keys of {', '.join(fields)}")
    hints = get_type_hints(cls, include_extras=True)
    prefix = f"{path}." if path else ""
    for key, child in entry.value.items():
        if key not in fields:
            raise ConfigError(f"{child.where}: unknown key {prefix}{key}. {nearest(key, fields)}")
    missing = [name for name, f in fields.items() if name not in entry.value and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(
            f"{entry.where}: missing {', '.join(prefix + name for name in missing)}. "
            f"Add it there, or on the command line ({prefix}{missing[0]}=…)."
        )
    return cls(**{key: _value(child, hints[key], prefix + key, out_of_range) for key, child in entry.value.items()})


def _text(entry: Entry, path: str, expected: str) -> str:
    """The text of a scalar that is not empty."""
    if not isinstance(entry.value, str) or not entry.value or entry.is_null:
        cure = "~ alone is null in YAML. The home folder is ~/" if entry.value == "~" else ""
        return _mismatch(entry, path, expected, cure)
    return entry.value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _bool(text: str) -> bool:
    return ("false", "true").index(text.lower()) == 1


_SCALARS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    str: ("text that is not empty", str),
    int: ("a whole number in digits, for example 1000", int),
    float: ("a finite number, for example 1e-5", _finite),
    bool: ("true or false", _bool),
}


def _mismatch(entry: Entry, path: str, expected: str, cure: str = "") -> Any:
    raise ConfigError(f"{entry.where}: {path} is {entry.describe()}; expected {expected}. {cure}".rstrip())
