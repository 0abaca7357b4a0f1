"""The steps of a run as a dataset: from the number of a step to this rank's packed micro-batches.

A step's batch follows from its number alone. So any number of workers gives the same batches, a run can resume at any
step, and there is no state to save.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from arc_ds.batch.packing import PoolingSpec
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.loading.estimates import Estimate, WorkRates, estimated_size
from arc_ds.data.loading.fetch_ahead import FetchAhead
from arc_ds.data.loading.micro_batches import MicroBatchLimits, pack_share, planned_splits, sample_sizes
from arc_ds.data.loading.sample_maker import OnError, PositionSamples, SampleMaker
from arc_ds.data.loading.source import Source
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.data.order.dealing import deal
from arc_ds.data.order.order import Pick, RunOrder
from arc_ds.data.tasks import NO_COUNTS

logger = logging.getLogger(__name__)

# One rank's share of a step: places in the global batch, in parts of equal size.
Parts = tuple[tuple[int, ...], ...]


class StepData(Dataset[StepBatch]):
    """A map-style dataset over the steps of a run, for one rank. The first step loads the tokenizers.

    order: order of the run, for these sources in this sequence.
    sources: the mixture.
    encoder_tokenizer: file or folder.
    readers: tokenizer and layout of each decoder.
    pooling: the encoder's pooling.
    rates: work rates of each decoder; samples are dealt to ranks by them.
    limits: of one micro-batch.
    rank, world_size: this rank, and the number of ranks.
    micro_batches: parts of this rank's share; limits may split them further.
    on_error: see `SampleMaker`.
    """

    def __init__(
        self,
        *,
        order: RunOrder,
        sources: Sequence[Source],
        encoder_tokenizer: str | Path,
        readers: Sequence[ReaderFiles],
        pooling: PoolingSpec,
        rates: Sequence[WorkRates] = (),
        limits: MicroBatchLimits | None = None,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        on_error: OnError = "stop",
    ) -> None:
        """Raises ConfigError if ranks × micro_batches does not divide the batch."""
        deal([0.0] * order.batch_size, world_size * micro_batches)
        self.order = order
        self.sources = tuple(sources)
        self.pooling = pooling
        self.limits = limits or MicroBatchLimits()
        self.rank = rank
        self.world_size = world_size
        self.micro_batches = micro_batches
        self._rates = tuple(rates) or (WorkRates(),) * order.num_decoders
        self._estimators = tuple(source.estimator(pooling) for source in sources)
        self._fetch_ahead = FetchAhead(order, sources)
        self._maker = SampleMaker(sources, encoder_tokenizer=encoder_tokenizer, readers=readers, on_error=on_error)
        self._has_warned = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the run's kinds of sample, in the order of its sources."""
        return tuple(dict.fromkeys(name for source in self.sources for name in source.tasks))

    def __getitem__(self, step: int) -> StepBatch:
        """This rank's share of a step. Raises DataError if a record cannot be used and `on_error` is "stop"."""
        self._fetch_ahead.at(step)
        picks = self.order.batch(step)
        decoder_idxs = self.order.decoders(step)
        shares, num_splits = self._shares(picks, decoder_idxs)
        made = [self._maker.make([picks[place] for place in part], decoder_idxs) for part in shares[self.rank]]
        share = tuple(tuple(item.samples for item in part) for part in made)
        everything = [item for part in made for item in part]
        return StepBatch(
            step=step,
            decoder_idxs=decoder_idxs,
            micro_batches=pack_share(share, decoder_idxs, self.pooling, self.limits, at_least=num_splits),
            skipped=sum(item.skipped for item in everything),
            over_limit=self._over_limit(everything),
            counts=sum((item.counts for item in everything), start=NO_COUNTS),
            record_ids=tuple(item.record_id for item in everything),
            share=share if self.limits.any else None,
        )

    def _shares(self, picks: Sequence[Pick], decoder_idxs: Sequence[int]) -> tuple[tuple[Parts, ...], int]:
        """The share of each rank, and the number of micro-batches per rank and decoder."""
        estimates = [self._estimate(pick) for pick in picks]
        rates = [self._rates[decoder_idx] for decoder_idx in decoder_idxs]
        work = [sum(each.work(estimate) for each in rates) for estimate in estimates]
        bins = deal(work, self.world_size * self.micro_batches)
        shares = tuple(bins[first : first + self.micro_batches] for first in range(0, len(bins), self.micro_batches))
        if not self.limits.any:
            return shares, self.micro_batches
        sizes = [estimated_size(estimate, self.pooling) for estimate in estimates]
        of_shares = [[[sizes[place] for place in part] for part in share] for share in shares]
        return shares, planned_splits(of_shares, self.limits)

    def _estimate(self, pick: Pick) -> Estimate:
        tokens = self.sources[pick.source_idx].tokens((pick.record_idx, *pick.example_idxs))
        return self._estimators[pick.source_idx].estimate(pick.task, tokens)

    def _over_limit(self, made: Sequence[PositionSamples]) -> int:
        """How many samples exceed a limit by themselves. The log names the first one."""
        if not self.limits.any:
            return 0
        samples = [(item.record_id, sample) for item in made for sample in item.samples]
        sizes = sample_sizes([sample for _, sample in samples], self.pooling)
        over = [place for place, size in enumerate(sizes) if not self.limits.allow(*size)]
        if over and not self._has_warned:
            self._has_warned = True
            source_idx, record_idx = samples[over[0]][0]
            logger.warning(
                "%s, record %d: its sample has %d encoder tokens and %d decoder rows, more than a micro-batch may have "
                "(data.max_encoder_tokens: %s, data.max_decoder_rows: %s). It is still trained on, in a micro-batch of "
                "its own; others like it are only counted (data/over_limit). If memory runs out, lower the data "
                "section's sizes (data.max_…_tokens, data.max_chunks).",
                *(self.sources[source_idx].shards.name, record_idx, *sizes[over[0]]),
                *(self.limits.max_encoder_tokens, self.limits.max_decoder_rows),
            )
        return len(over)
