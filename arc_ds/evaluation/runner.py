"""Run an evaluation on one or several ranks: answers, resume, progress and the merged result files.

Ranks need no collectives. All of them make the same plan, rank r takes batches r, r + W, …, and the file system holds
the finished ones (`parts.py`). Rank 0 waits for the batches of the others and merges them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from arc_ds.config.load import differences, flatten_tree
from arc_ds.errors import ConfigError, DataError, LostRankError, OutOfMemoryError, words_of
from arc_ds.evaluation.config import EvalConfig, as_tree
from arc_ds.evaluation.metrics import Answer as ScoredAnswer
from arc_ds.evaluation.metrics import metrics_of, sample_stats, score_of
from arc_ds.evaluation.parts import FinishedBatch, append, opened_part, part_path, part_paths, read_parts
from arc_ds.evaluation.plan import CUT, Batch, EvalPlan, LoadedTask, load_task, make_plan, prompt_sha
from arc_ds.evaluation.results import PREDICTIONS, RUN, TIMES, Prediction, data_digest, write_results
from arc_ds.evaluation.systems import KINDS
from arc_ds.evaluation.systems.kind import SystemSettings
from arc_ds.evaluation.systems.served import in_order_of_end, offers_nll
from arc_ds.evaluation.systems.system import AnswerNll, System
from arc_ds.system import dist
from arc_ds.system.device import select_device
from arc_ds.system.files import output, write_whole
from arc_ds.system.user_files import read_user_json
from arc_ds.version import __version__

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "numpy", "tokenizers", "sentencepiece", "tiktoken", "transformers", "bm25s")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_POLL_S = 0.2
_WORD_EVERY_S = 60.0
_MAX_SHOWN = 12


def run_evaluation(config: EvalConfig) -> Path:
    """Evaluate all systems on all tasks, as the rank given by the environment. Returns the folder of the results.

    Rank 0 returns when the results of all ranks are merged, the others when their own batches are done. A killed
    evaluation goes on with the finished batches at the next call, also with another number of ranks.

    Raises ConfigError if the folder holds an evaluation of another config or of other data, DataError if a task cannot
    be read, the systems' errors, and LostRankError if another rank makes no progress for `wait_s`.
    """
    folder, rank, num_ranks = Path(config.output), dist.rank(), dist.world_size()
    device = select_device(config.device, dist.local_rank())
    protocol = config.protocol.protocol
    tasks = [load_task(task, protocol) for task in config.tasks]
    systems = _build_systems(config, device)
    plan = make_plan(
        systems,
        tasks,
        protocol,
        arc_names={each.name for each in config.systems if each.kind == "arc"},
        seed=config.seed,
        max_batch_rows=config.max_batch_rows,
    )
    run = run_record(config, plan, systems, tasks, device)
    check_output(folder, run)
    with output(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RUN, json.dumps(run, indent=2, ensure_ascii=False) + "\n")  # that of all ranks
    if rank == 0:
        _report_plan(plan)
        if without := [system.name for system in systems if config.nll and not offers_nll(system)]:
            logger.warning("%s: their servers give no NLL of an answer, so it is left out", ", ".join(without))
    digest = run["plan_digest"]
    done = _finished(folder, digest)
    if (folder / PREDICTIONS).exists():  # asked after the parts were read, because a merge removes them last
        logger.info("%s: this evaluation is complete", folder)
        if rank == 0:
            _remove_parts(folder)
        return folder
    mine = [number for number in range(rank, len(plan.batches), num_ranks) if number not in done]
    if mine or rank == 0:
        with opened_part(folder, rank, num_ranks) as file:
            _answer(config, plan, systems, mine, file, run, Progress(len(done), [plan.batches[n] for n in mine]))
            if rank == 0:
                _wait_for_all(folder, plan, digest, num_ranks, config.wait_s)
                _merge(folder, plan, digest, run)
    return folder


def _build_systems(config: EvalConfig, device: torch.device) -> list[System]:
    shared: dict[str, Any] = {"protocol": config.protocol.protocol, "seed": config.seed, "device": device}
    return [
        KINDS[each.kind].build(each.section, SystemSettings(name=each.name, dtype=_DTYPES[config.dtype], **shared))
        for each in config.systems
    ]


def _answer(
    config: EvalConfig,
    plan: EvalPlan,
    systems: Sequence[System],
    numbers: Sequence[int],
    file: BinaryIO,
    run: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Answer the batches of this rank, by number, and append each to its part file."""
    by_name = {system.name: system for system in systems}

    def system_of(number: int) -> System:
        return by_name[plan.batches[number].system]

    def answer(number: int) -> tuple[Prediction, ...]:
        batch, system = plan.batches[number], system_of(number)
        decoder, nll = str(run["systems"][system.name].get("decoder", "")), config.nll and offers_nll(system)
        try:
            return answer_batch(system, batch, decoder=decoder, nll=nll, seed=config.seed)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise OutOfMemoryError(
                f"{system.name}, {batch.task}: a batch of {len(batch.prompts)} samples ({batch.rows:,} rows) exceeds "
                f"the memory: {words_of(error).rstrip('.')}. Lower max_batch_rows (now {config.max_batch_rows:,}) and "
                "give another output folder."
            ) from error

    started = time.perf_counter()
    with closing(in_order_of_end(numbers, system_of, lambda n: len(plan.batches[n].prompts), answer)) as answered:
        for number, predictions in answered:
            append(file, FinishedBatch(run["plan_digest"], number, time.perf_counter() - started, predictions))
            progress.add(plan.batches[number], predictions)
            started = time.perf_counter()
    progress.close()


