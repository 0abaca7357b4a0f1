"""Build the data of a run from its config: sources, this rank's steps and held-out examples."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from arc_ds.batch.packing import PoolingSpec
from arc_ds.config.schema import RunConfig, SourceConfig
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.loading.estimates import WorkRates
from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.micro_batches import MicroBatchLimits
from arc_ds.data.loading.source import Source
from arc_ds.data.loading.validation_set import validation_examples
from arc_ds.data.order.order import RunOrder
from arc_ds.data.tasks import Example
from arc_ds.planning.sizes import task_limits
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import open_cache
from arc_ds.system import dist
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from arc_ds.training.build_model import encoder_tokenizer_path

logger = logging.getLogger(__name__)


def step_data(
    config: RunConfig, packing: PoolingSpec, readers: Sequence[ReaderFiles], rates: Sequence[WorkRates]
) -> StepData:
    """This rank's view of the run's data. Raises DataError for unusable shards and ConfigError for unusable values.

    readers: tokenizer and chat template of each decoder.
    rates: work per sample with each decoder; used to distribute samples evenly over ranks.
    """
    sources = [_open_source(config, source) for source in config.data.sources]
    tokenizer_path = encoder_tokenizer_path(config.encoder)
    _warn_of_other_cuts(load_tokenizer(tokenizer_path), sources)
    share = config.data.reconstruction_share
    order = RunOrder(
        seed=config.seed,
        batch_size=config.data.batch_size,
        sources=tuple(source.shape for source in sources),
        reconstruction_share=((0, share),) if isinstance(share, float | int) else share,
        num_decoders=len(readers),
        decoder_schedule=config.decoder_schedule,
    )
    return StepData(
        order=order,
        sources=sources,
        encoder_tokenizer=tokenizer_path,
        readers=readers,
        pooling=packing,
        rates=rates,
        limits=MicroBatchLimits(
            max_encoder_tokens=config.data.max_encoder_tokens, max_decoder_rows=config.data.max_decoder_rows
        ),
        rank=dist.rank(),
        world_size=dist.world_size(),
        micro_batches=config.micro_batches,
        on_error=config.data.on_error,
    )


def held_out_examples(config: RunConfig, readers: Sequence[ReaderFiles]) -> tuple[tuple[Example, ...], ...]:
    """The held-out examples for each decoder. The config must name held-out shards."""
    return validation_examples(
        [_open_source(config, source) for source in config.data.held_out],
        config.validation.num_samples,
        encoder=load_tokenizer(encoder_tokenizer_path(config.encoder)),
        readers=[files.load() for files in readers],
        on_error=config.data.on_error,
    )


def _open_source(config: RunConfig, wanted: SourceConfig) -> Source:
    return Source(
        shards=ShardSet(wanted.path, cache=open_cache(config.data.cache_dir, config.data.cache_gib)),
        weight=wanted.weight,
        task=wanted.task,
        in_context_examples=wanted.in_context_examples,
        limits=task_limits(config, wanted),
    )


def _warn_of_other_cuts(tokenizer: Tokenizer, sources: Sequence[Source]) -> None:
    """Warn about shards cut with another tokenizer: they work, but their lengths are only estimates of the work."""
    for source in sources:
        if source.shards.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
            logger.warning(
                "the shards in %s were cut with another tokenizer than the encoder's: records may exceed the sequence "
                "length, and work is balanced less evenly. Rebuild them with the encoder's tokenizer: arc-ds shards "
                "build --tokenizer.",
                source.shards.name,
            )
