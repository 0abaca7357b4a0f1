"""Reports steps with a non-finite loss or gradient, or with a spike. The step itself skips the update on all ranks."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.errors import NonFiniteError
from arc_ds.system import dist
from arc_ds.system.files import output, write_whole
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.step import StepResult

logger = logging.getLogger(__name__)

# Number of records that the error names; the dump file has all of them.
_NAMED_RECORDS = 8


@dataclass(kw_only=True)
class NonFiniteHook(Hook):
    """Writes the records of skipped steps to a file, and ends the run after too many skipped steps in a row.

    RUN/non_finite_step_NNNNNN.json, or RUN/spike_step_NNNNNN.json, lists the records that each rank read in that step.
    """

    priority = 20
    max_skipped_steps: int

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Raise NonFiniteError on all ranks after more than `optimizer.max_skipped_steps` skipped steps in a row."""
        if result.applied:
            return
        batches = dist.gather_objects(batch.record_ids)
        kind, fault = ("spike", "a spike") if result.is_spike else ("non_finite", "not finite")
        path = run.folder / f"{kind}_step_{run.step:06d}.json"
        with dist.fail_together(), output(path):
            if dist.is_main():
                write_whole(path, json.dumps(_dump(run, result, batches), indent=1) + "\n")
                logger.warning("step %d skipped: loss or gradient is %s; its records are in %s", run.step, fault, path)
        limit = self.max_skipped_steps
        if run.skipped_in_row > limit:
            with run.pause():
                raise NonFiniteError(
                    f"{run.skipped_in_row} steps in a row, up to step {run.step}, had a non-finite loss or gradient"
                    f"{'' if run.spikes is None else ', or a spike (optimizer.skip_spikes)'}; the limit is "
                    f"optimizer.max_skipped_steps = {limit}. The last batch contained {_named(batches)} "
                    f"(full list in {path}). Inspect these records, lower the learning rates, or restart from an "
                    "earlier checkpoint."
                )


def _dump(run: Run, result: StepResult, batches: list[tuple[tuple[int, int], ...]]) -> dict[str, Any]:
    return {
        "step": run.step,
        "decoders": [run.decoder_names[idx] for idx in result.decoder_idxs],
        "loss": float(result.loss),
        "grad_norm": float(result.grad_norm),
        "sources": [source.shards.name for source in run.data.sources],
        "ranks": [
            {"rank": rank, "records": [{"source": source, "record": record} for source, record in records]}
            for rank, records in enumerate(batches)
        ],
    }


def _named(batches: list[tuple[tuple[int, int], ...]]) -> str:
    """The first records of a batch, as source:record."""
    records = [f"{source}:{record}" for rank in batches for source, record in rank]
    rest = len(records) - _NAMED_RECORDS
    more = f" and {rest} more" if rest > 0 else ""
    return f"the records (source:record) {', '.join(records[:_NAMED_RECORDS])}{more}"
