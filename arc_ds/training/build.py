"""Build a `Run` from a config. All user mistakes are detected here, before training starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arc_ds.checkpoints.weight_digests import weight_digests
from arc_ds.config.deepspeed import resolve_decoder_deepspeed, resolve_deepspeed
from arc_ds.config.load import common, flatten_tree
from arc_ds.config.schema import OptimizerConfig, RunConfig
from arc_ds.data.loading.loader import StepData
from arc_ds.data.tasks.task import NO_CHAT
from arc_ds.model.compressor import connect_adapters
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.transformers_decoder import check_length
from arc_ds.planning.flops import work_rates
from arc_ds.planning.sizes import longest_sequence
from arc_ds.system import dist
from arc_ds.system.device import free_memory_bytes
from arc_ds.tokenizers import check_fits, load_tokenizer
from arc_ds.training.build_data import open_validator, step_data
from arc_ds.training.build_model import (
    DecoderFiles,
    StartingWeights,
    compressor_spec,
    open_decoders,
    open_starting_weights,
    starting_compressor,
    tokenizer_path,
)
from arc_ds.training.engine import PlacedDecoder, build_engine, choose_placement, partitioned, place_decoder
from arc_ds.training.evaluate import Evaluator, open_evaluator
from arc_ds.training.optim import PortAdamW, make_param_groups
from arc_ds.training.ports import saved_ports, warn_of_ports
from arc_ds.training.run import InputDigests, Run
from arc_ds.training.same_on_ranks import check_same, software
from arc_ds.training.schedule import RateSchedule
from arc_ds.training.validate import Validator


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """The parts of a run, opened and checked. The weights themselves are not read yet.

    local_world_size: ranks per host, or 1 if hosts differ (groups within hosts must have equal sizes).
    """

    local_world_size: int
    ds_config: dict[str, Any]
    spec: CompressorSpec
    inputs: InputDigests
    data: StepData
    validator: Validator | None
    evaluator: Evaluator | None
    weights: StartingWeights
    decoders: tuple[DecoderFiles, ...]


def read_parts(config: RunConfig, device: torch.device) -> RunParts:
    """Open everything that the config names. Collective. If one rank finds a mistake, all ranks raise ArcError."""
    check_same(software(), "Install the same versions and set the same variables on every host.")
    check_same(common(config), "Start every host with the same command and config.")
    local_sizes = set(dist.gather_objects(dist.local_world_size()))
    local_world_size = local_sizes.pop() if len(local_sizes) == 1 else 1
    with dist.fail_together():
        encoder = config.encoder
        ds_config = resolve_deepspeed(config.deepspeed, config, dist.world_size(), local_world_size)
        spec = compressor_spec(config)
        tokenizer = load_tokenizer(tokenizer_path(encoder))
        check_fits(tokenizer, spec.backbone.vocab_size, encoder.backbone)
        decoders = open_decoders(config.trained_decoders, bos=config.data.decoder_bos)
        sizes = [decoder.weights.sizes for decoder in decoders]
        for each in sizes:
            check_length(each, longest_sequence(config, NO_CHAT))
        readers = [decoder.reader for decoder in decoders]
        rates = [work_rates(spec, each, encoder.trained_parts, idx) for idx, each in enumerate(sizes)]
        data = step_data(config, spec.packing, readers, rates)
        opened = zip(config.trained_decoders, decoders, strict=True)
        backbones = {idx: (decoder.weights.files, decoder.weights.sizes) for idx, decoder in opened}
        inputs = InputDigests(
            data=data.order.fingerprint,
            tokenizers={"encoder": tokenizer.fingerprint} | {k: v for d in decoders for k, v in d.fingerprints.items()},
            backbones=weight_digests(encoder, spec.backbone, backbones),
        )
        parts = RunParts(
            local_world_size=local_world_size,
            ds_config=ds_config,
            spec=spec,
            inputs=inputs,
            data=data,
            validator=open_validator(config, data, readers, device),
            evaluator=open_evaluator(config, readers),
            weights=open_starting_weights(config, spec),
            decoders=decoders,
        )
    _check_same_files(parts)
    return parts


def build_run(config: RunConfig, device: torch.device) -> Run:
    """Build the run on this rank. Collective. If one rank finds a mistake, all ranks raise ArcError."""
    parts = read_parts(config, device)
    compressor = starting_compressor(config, parts.spec, parts.weights, partitioned(parts.ds_config))
    records = [decoder.record for decoder in parts.decoders]
    with dist.fail_together():
        ports = saved_ports(records, parts.spec, parts.weights.plan, parts.weights.folder)
    is_encoder_trained = any(param.requires_grad for param in compressor.encoder.parameters())
    trains_encoder = is_encoder_trained and config.optimizer.encoder_lr > 0
    warn_of_ports(config, records, parts.weights.plan, parts.weights.folder, trains_encoder=trains_encoder)
    optimizer = PortAdamW(
        make_param_groups(compressor, config.optimizer),
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=device.type != "cpu",
    )
    engine = build_engine(compressor, optimizer, parts.ds_config)
    placed = _place(parts, device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    connect_adapters(engine.module.ports, [decoder.module for decoder in placed])
    return Run(
        folder=Path(config.run_dir),
        device=device,
        spec=parts.spec,
        inputs=parts.inputs,
        ports=ports,
        engine=engine,
        ds_config=parts.ds_config,
        decoders=placed,
        decoder_names=tuple(decoder.name for decoder in config.trained_decoders.values()),
        data=parts.data,
        num_workers=config.data.num_workers,
        schedule=rate_schedule(config.optimizer, config.steps),
        normalize=config.loss.normalize,
        validator=parts.validator,
        evaluator=parts.evaluator,
    )


def rate_schedule(optimizer: OptimizerConfig, total_steps: int) -> RateSchedule:
    """The learning rate schedule of the run."""
    return RateSchedule(
        total_steps=total_steps,
        warmup_steps=optimizer.warmup_steps,
        initial_lr=optimizer.initial_lr,
        final_lr=optimizer.final_lr,
        kind=optimizer.schedule,
    )


def _place(parts: RunParts, device: torch.device, dtype: torch.dtype) -> tuple[PlacedDecoder, ...]:
    """Place the frozen decoders as configured, one after another."""
    placed = []
    for decoder in parts.decoders:
        placement = choose_placement(
            decoder.placement,
            decoder_bytes=decoder.weights.num_parameters * dtype.itemsize,
            free_bytes=free_memory_bytes(device),
            world_size=dist.world_size(),
            local_world_size=parts.local_world_size,
        )
        placement = dist.broadcast_object(placement)
        if placement == "replicated":
            with dist.fail_together():
                whole = decoder.weights.load(device, dtype)
            placed.append(place_decoder(whole))
        else:
            ds_config = resolve_decoder_deepspeed(parts.ds_config, placement, parts.local_world_size)
            shards = decoder.weights.load(device, dtype, partitioned(ds_config))
            placed.append(place_decoder(shards, ds_config))
    return tuple(placed)


def _check_same_files(parts: RunParts) -> None:
    """Raise ConfigError if hosts found different files at the config's paths. Collective."""
    digests = {
        **{f"deepspeed.{key}": value for key, value in flatten_tree(parts.ds_config).items()},
        **{f"weights of {key}": digest for key, digest in parts.inputs.backbones.items()},
        **{f"tokenizer of {key}": digest for key, digest in parts.inputs.tokenizers.items()},
        "shards": parts.inputs.data,
        # Not part of the fingerprint, but they determine how samples are distributed to ranks.
        "passage counts in the shards' manifests": [s.shards.manifest.passage_tokens for s in parts.data.sources],
        "held-out shards": "none" if parts.validator is None else parts.validator.fingerprint,
        "questions of the evaluation": "none" if parts.evaluator is None else parts.evaluator.fingerprint,
    }
    check_same(digests, "Provide the same files on every host.")
