"""The attention setting in a run's config decides the launched kernels: `arc-ds train` as a process, interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_run import ROOT, losses, write_inputs
from tests.helpers.waiting import LIMIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHORT = (
    "steps=2",
    "optimizer.warmup_steps=0",
    "data.batch_size=4",
    "data.validation=null",
    "validation.every=0",
    "checkpoint.every=0",
    "tracking.mlflow=false",
)
# A rank that records the names of the arc_kernels operators that it runs.
RANK = """
import json, sys
from pathlib import Path
from arc_ds.train import main
from tests.kernels.operators import RecordedOperators

with RecordedOperators() as operators:
    code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps(sorted(operators.names)))
sys.exit(code)
"""


def _start(config: Path, backend: str) -> tuple[subprocess.Popen[bytes], Path]:
    run = config.parent / backend
    overrides = [f"run_dir={run}", f"attention_backend={backend}", *SHORT]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(run) + ".json", str(config), *overrides]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE), run


def test_a_run_attends_by_the_backend_of_its_config(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    names, found = {}, {}
    for backend, (process, run) in {name: _start(config, name) for name in ("triton", "reference")}.items():
        _, words = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, words.decode()
        names[backend] = set(json.loads(run.with_name(run.name + ".json").read_text()))
        found[backend] = losses(run)
    attended = {name for name in names["triton"] if name.startswith("attention")}
    assert any("forward" in name for name in attended) and any("backward" in name for name in attended), names
    assert not any(name.startswith("attention") for name in names["reference"]), names
    assert len(found["triton"]) == 2 and found["triton"][0] != found["triton"][1]
    assert found["triton"] == pytest.approx(found["reference"], rel=1e-5), "issue 3's bound for a step"
