"""Compressing, generating and exporting need no package of training. The packages are blocked in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from arc_ds.export.formats import write_export
from tests.helpers.tiny_export import tiny_trained, write_decoder
from tests.helpers.zero_checkpoint import write_zero_checkpoint

SETUP = Path(__file__).parents[2] / "setup.py"
PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # importing them raises ModuleNotFoundError
from arc_ds.cli import main
sys.exit(main(sys.argv[2:]))
"""


def extra(name: str) -> list[str]:
    """The packages of an extra in setup.py."""
    tree = ast.parse(SETUP.read_text(encoding="utf-8"))
    (extras,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "EXTRAS")
    return [Requirement(line).name for line in ast.literal_eval(extras)[name]]


def run_without(packages: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, ",".join(packages), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, a decoder, a run and a text."""
    folder = tmp_path_factory.mktemp("core")
    trained = tiny_trained(folder / "run")
    write_export(trained, folder / "export")
    write_zero_checkpoint(folder / "run", trained, 2)
    write_decoder(folder / "decoder")
    (folder / "text.txt").write_text("The wind came from the sea.")
    return folder


def test_an_export_is_used_without_the_packages_of_training(folder: Path) -> None:
    packages = extra("train")
    assert {"deepspeed", "mlflow", "triton", "webdataset"} <= set(packages)
    model = ["--model", str(folder / "export")]
    calls = (
        ["compress", *model, str(folder / "text.txt"), "--out", str(folder / "vectors.safetensors")],
        ["generate", *model, "--decoder", str(folder / "decoder"), "<context>The sea.</context> It", "--device", "cpu"],
        ["export", str(folder / "run"), str(folder / "again")],
    )
    for arguments in calls:
        done = run_without(packages, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    exported = [(folder / name / "model.safetensors").read_bytes() for name in ("export", "again")]
    assert exported[0] == exported[1] and (folder / "vectors.safetensors").stat().st_size > 0


def test_a_command_that_needs_a_package_names_its_extra(folder: Path) -> None:
    done = run_without(["safetensors"], "compress", "--model", str(folder / "export"), "x", "--out", "y")
    assert "ModuleNotFoundError" in done.stderr, "the program blocks nothing"
    tars = ["http://localhost:1/{0..1}.tar", "--tokenizer", str(folder / "run" / "tokenizer.model")]
    calls = {
        "deepspeed": ["train", "config.yaml"],
        "webdataset": ["shards", "index", *tars, "--out", str(folder / "index")],
    }
    for package, arguments in calls.items():
        done = run_without([package], *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert f"this needs {package}, which is not installed. Run: pip install 'arc-ds[train]'" in done.stderr
