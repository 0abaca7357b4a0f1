"""Every key of a config with its type, range, default and documentation, for `arc-ds train --keys`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from arc_ds.config import schema
from arc_ds.config.ranges import Range
from arc_ds.config.schema import RunConfig

_WIDTH = 100


class Key(NamedTuple):
    """One key.

    path: as in an override; "*" stands for the index in a list.
    type: in words, with the range.
    default: in YAML's spelling; "required" if there is none.
    doc: the docstring of the field in the schema.
    """

    path: str
    type: str
    default: str
    doc: str

    def __str__(self) -> str:
        doc = textwrap.fill(" ".join(self.doc.split()), _WIDTH, initial_indent="    ", subsequent_indent="    ")
        return f"{self.path}: {self.type} ({self.default})\n{doc}"


def all_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[Key]:
    """The keys of a dataclass of the schema. Its own keys come before those of its sections."""
    docs = _docs()
    hints = get_type_hints(cls, include_extras=True)
    sections = []
    for field in dataclasses.fields(cls):
        path, kind = prefix + field.name, hints[field.name]
        section = _section(kind)
        if section is None:
            words = _in_words(kind)
        else:
            is_list = any(get_origin(each) is tuple for each in (kind, *get_args(kind)))
            sections.append((section, f"{path}.*." if is_list else f"{path}."))
            words = "a list of sections" if is_list else "a section or null"
        if kind is not section:
            yield Key(path, words, _default(field), docs[cls.__name__, field.name])
    for section, inner in sections:
        yield from all_keys(section, inner)


def print_keys(patterns: Sequence[str]) -> int:
    """Print the keys that match one of the patterns, or all keys if there is no pattern. Returns the exit code.

    patterns: shell patterns, or parts of a path.
    """
    found = [key for key in all_keys() if not patterns or any(_matches(key.path, pattern) for pattern in patterns)]
    if not found:
        print(f"no key matches {', '.join(patterns)}. `arc-ds train --keys` lists all.", file=sys.stderr)
        return 1
    sys.stdout.write("\n".join(map(str, found)) + "\n")
    return 0


def _matches(path: str, pattern: str) -> bool:
    return pattern in path or fnmatch(path, pattern)


def _section(kind: Any) -> type | None:
    """The dataclass of a field, or of the items of its list."""
    members = [kind, *(member for outer in (kind, *get_args(kind)) for member in get_args(outer))]
    return next((one for one in members if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def _in_words(kind: Any) -> str:
    origin, members = get_origin(kind), get_args(kind)
    if origin is Annotated:
        if isinstance(members[1], dict):  # old spellings
            return _in_words(members[0])
        return f"{_in_words(members[0])}, {members[1]}" if isinstance(members[1], Range) else "path"
    if origin is Literal:
        return " | ".join(map(str, members))
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(member) for member in members)
    if origin is tuple:
        inner = [_in_words(member) for member in members if member is not Ellipsis]
        return f"a list of ({inner[0]})" if Ellipsis in members else f"a list [{', '.join(inner)}]"
    return {str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "null"}[kind]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _docs() -> dict[tuple[str, str], str]:
    """The docstring under each field, by class and field."""
    docs = {}
    classes = (node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef))
    for node in classes:
        for pair in pairwise(node.body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[node.name, name] = doc
    return docs
