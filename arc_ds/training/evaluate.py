"""Evaluation during training: answers of the current weights to a small set of questions, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arc_ds.batch.segments import Marker
from arc_ds.config.schema import RunConfig
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.tasks.chat import Layout
from arc_ds.errors import ArcError
from arc_ds.evaluation.config import EvalConfig, load_eval_config
from arc_ds.evaluation.plan import EvalPlan, LoadedTask, load_task, make_plan
from arc_ds.evaluation.results import Prediction, data_digest
from arc_ds.evaluation.runner import answer_batch
from arc_ds.evaluation.scoring import by_task, seed_scores, task_stats
from arc_ds.evaluation.systems.decoder_system import ArcSystem
from arc_ds.evaluation.systems.kind import SystemSettings
from arc_ds.inference.arc import ArcModel
from arc_ds.inference.decoder_files import find_max_positions, find_stop_ids
from arc_ds.inference.reader import DecoderReader
from arc_ds.system import dist
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from arc_ds.training.build_model import tokenizer_path
from arc_ds.training.lockstep import Lockstep

if TYPE_CHECKING:
    from arc_ds.training.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates the run's model, once for each trained decoder. The tasks are read at the start of the run.

    config: of the evaluation. Its systems, output, device and dtype are not used.
    tasks: its tasks.
    encoder_tokenizer: of the encoder.
    readers: for each trained decoder, the fields of its `DecoderReader` that its files give.
    layouts: the turns of each trained decoder's chat.
    max_context_tokens: longest context in training.
    chunk_tokens: see `ArcSystem`; the largest chunk of a source of long contexts, if there is one.
    """

    config: EvalConfig
    tasks: Sequence[LoadedTask]
    encoder_tokenizer: Tokenizer
    readers: Sequence[Mapping[str, Any]]
    layouts: Sequence[Layout]
    max_context_tokens: int
    chunk_tokens: int | None

    @property
    def fingerprint(self) -> str:
        """Digest of the config and of all samples; must be equal on all ranks."""
        lines = [(task.config.name, [repr((task.config, task.samples, task.examples))]) for task in self.tasks]
        return data_digest([*lines, ("protocol", [repr((self.config.protocol, self.config.seed))])])

    def run(self, run: Run, before_pass: Callable[[], bool]) -> dict[str, float]:
        """The metrics by name: `eval/TASK/METRIC`, or `eval/DECODER/TASK/METRIC` with several decoders. Collective.

        The batches do not depend on the number of ranks. All ranks return the same metrics.

        before_pass: see `Lockstep`.

        Raises EvaluationStopped on all ranks if one received a stop request, and an ArcError of one rank on all.
        """
        predictions: list[Prediction] = []
        error: ArcError | None = None
        with_turns = Lockstep(
            run.engine.module,
            run.spec.packing,
            [decoder.module for decoder in run.decoders],
            partitioned=[decoder.engine is not None for decoder in run.decoders],
            device=run.device,
            before_pass=before_pass,
        )
        try:
            with with_turns as turns:
                predictions += self._answer(run, turns)
        except ArcError as caught:
            error = caught
        dist.raise_together(error)
        together = [each for theirs in dist.gather_objects(predictions) for each in theirs]
        return dict(self._metrics(run, together))

    def _answer(self, run: Run, turns: Lockstep) -> Iterator[Prediction]:
        """The predictions of this rank."""
        readers = [
            DecoderReader(decoder=decoder, name=name, **fields)
            for decoder, name, fields in zip(turns.decoders, run.decoder_names, self.readers, strict=True)
        ]
        model = ArcModel(
            run.spec,
            turns.compressor,
            readers,
            encoder_tokenizer=self.encoder_tokenizer,
            max_context_tokens=self.max_context_tokens,
        )
        marker: Marker | None = "cont" if "cont" in run.spec.markers else None
        options: dict[str, Any] = {"marker": marker, "chunk_tokens": self.chunk_tokens}
        systems = {
            name: ArcSystem(name, model, self._settings(run, name), decoder_idx=idx, layout=layout, **options)
            for idx, (name, layout) in enumerate(zip(run.decoder_names, self.layouts, strict=True))
        }
        plan = self._plan(list(systems.values()))
        for idx in range(len(readers)):
            if run.spec.adapters_of(idx) is not None:
                model.compress([[0]], idx, marker)  # brings the current adapters, for prompts without a document
        for batch in plan.batches[dist.rank() :: dist.world_size()]:
            yield from answer_batch(
                systems[batch.system], batch, decoder=batch.system, nll=self.config.nll, seed=self.config.seed
            )

    def _plan(self, systems: Sequence[ArcSystem]) -> EvalPlan:
        config = self.config
        plan = make_plan(
            systems,
            self.tasks,
            config.protocol.protocol,
            arc_names=[system.name for system in systems],
            seed=config.seed,
            max_batch_rows=config.max_batch_rows,
        )
        for system, tasks in plan.too_long.items():
            for task, ids in tasks.items():
                logger.warning("evaluation, %s, %s: %d samples are too long and left out", system, task, len(ids))
        return plan

    def _settings(self, run: Run, name: str) -> SystemSettings:
        protocol = self.config.protocol.protocol
        dtype = next(run.decoders[0].module.parameters()).dtype
        return SystemSettings(name=name, protocol=protocol, seed=self.config.seed, device=run.device, dtype=dtype)

    def _metrics(self, run: Run, predictions: Sequence[Prediction]) -> Iterator[tuple[str, float]]:
        for name in run.decoder_names:
            prefix = f"eval/{name}" if len(run.decoder_names) > 1 else "eval"
            for task, own in by_task(each for each in predictions if each.system == name).items():
                stats = task_stats([own], bleu_lowercase=self.config.protocol.protocol.bleu_lowercase)
                for metric in stats.by_metric:
                    yield f"{prefix}/{task}/{metric}", float(seed_scores(stats, metric)[0])
                yield f"{prefix}/{task}/num_samples", float(len(own))


def open_evaluator(config: RunConfig, readers: Sequence[ReaderFiles]) -> Evaluator | None:
    """Read the evaluation of a run; None if its config has none. Raises ConfigError or DataError.

    readers: tokenizer and chat template of each trained decoder.
    """
    if config.evaluation is None:
        return None
    wanted = load_eval_config(config.evaluation.config, needs_systems=False)
    opened, layouts = [], []
    for decoder, files in zip(config.trained_decoders.values(), readers, strict=True):
        path, (tokenizer, layout) = Path(decoder.backbone), files.load()
        layouts.append(layout)
        ends = {"stop_ids": find_stop_ids(path, tokenizer), "max_positions": find_max_positions(path)}
        opened.append({"tokenizer": tokenizer, "bos": config.data.decoder_bos, **ends})
    return Evaluator(
        config=wanted,
        tasks=[load_task(task, wanted.protocol.protocol) for task in wanted.tasks],
        encoder_tokenizer=load_tokenizer(tokenizer_path(config.encoder)),
        readers=opened,
        layouts=layouts,
        max_context_tokens=config.data.max_context_tokens,
        chunk_tokens=max(
            (each.chunk_tokens for each in config.data.sources if each.task == "long_context"), default=None
        ),
    )
