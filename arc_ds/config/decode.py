"""Decode a tree of text (`tree.py`) into dataclasses by the type of each field. Errors name path, file and line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from arc_ds.config.ranges import Range
from arc_ds.config.tree import Entry
from arc_ds.errors import ConfigError

T = TypeVar("T")


def decode(entry: Entry, cls: type[T]) -> T:
    """Build the dataclass `cls` from a mapping.

    Field types: str, int, float, bool, None, Literal of strings, unions, tuples, dataclasses and tuples of them, and
    numbers annotated with a `Range`.

    Raises ConfigError on an unknown key (with the nearest one), a missing key, or a value of another type. One
    ConfigError lists all numbers out of range.
    """
    out_of_range: list[str] = []
    decoded = _dataclass(entry, cls, "", out_of_range)
    if out_of_range:
        raise ConfigError("\n".join(out_of_range))
    return decoded


def _value(entry: Entry, kind: Any, path: str, out_of_range: list[str]) -> Any:
    origin = get_origin(kind)
    if origin is Annotated:
        number, allowed = get_args(kind)
        return _number(entry, number, allowed, path, out_of_range)
    if origin in (Union, types.UnionType):
        return _union(entry, get_args(kind), path, out_of_range)
    if kind is type(None):
        return None if entry.is_null else _mismatch(entry, path, "null")
    if origin is tuple:
        return _tuple(entry, get_args(kind), path, out_of_range)
    if dataclasses.is_dataclass(kind):
        return _dataclass(entry, kind, path, out_of_range)  # type: ignore[arg-type]
    if origin is Literal:
        return _literal(entry, get_args(kind), path)
    return _SCALARS[kind](entry, path)


def _number(entry: Entry, kind: Any, allowed: Range, path: str, out_of_range: list[str]) -> Any:
    value: Any = _SCALARS[kind](entry, path)
    if not allowed.holds(value):
        cure = f" {allowed.cure}" if allowed.cure else ""
        out_of_range.append(f"{entry.where}: {path} is {value}; expected {allowed}.{cure}")
    return value


def _literal(entry: Entry, allowed: tuple[str, ...], path: str) -> str:
    expected = f"one of {', '.join(allowed)}"
    text = _text(entry, path, expected)
    return text if text in allowed else _mismatch(entry, path, expected, _nearest(text, allowed))


def _union(entry: Entry, members: tuple[Any, ...], path: str, out_of_range: list[str]) -> Any:
    """Decode by the member that fits the shape of the value: null, a list, or a scalar."""
    if type(None) in members and entry.is_null:
        return None
    members = tuple(m for m in members if m is not type(None))
    wants_list = [m for m in members if get_origin(m) is tuple]
    rest = [m for m in members if get_origin(m) is not tuple]
    chosen = wants_list if entry.kind == "sequence" and wants_list else rest or wants_list
    return _value(entry, chosen[0], path, out_of_range)


def _tuple(entry: Entry, members: tuple[Any, ...], path: str, out_of_range: list[str]) -> tuple[Any, ...]:
    if entry.kind != "sequence":
        return _mismatch(entry, path, "a list, for example [8]")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(entry.sequence)
    if len(members) != len(entry.sequence):
        return _mismatch(entry, path, f"a list of {len(members)}")
    pairs = zip(entry.sequence, members, strict=True)
    return tuple(_value(child, kind, f"{path}.{i}", out_of_range) for i, (child, kind) in enumerate(pairs))


def _dataclass(entry: Entry, cls: type[T], path: str, out_of_range: list[str]) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if entry.kind != "mapping":
        return _mismatch(entry, path or "the config", f"a mapping with keys of {', '.join(fields)}")
    hints = get_type_hints(cls, include_extras=True)
    prefix = f"{path}." if path else ""
    for key, child in entry.mapping.items():
        if key not in fields:
            raise ConfigError(f"{child.where}: unknown key {prefix}{key}. {_nearest(key, fields)}")
    missing = [name for name, f in fields.items() if name not in entry.mapping and _is_required(f)]
    if missing:
        raise ConfigError(
            f"{entry.where}: missing {', '.join(prefix + name for name in missing)}. "
            f"Add it there, or on the command line ({prefix}{missing[0]}=…)."
        )
    values = {key: _value(child, hints[key], prefix + key, out_of_range) for key, child in entry.mapping.items()}
    return cls(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _text(entry: Entry, path: str, expected: str) -> str:
    if entry.kind != "scalar" or entry.is_null or entry.scalar is None:
        return _mismatch(entry, path, expected)
    return entry.scalar


def _str(entry: Entry, path: str) -> str:
    text = _text(entry, path, "text")
    return text if text else _mismatch(entry, path, "text that is not empty")


def _int(entry: Entry, path: str) -> int:
    text = _text(entry, path, "a whole number")
    try:
        return int(text, 10)
    except ValueError:
        return _mismatch(entry, path, "a whole number in digits, for example 1000")


def _float(entry: Entry, path: str) -> float:
    text = _text(entry, path, "a number")
    try:
        number = float(text)
    except ValueError:
        return _mismatch(entry, path, "a number, for example 1e-5")
    return number if math.isfinite(number) else _mismatch(entry, path, "a finite number")


def _bool(entry: Entry, path: str) -> bool:
    text = _text(entry, path, "true or false").lower()
    return text == "true" if text in ("true", "false") else _mismatch(entry, path, "true or false")


_SCALARS = {str: _str, int: _int, float: _float, bool: _bool}


def _mismatch(entry: Entry, path: str, expected: str, cure: str = "") -> Any:
    raise ConfigError(f"{entry.where}: {path} is {entry.describe()}; expected {expected}.{' ' if cure else ''}{cure}")


def _nearest(word: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(choices)}."
