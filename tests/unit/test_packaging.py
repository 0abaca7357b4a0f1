"""What an installed package would lack, and what nothing may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "arc_ds").rglob("*.py"), *(ROOT / "kernels" / "arc_kernels").rglob("*.py")])
# The package on the left never imports those on the right (`arc_ds/README.md`).
FORBIDDEN = {
    "arc_ds/data": ("arc_ds.model", "arc_ds.training", "arc_ds.export", "arc_ds.cli"),
    "arc_ds/model": ("arc_ds.training", "arc_ds.export", "arc_ds.cli"),
    "arc_ds/config": ("arc_ds.data", "arc_ds.model", "arc_ds.training", "arc_ds.cli"),
    "kernels/arc_kernels": ("arc_ds",),
}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def test_every_folder_of_modules_is_a_package():
    lacking = {path.parent for path in SOURCES if not (path.parent / "__init__.py").exists()}
    assert not lacking, "a wheel would leave these out: add an __init__.py"


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_arrows_run_one_way(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports_of(path):
            for target in FORBIDDEN[folder]:
                assert name != target and not name.startswith(f"{target}."), f"{path} imports {name}"


def test_every_requirement_of_setup_is_pinned_for_ci():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {Requirement(line).name.lower(): Requirement(line) for line in constraints if line and line[0] != "#"}
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = {ast.unparse(n.targets[0]): ast.literal_eval(n.value) for n in tree.body if _is_list_of_requirements(n)}
    wanted = [*values["CORE"], *(line for lines in values["EXTRAS"].values() for line in lines)]
    for line in wanted:
        requirement = Requirement(line)
        if requirement.name == "arc-ds":
            assert requirement.extras <= set(values["EXTRAS"])
            continue
        pin = pinned[requirement.name.lower()]
        (version,) = pin.specifier
        assert requirement.specifier.contains(version.version), f"{line} excludes the pinned {pin}"


def _is_list_of_requirements(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("CORE", "EXTRAS")


def test_device_names_stand_in_one_module():
    """`device.py` alone decides between cuda and cpu; the config only names the choice."""
    for path in SOURCES:
        if path.name in ("device.py", "schema.py") or "arc_kernels" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in ("cuda", "nccl", "gloo"):
                pytest.fail(f"{path}:{node.lineno} names {node.value!r}")
