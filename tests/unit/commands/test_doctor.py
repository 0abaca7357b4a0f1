"""The report of `arc-ds doctor`, and the command line."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from arc_ds import cli
from arc_ds.commands import doctor
from arc_ds.commands.doctor import Finding, package_findings, report
from arc_ds.errors import DataError

VERSION = importlib.metadata.version("pytest")


@pytest.mark.parametrize(
    ("requirement", "finding"),
    [
        ("no-such>=2", Finding("no-such", "not installed", False, True, "pip install 'no-such>=2'")),
        ("pytest>=999", Finding("pytest", f"{VERSION}, expected >=999", False, True, "pip install 'pytest>=999'")),
        ("pytest>=1", Finding("pytest", VERSION, True, True, "pip install 'pytest>=1'")),
        ('x; extra == "e"', Finding("x", "not installed (extra 'e')", False, False, "pip install 'arc-ds[e]'")),
        ('no-such; sys_platform == "plan9"', None),  # for another system
        ('no-such; extra == "dev"', None),
    ],
)
def test_package_is_found_or_has_a_cure(requirement: str, finding: Finding | None) -> None:
    assert list(package_findings([requirement])) == ([finding] if finding else [])


def test_examining_this_machine_finds_python_and_cpu():
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["python"].ok
    assert "cores" in findings["CPU"].found
    assert findings["disk"].found


def test_something_broken_is_reported_and_the_rest_still_looked_at(monkeypatch):
    def broken():
        raise OSError("driver mismatch")
        yield

    monkeypatch.setattr(doctor, "_devices", broken)
    findings = {finding.name: finding for finding in doctor.examine()}
    assert "driver mismatch" in findings["broken"].found
    assert "disk" in findings


def test_report_shows_the_cure_only_where_it_is_needed():
    text = report([Finding("a", "1", cure="never"), Finding("bb", "none", False, True, "get it")])
    assert "never" not in text
    assert "MISSING bb  none  -> get it" in text
    assert text.endswith("missing: bb\n")


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_exit_code_follows_what_is_required(monkeypatch, capsys, ok, code):
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("x", "y", ok, True), Finding("z", "w", False, False)])
    assert cli.main(["doctor"]) == code
    assert "absent  z" in capsys.readouterr().out


def test_users_mistake_is_one_message_and_exit_code_2(monkeypatch, capsys):
    def fail(_):
        raise DataError("shard 3 is cut short")

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "arc-ds doctor: shard 3 is cut short\n"


def test_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2
    assert "'train'" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_a_command():
    code = "import sys; from arc_ds import cli\ntry: cli.main([])\nexcept SystemExit: pass\n"
    code += "unwanted = {'torch', 'yaml', 'arc_ds.commands.doctor', 'arc_ds.launch.wrapper'} & set(sys.modules)\n"
    code += "assert not unwanted, unwanted"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_of_the_table_has_its_module(name):
    module = importlib.import_module(cli.COMMANDS[name].module)
    assert callable(module.main if name == "train" else module.add_parser)
