"""What all tests share: Triton interpreted where there is no GPU, few threads, no network, hypothesis without limits of
wall-clock time, the golden files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Ranks of the distributed tests share the cores with the test process: one thread each is the fastest there. Programs
# that tests start read the variable. This process has imported torch, which reads it only then.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
# A background job of a script ignores SIGINT, and its children would too. Tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Programs that tests start import this checkout, whatever is installed.
ROOT = Path(__file__).parents[1]
paths = (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Without a GPU the kernels run under Triton's interpreter. The variable counts only if it is set before
# triton is imported, which DeepSpeed and torch.compile do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("arc", deadline=None)  # a shared machine stalls now and then; that is no failure
settings.load_profile("arc")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers of a test do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files: $ARC_GOLDEN, or `shared/golden` next to the repository; skips if it is absent."""
    default = ROOT.parent / "shared" / "golden"
    folder = Path(os.environ.get("ARC_GOLDEN", default))
    if not folder.is_dir():
        pytest.skip(f"no golden files at {folder}; set ARC_GOLDEN to their folder")
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny run, next to all files that it reads. Tests may add files there, but change none."""
    from tests.helpers.tiny_run import write_inputs  # after the variables above

    return write_inputs(tmp_path_factory.mktemp("tiny"))
