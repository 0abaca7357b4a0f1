"""A rank that runs out of memory in a step ends all ranks with one message. Real ranks, under the launch wrapper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from arc_ds.launch.exit_codes import EXIT_OUT_OF_MEMORY
from tests.helpers.waiting import LIMIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# In its third step, rank 1 asks for more memory than any machine has.
HUNGRY = """
import sys
import torch
from arc_ds import train
from arc_ds.model.decoder import Decoder
from arc_ds.system import activity, dist

forward = Decoder.forward

def hungry(self, *arguments):
    if activity.now.step == 3 and dist.rank() == 1:
        torch.empty(1 << 58)
    return forward(self, *arguments)

Decoder.forward = hungry
main = train.main
"""
WRAPPER = """
import sys
from arc_ds.launch.wrapper import launch
sys.exit(launch("hungry", sys.argv[1:], num_procs=2, device_request="cpu"))
"""


def test_a_rank_out_of_memory_ends_all_with_what_takes_it_and_what_to_change(config: Path, tmp_path: Path) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    ended = subprocess.run(
        [sys.executable, "-c", WRAPPER, config, f"run_dir={tmp_path / 'run'}", "tracking.mlflow=false"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.returncode == EXIT_OUT_OF_MEMORY, ended.stdout
    (message,) = [line for line in ended.stdout.splitlines() if "ran out of memory" in line]
    assert message.startswith("rank 1 on ") and "at step 3, decoder " in message
    for words in ("micro-batch ", " encoder tokens, ", "can't allocate memory", "optimizer 0.00", "activations"):
        assert words in message
    for setting in (
        "data.max_decoder_rows (unlimited)",
        "micro_batches (now 2)",
        "decoders.0.activation_checkpointing",
    ):
        assert setting in message
    assert "Traceback" not in ended.stdout
