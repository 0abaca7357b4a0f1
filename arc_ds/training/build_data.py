"""Build the data of a run from its config: sources, this rank's steps, and the validator."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from arc_ds.batch.packing import PoolingSpec
from arc_ds.config.schema import RunConfig, SourceConfig
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.loading.estimates import WorkRates
from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.micro_batches import MicroBatchLimits
from arc_ds.data.loading.source import Source
from arc_ds.data.loading.validation_set import validation_examples
from arc_ds.data.order.order import RunOrder
from arc_ds.data.tasks import closed, mismatched, open_
from arc_ds.planning.sizes import task_limits
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import open_cache
from arc_ds.system import dist
from arc_ds.tokenizers import load_tokenizer
from arc_ds.training.build_model import tokenizer_path
from arc_ds.training.validate import ValidationSet, Validator

logger = logging.getLogger(__name__)


def step_data(
    config: RunConfig, packing: PoolingSpec, readers: Sequence[ReaderFiles], rates: Sequence[WorkRates]
) -> StepData:
    """This rank's view of the run's data. Raises DataError for unusable shards and ConfigError for unusable values.

    readers: tokenizer and chat template of each decoder.
    rates: work per sample with each decoder; used to distribute samples evenly over ranks.
    """
    sources = [_open_source(config, source) for source in config.data.sources]
    encoder_tokenizer = tokenizer_path(config.encoder)
    fingerprint = load_tokenizer(encoder_tokenizer).fingerprint
    for source in sources:
        if source.shards.manifest.tokenizer_fingerprint != fingerprint:
            logger.warning(
                "the shards in %s were cut with another tokenizer than the encoder's: records may exceed the sequence "
                "length, and work is balanced less evenly. Rebuild them with the encoder's tokenizer: arc-ds shards "
                "build --tokenizer.",
                source.shards.name,
            )
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
        encoder_tokenizer=encoder_tokenizer,
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


def open_validator(
    config: RunConfig, data: StepData, readers: Sequence[ReaderFiles], device: torch.device
) -> Validator | None:
    """The validator of the run's held-out shards; None if the config names none."""
    if not config.data.held_out:
        return None
    held_out = validation_examples(
        [_open_source(config, source) for source in config.data.held_out],
        config.validation.num_samples,
        encoder=load_tokenizer(tokenizer_path(config.encoder)),
        readers=[files.load() for files in readers],
        on_error=config.data.on_error,
    )
    sets = [
        ValidationSet(
            compressed=tuple(example.sample for example in examples),
            mismatched=mismatched(examples),
            closed=tuple(closed(example) for example in examples),
            open=tuple(open_(example) for example in examples),
        )
        for examples in held_out
    ]
    return Validator(
        sets=sets, packing=data.pooling, batch_size=config.validation.batch_size, limits=data.limits, device=device
    )


def _open_source(config: RunConfig, wanted: SourceConfig) -> Source:
    return Source(
        shards=ShardSet(wanted.path, cache=open_cache(config.data.cache_dir, config.data.cache_gib)),
        weight=wanted.weight,
        task=wanted.task,
        in_context_examples=wanted.in_context_examples,
        limits=task_limits(config, wanted),
    )