def answer_batch(system: System, batch: Batch, *, decoder: str, nll: bool, seed: int) -> tuple[Prediction, ...]:
    """The predictions of a system for one batch.

    decoder: name of the decoder, for the record.
    nll: whether to compute the NLL of each sample's first reference. A reference without tokens has none.
    seed: of the evaluation.

    Raises DataError if an NLL is not finite.
    """
    prompts = [each.prompt for each in batch.prompts]
    answers = system.answer(prompts)
    nlls: Sequence[AnswerNll | None] = [None] * len(prompts)
    if nll:
        nlls = system.answer_nll(prompts, [prompt.sample.references[0] for prompt in prompts])
    predictions = []
    for planned, answer, found in zip(batch.prompts, answers, nlls, strict=True):
        sample = planned.prompt.sample
        if found is not None and not math.isfinite(found.nats):
            raise DataError(
                f"{system.name}, {sample.task}: the NLL of {sample.id} is {found.nats}. The weights are damaged, or "
                "values exceed float16: set dtype to bfloat16 or float32."
            )
        predictions.append(
            Prediction(
                id=sample.id,
                task=sample.task,
                prediction=answer.text,
                references=sample.references,
                cluster=sample.cluster,
                group=sample.group,
                system=system.name,
                decoder=decoder,
                index=planned.place,
                raw=answer.raw,
                stop=answer.stop,
                lengths={**answer.lengths, **({CUT: planned.num_cut} if planned.num_cut else {})},
                nll={"nats": found.nats, "tokens": found.tokens} if found is not None and found.tokens else None,
                prompt_sha=prompt_sha(planned.prompt),
                seed=seed,
                others={"question": sample.question},
            )
        )
    return tuple(predictions)


