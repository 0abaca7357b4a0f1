"""Imports run one way, from commands down to errors, and no two modules import each other.

A room is a folder or file directly under `arc_ds`. It may import the rooms of lower layers, and those of its own layer
that ALLOWED names.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (
    ("errors", "version"),
    ("system",),
    ("batch", "tokenizers", "config", "pages"),
    ("shards", "data", "model"),
    ("launch", "checkpoints", "tracking", "inference", "planning"),
    ("evaluation",),
    ("training", "export", "demo", "serving", "comparison"),
    ("commands",),
    ("cli", "train", "arc_ds"),
)
ALLOWED = {("data", "shards"), ("launch", "planning")}
FORBIDDEN = {("inference", "training"), ("serving", "training"), ("inference", "checkpoints"), ("batch", "tokenizers")}

Graph = Mapping[str, set[str]]


def module_graph(root: Path) -> dict[str, set[str]]:
    """Every module of our packages, and the modules of ours that it imports, anywhere in its code.

    Imports for type checkers alone are left out.
    """
    files = {}
    for source in (root, root / "kernels"):
        for package in ("arc_ds", "arc_kernels"):
            for path in sorted((source / package).rglob("*.py")):
                parts = path.relative_to(source).with_suffix("").parts
                files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        name: {found for found in _imported(ast.parse(path.read_text(encoding="utf-8")), files)} - {name}
        for name, path in files.items()
    }


def _imported(tree: ast.AST, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from [name for name in (inner, node.module) if name in files][:1]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        yield from _imported(node, files)


def wrong_arrows(graph: Graph) -> list[str]:
    """The imports that run against the layers, in words."""
    layer_of = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
    found = []
    for module, targets in graph.items():
        if module.startswith("arc_kernels"):
            found += [f"{module} -> {target}" for target in targets if not target.startswith("arc_kernels")]
            continue
        for target in targets:
            if target.startswith("arc_kernels"):
                continue
            one, other = _room(module), _room(target)
            up = layer_of[one] <= layer_of[other] and one != other and (one, other) not in ALLOWED
            if up or (one, other) in FORBIDDEN:
                found.append(f"{module} -> {target}")
    return sorted(found)


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's components of more than one)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in index:
                visit(target)
            if target in stack:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in index:
            visit(module)
    return sorted(found)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_imports_run_down_the_layers() -> None:
    graph = module_graph(ROOT)
    assert len(graph) > 200 and {_room(name) for name in graph if name.startswith("arc_ds")} <= {
        room for rooms in LAYERS for room in rooms
    }
    assert wrong_arrows(graph) == []


def test_no_modules_import_each_other() -> None:
    assert circles(module_graph(ROOT)) == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("arc_ds.batch.packing", "arc_ds.data.loading.loader"),
        ("arc_ds.model.encoder", "arc_ds.shards.reader"),
        ("arc_ds.inference.arc", "arc_ds.training.engine"),
        ("arc_ds.training.loop", "arc_ds.commands.demo"),
        ("arc_ds.system.dist", "arc_ds.config.schema"),
        ("arc_kernels.norm.kernels", "arc_ds.errors"),
    ],
)
def test_an_arrow_against_the_layers_is_found(module: str, target: str) -> None:
    graph = defaultdict(set, module_graph(ROOT))
    graph[module] = graph[module] | {target}
    assert wrong_arrows(graph) == [f"{module} -> {target}"]


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
