"""Stage "fast": every kernel at the paper's shapes against what else computes the same."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial

import torch
from bench_kernels import all_cases, measure_case
from gpu_cases import FULL, TINY

from gpu_stages.context import ROOT, StageContext

TABLE = ROOT / "kernels" / "arc_kernels" / "attention" / "measured.py"
TABLE_SECONDS = 20.0
"""Minimum time left to start the table of attention backends. An estimate: about a third of the table takes so long."""

CASE_SECONDS = 10.0
"""Minimum time left to start a case, whose rows are written together at its end."""

FIRST_CASE = "GPU_DAY_FIRST_CASE"
"""Environment variable of a restarted process: the number of cases that are done."""


def run(context: StageContext) -> None:
    """Append the rows of case after case until the time is up, then fill attention's table if time is left."""
    ceilings = context.ceilings() or context.measure_ceilings()
    measure = partial(measure_case, device=context.device, ceilings=ceilings)
    if context.rehearse:  # Inductor would compile for minutes on a CPU
        torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
        measure = partial(measure, max_rounds=2)
    cases = all_cases(TINY if context.rehearse else FULL)
    if context.rehearse:
        cases = list({case.kernel: case for case in reversed(cases)}.values())
    left_out = []
    for idx, case in enumerate(cases[int(os.environ.get(FIRST_CASE, 0)) :]):
        if context.seconds_left() < (0.0 if context.rehearse else CASE_SECONDS):
            left_out.append(f"{case.kernel} {case.shape}")
            continue
        try:
            context.rows.append(measure(case))
        except Exception as error:  # one kernel must not cost the rows of the others
            context.failure(f"{case.kernel} {case.shape}", error)
            _go_on_if_unusable(context, idx + 1)
    if left_out:
        context.result("cases", "left out", f"no time for {len(left_out)}: {'; '.join(left_out)}")
    _choose_attention(context)


def _go_on_if_unusable(context: StageContext, num_done: int) -> None:
    """Start this process anew with the next case if the GPU refuses all further work, as after a bad memory access."""
    try:
        torch.zeros(1, device=context.device).item()
    except RuntimeError:
        os.environ[FIRST_CASE] = str(int(os.environ.get(FIRST_CASE, 0)) + num_done)
        options = [option for option in sys.argv if not option.startswith("--seconds")]
        os.execv(sys.executable, [sys.executable, *options, f"--seconds={max(context.seconds_left(), 0):.1f}"])


def _choose_attention(context: StageContext) -> None:
    """Fill a copy of the table by which `auto` chooses attention, with the results."""
    if context.rehearse or context.seconds_left() < TABLE_SECONDS:
        reason = "a rehearsal measures no backend" if context.rehearse else "no time left"
        context.result("choose_attention", "left out", f"{reason}; run choose_attention.py --write")
        return
    import choose_attention

    # A copy: the stage that follows runs the code as it is committed.
    table = shutil.copy(TABLE, context.out / "attention_measured.py")
    code = choose_attention.main(["--write", f"--table={table}", f"--seconds={context.seconds_left() - 5:.1f}"])
    word = "written" if code == 0 else "backends give different results"
    context.result("choose_attention", word, f"copy it to {TABLE.relative_to(ROOT)}")