def run_record(
    config: EvalConfig, plan: EvalPlan, systems: Sequence[System], tasks: Sequence[LoadedTask], device: torch.device
) -> dict[str, Any]:
    """The content of `run.json`: everything that defines the predictions. All ranks make the same one."""
    described = {system.name: {**system.describe(), "device": device.type} for system in systems}
    versions = {"arc_ds": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    asked = {(batch.task, each.prompt.sample) for batch in plan.batches for each in batch.prompts}
    samples = {each.task.name: [(s.id, s.references) for task, s in asked if task == each.task.name] for each in tasks}
    run = {
        "config": as_tree(config),
        "protocol": dataclasses.asdict(config.protocol.protocol),
        "data_digest": {task: data_digest(of) for task, of in samples.items()},
        "systems": described,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": versions,
        **plan.summary(),
    }
    text = json.dumps(run, sort_keys=True, default=str)
    return {**json.loads(text), "plan_digest": data_digest([("run", [text])])}


def check_output(folder: Path, run: Mapping[str, Any]) -> None:
    """Raise ConfigError if the folder holds predictions of another config, of other data or of other versions."""
    path = folder / RUN
    if not path.exists():
        if (folder / PREDICTIONS).exists():
            raise ConfigError(f"{folder} holds {PREDICTIONS} without {RUN}. Give another output folder.")
        return
    before = read_user_json(path, DataError, remedy="Give another output folder, or delete this one.")
    if not isinstance(before, dict) or "plan_digest" not in before:
        raise ConfigError(f"{path} is not of `arc-ds eval run`. Give another output folder.")
    has_results = (folder / PREDICTIONS).exists() or any(found.plan for found in read_parts(folder))
    if before["plan_digest"] == run["plan_digest"] or not has_results:
        return
    there, here = ({k: v for k, v in flatten_tree(dict(each)).items() if k != "plan_digest"} for each in (before, run))
    changed = differences(there, here)
    shown = "\n  ".join(changed[:_MAX_SHOWN]) + (
        f"\n  and {len(changed) - _MAX_SHOWN} more" * (len(changed) > _MAX_SHOWN)
    )
    raise ConfigError(
        f"{folder} holds an evaluation that differs from this one:\n  {shown}\n"
        "Give another output folder (output=…), delete this one, or undo the change."
    )


def _report_plan(plan: EvalPlan) -> None:
    summary = plan.summary()
    for system, tasks in summary["samples"].items():
        for task, count in tasks.items():
            cut = summary["shortened"].get(system, {}).get(task, 0)
            words = f"; the documents of {cut} are shortened to the decoder's window" if cut else ""
            logger.info("%s, %s: %d samples%s", system, task, count, words)
    for system, by_task in plan.too_long.items():
        for task, ids in by_task.items():
            logger.warning("%s, %s: %d samples skipped: too long for the decoder's window", system, task, len(ids))


def _finished(folder: Path, digest: str) -> set[int]:
    """Numbers of the batches that are in part files. Raises DataError on a batch of another plan."""
    found = list(read_parts(folder))
    if any(each.plan != digest for each in found):
        raise DataError(f"{folder} holds part files of another evaluation. Delete them, or give another output folder.")
    return {each.batch for each in found}


def _wait_for_all(folder: Path, plan: EvalPlan, digest: str, num_ranks: int, wait_s: float) -> None:
    """Wait until all batches are in part files. Raises LostRankError if `wait_s` seconds bring no new one."""
    wanted = set(range(len(plan.batches)))
    sizes: dict[Path, int] = {}
    last = said = time.monotonic()
    while missing := wanted - _finished(folder, digest):
        time.sleep(time.monotonic() - last)  # as long as reading the parts took: they may be large
        while (now := {path: path.stat().st_size for path in part_paths(folder)}) == sizes:
            ranks = sorted({number % num_ranks for number in missing})
            words = (
                f"{len(missing)} of {len(wanted)} batches of rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            )
            if time.monotonic() - last > wait_s:
                files = ", ".join(part_path(folder, each).name for each in ranks)
                raise LostRankError(
                    f"{folder}: {words} are missing, and {files} did not grow for {wait_s:.0f} s. The finished batches "
                    "are kept: start the same command again. If one batch takes longer than this, raise wait_s."
                )
            if time.monotonic() - said > _WORD_EVERY_S:
                said = time.monotonic()
                logger.info("waiting for %s", words)
            time.sleep(_POLL_S)
        sizes, last = now, time.monotonic()


def _merge(folder: Path, plan: EvalPlan, digest: str, run: Mapping[str, Any]) -> None:
    """Write the result files and remove the part files. Raises DataError unless each planned id occurs exactly once."""
    finished = sorted(read_parts(folder), key=lambda each: each.batch)
    assert all(each.plan == digest for each in finished)
    predictions = [prediction for each in finished for prediction in each.predictions]
    planned = [(b.system, b.task, each.prompt.sample.id) for b in plan.batches for each in b.prompts]
    counts: dict[tuple[str, str, str], int] = dict.fromkeys(planned, 0)
    for each in predictions:
        key = (each.system, each.task, each.id)
        counts[key] = counts.get(key, 0) + 1 if key in counts else -1
    if wrong := ["/".join(key) for key, count in counts.items() if count != 1]:
        raise DataError(
            f"{folder}: {len(wrong)} samples do not occur exactly once in the part files: "
            f"{', '.join(wrong[:_MAX_SHOWN])}. Two evaluations have written the same folder. Delete it and start again."
        )
    times = [
        {"system": plan.batches[each.batch].system, "task": plan.batches[each.batch].task, "batch": each.batch,
         "samples": len(each.predictions), "rows": plan.batches[each.batch].rows, "seconds": each.seconds}
        for each in finished
    ]  # fmt: skip
    with output(folder):
        write_whole(folder / TIMES, json.dumps(times, indent=1) + "\n")
        write_results(folder, predictions, run)
        _remove_parts(folder)


def _remove_parts(folder: Path) -> None:
    for path in part_paths(folder):
        path.unlink(missing_ok=True)


class Progress:
    """A bar of this rank's decoder rows, with the time left and the running headline score. Rank 0 shows it.

    num_before: number of batches that an earlier start has finished.
    batches: of this rank.
    """

    def __init__(self, num_before: int, batches: Sequence[Batch]) -> None:
        if num_before:
            logger.info("an earlier start has finished %d batches", num_before)
        self._sums: dict[tuple[str, str], np.ndarray] = {}
        self._said = time.monotonic()
        self._bar = tqdm(
            desc="evaluate" if dist.world_size() == 1 else f"evaluate, rank 0 of {dist.world_size()}",
            total=sum(batch.rows for batch in batches),
            unit=" rows",
            unit_scale=True,
            disable=None if dist.is_main() else True,
        )

    def add(self, batch: Batch, predictions: Sequence[Prediction]) -> None:
        """Count a finished batch."""
        metric = metrics_of(batch.task)[0]
        for each in predictions:
            answer = ScoredAnswer(each.task, each.prediction, each.references, each.nll)
            stats = np.asarray(sample_stats(metric, answer), dtype=np.float64)
            key = (batch.system, batch.task)
            self._sums[key] = self._sums.get(key, 0) + stats
        self._bar.update(batch.rows)
        words = (
            f"{batch.system} {batch.task} {metric} {float(score_of(metric, self._sums[batch.system, batch.task])):.1f}"
        )
        self._bar.set_postfix_str(words)
        if self._bar.disable and time.monotonic() - self._said > _WORD_EVERY_S:
            self._said = time.monotonic()
            logger.info("%s so far", words)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
