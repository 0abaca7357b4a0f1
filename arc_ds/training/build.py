"""Build a `Run` from a config. All user mistakes are detected here, before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arc_ds.checkpoints.weight_digests import weight_digests
from arc_ds.config.deepspeed import resolve_decoder_deepspeed, resolve_deepspeed
from arc_ds.config.load import common, differences
from arc_ds.config.schema import RunConfig
from arc_ds.data.loading.loader import StepData
from arc_ds.data.tasks import closed, mismatched, open_
from arc_ds.errors import ConfigError
from arc_ds.model.spec import CompressorSpec
from arc_ds.planning.flops import work_rates
from arc_ds.system import dist
from arc_ds.system.device import free_memory_bytes
from arc_ds.tokenizers import ids_digest, load_tokenizer
from arc_ds.training.build_data import held_out_examples, micro_batch_limits, step_data
from arc_ds.training.build_model import (
    DecoderWeights,
    StartingWeights,
    check_tokenizers,
    compressor_spec,
    decoder_tokenizer_paths,
    open_decoders,
    open_starting_weights,
    starting_compressor,
)
from arc_ds.training.engine import PlacedDecoder, build_engine, choose_placement, partitioned, place_decoder
from arc_ds.training.optim import PortAdamW, make_param_groups
from arc_ds.training.run import Run
from arc_ds.training.schedule import RateSchedule
from arc_ds.training.validate import ValidationSet, Validator


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """The parts of a run, opened and checked. The weights themselves are not read yet.

    tokenizers: fingerprints (see `check_tokenizers`).
    backbones: digests (see `weight_digests`).
    """

    ds_config: dict[str, Any]
    spec: CompressorSpec
    tokenizers: dict[str, str]
    backbones: dict[str, str]
    data: StepData
    validator: Validator | None
    weights: StartingWeights
    decoders: tuple[DecoderWeights, ...]


def read_parts(config: RunConfig, device: torch.device) -> RunParts:
    """Open everything that the config names. Collective. If one rank finds a mistake, all ranks raise ArcError."""
    _check_same_config(config)
    local_world_size = _common_local_world_size()
    with dist.fail_together():
        ds_config = resolve_deepspeed(config.deepspeed, config, dist.world_size(), local_world_size)
        spec = compressor_spec(config)
        tokenizers = check_tokenizers(config, spec)
        decoders = open_decoders(config)
        rates = [
            work_rates(
                spec,
                weights.shape.config,
                trained_layers=config.encoder.trained_layers,
                train_embeddings=config.encoder.train_embeddings,
            )
            for weights in decoders
        ]
        parts = RunParts(
            ds_config=ds_config,
            spec=spec,
            tokenizers=tokenizers,
            backbones=weight_digests(config, spec.backbone, [weights.shape.config for weights in decoders]),
            data=step_data(config, spec.packing, rates),
            validator=_validator(config, spec, device),
            weights=open_starting_weights(config, spec),
            decoders=decoders,
        )
    _check_same_files(parts)
    return parts


def build_run(config: RunConfig, device: torch.device) -> Run:
    """Build the run on this rank. Collective. If one rank finds a mistake, all ranks raise ArcError."""
    parts = read_parts(config, device)
    compressor = starting_compressor(config, parts.spec, parts.weights, partitioned(parts.ds_config))
    optimizer = PortAdamW(
        make_param_groups(
            compressor,
            encoder_lr=config.optimizer.encoder_lr,
            bridge_lr=config.optimizer.bridge_lr,
            markers_lr=config.optimizer.markers_lr,
            weight_decay=config.optimizer.weight_decay,
        ),
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=device.type != "cpu",
    )
    engine = build_engine(compressor, optimizer, parts.ds_config)
    return Run(
        config=config,
        folder=Path(config.run_dir),
        device=device,
        spec=parts.spec,
        tokenizers=parts.tokenizers,
        decoder_ids=tuple(ids_digest(load_tokenizer(path)) for path in decoder_tokenizer_paths(config)),
        backbones=parts.backbones,
        engine=engine,
        ds_config=parts.ds_config,
        decoders=_place(config, parts.decoders, device, parts.ds_config),
        data=parts.data,
        schedule=rate_schedule(config),
        validator=parts.validator,
        tasks=parts.data.tasks,
    )


def rate_schedule(config: RunConfig) -> RateSchedule:
    """The learning rate schedule of the run."""
    return RateSchedule(
        total_steps=config.steps,
        warmup_steps=config.optimizer.warmup_steps,
        initial_lr=config.optimizer.initial_lr,
        final_lr=config.optimizer.final_lr,
        kind=config.optimizer.schedule,
    )


def _validator(config: RunConfig, spec: CompressorSpec, device: torch.device) -> Validator | None:
    if not config.data.held_out:
        return None
    sets = [
        ValidationSet(
            compressed=tuple(example.sample for example in examples),
            mismatched=mismatched(examples),
            closed=tuple(closed(example) for example in examples),
            open=tuple(open_(example) for example in examples),
        )
        for examples in held_out_examples(config)
    ]
    return Validator(
        sets,
        decoder_names=[decoder.name for decoder in config.decoders],
        packing=spec.packing,
        batch_size=config.validation.batch_size,
        limits=micro_batch_limits(config),
        device=device,
    )


def _place(
    config: RunConfig, decoders: Sequence[DecoderWeights], device: torch.device, ds_config: dict[str, Any]
) -> tuple[PlacedDecoder, ...]:
    """Place the frozen decoders as configured, one after another."""
    placed = []
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    local_world_size = _common_local_world_size()
    for weights, wanted in zip(decoders, config.decoders, strict=True):
        placement = choose_placement(
            wanted.placement,
            decoder_bytes=weights.num_parameters * dtype.itemsize,
            free_bytes=free_memory_bytes(device),
            world_size=dist.world_size(),
            local_world_size=local_world_size,
        )
        placement = dist.broadcast_object(placement)
        if placement == "replicated":
            with dist.fail_together():
                decoder = weights.load(device, dtype)
            placed.append(place_decoder(decoder, placement, device=device))
        else:
            own_config = resolve_decoder_deepspeed(ds_config, placement, local_world_size)
            decoder = weights.load(device, dtype, partitioned(own_config))
            placed.append(place_decoder(decoder, placement, device=device, ds_config=own_config))
    return tuple(placed)


def _common_local_world_size() -> int:
    """Number of ranks per host, or 1 if hosts differ (groups within hosts must have equal sizes). Collective."""
    sizes = set(dist.gather_objects(dist.local_world_size()))
    return sizes.pop() if len(sizes) == 1 else 1


def _check_same_config(config: RunConfig) -> None:
    """Raise ConfigError if ranks have different configs. Collective.

    Such ranks would deadlock or silently train different models. Paths may differ between hosts.
    """
    told = dist.gather_objects(common(config))
    other = next((rank for rank, config_there in enumerate(told) if config_there != told[0]), None)
    if other is not None:
        changed = differences(told[0], told[other])
        raise ConfigError(
            f"rank {other} (here) has another config than rank 0 (there): {'; '.join(changed[:8])}. Start every host "
            "with the same command and config."
        )


def _check_same_files(parts: RunParts) -> None:
    """Raise ConfigError if hosts found different files at the config's paths. Collective."""
    found = {
        "deepspeed": parts.ds_config,
        "backbones": parts.backbones,
        "tokenizers": parts.tokenizers,
        "shards": parts.data.order.fingerprint,
        # Not part of the fingerprint, but they determine how samples are distributed to ranks.
        "passage counts in the shards' manifests": [s.shards.manifest.passage_tokens for s in parts.data.sources],
        "held-out shards": None if parts.validator is None else parts.validator.fingerprint,
    }
    different = [name for name, value in found.items() if not dist.all_ranks_agree(value)]
    if different:
        raise ConfigError(f"ranks found different {', '.join(different)}. Provide the same files on every host.")
