"""Checks of a config before anything is loaded: keys that exclude each other, and paths that must exist."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from arc_ds.config.schema import RunConfig
from arc_ds.errors import ConfigError
from arc_ds.system.urls import is_url, local_path

# A decoder through transformers has no part that we could recompute on its own.
NO_SELECTIVE = "selective is not available through transformers. Set full, or none."
NO_ADAPTERS = (
    "adapters are not available through transformers. Remove the key, or choose a decoder that implementation: native "
    "computes."
)
DECODER_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def check_exclusions(config: RunConfig, source: str) -> None:
    """Raise one ConfigError that lists all keys that contradict each other, with the remedy.

    source: the file's name, for messages.
    """
    checks = (_encoder_problems, _decoder_problems, _data_problems, _step_problems)
    problems = [f"{source}: {problem}" for check in checks for problem in check(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def check_world_size(config: RunConfig, world_size: int) -> int:
    """Sequences of a micro-batch on one rank. Raises ConfigError if ranks × micro_batches does not divide the batch."""
    parts = world_size * config.micro_batches
    if config.data.batch_size % parts:
        raise ConfigError(
            f"data.batch_size is {config.data.batch_size}; expected a multiple of ranks × micro_batches = "
            f"{world_size} × {config.micro_batches} = {parts}. Change one of the three, for example "
            f"data.batch_size={-(-config.data.batch_size // parts) * parts}."
        )
    return config.data.batch_size // parts


def check_paths(config: RunConfig) -> None:
    """Raise one ConfigError that lists every path of the config that does not exist.

    A missing path would otherwise stop the run an hour later. If all paths exist, check that `run_dir` can be created
    and written to. This function does not create it.
    """
    paths: dict[str, str | None] = {"deepspeed": config.deepspeed}
    paths |= {f"encoder.{key}": getattr(config.encoder, key) for key in ("backbone", "tokenizer", "init_from")}
    for idx, decoder in config.trained_decoders.items():
        paths |= {f"decoders.{idx}.backbone": decoder.backbone, f"decoders.{idx}.tokenizer": decoder.tokenizer}
    paths |= _shards_on_disk(config)
    if config.evaluation is not None:
        paths["evaluation.config"] = config.evaluation.config
    if config.checkpoint.resume not in ("auto", "never"):
        paths["checkpoint.resume"] = config.checkpoint.resume
    # os.path.exists is false for names that are too long and folders that cannot be searched; Path.exists may raise.
    missing = [f"{key}: {path}" for key, path in paths.items() if path is not None and not os.path.exists(path)]
    if missing:
        lines = "\n  ".join(missing)
        raise ConfigError(
            f"these paths of the config do not exist (relative ones start at {Path.cwd()}):\n  {lines}\n"
            "Correct them, or set them as key=path on the command line."
        )
    _check_can_be_written(Path(config.run_dir))


def _check_can_be_written(folder: Path) -> None:
    """Create and delete a temporary file in the folder or its nearest existing parent. If that works, so will mkdir.

    The folder itself is not created. The ranks of a host check at the same time, and a start that is refused for
    another reason must not leave a folder.
    """
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".arc_ds_"):
            pass
    except OSError as error:
        raise ConfigError(
            f"run_dir={folder} cannot be created or written to on this host: {error.strerror} ({error.filename}). "
            "Choose another run_dir, or have the permissions of this path corrected."
        ) from error


def _shards_on_disk(config: RunConfig) -> dict[str, str]:
    """Paths of local shards, by key. Remote ones need the network and are checked later."""
    key = "data.validation" if isinstance(config.data.validation, str) else "data.validation.{}.path"
    paths = {f"data.sources.{idx}.path": source.path for idx, source in enumerate(config.data.sources)}
    paths |= {key.format(idx): source.path for idx, source in enumerate(config.data.held_out)}
    return {key: str(local_path(path)) for key, path in paths.items() if not is_url(path)}


def _encoder_problems(config: RunConfig) -> Iterator[str]:
    encoder, pooling = config.encoder, config.pooling
    if encoder.num_layers is not None and encoder.num_truncated_layers is not None:
        yield (
            f"encoder.num_layers={encoder.num_layers} and encoder.num_truncated_layers="
            f"{encoder.num_truncated_layers} both set the number of layers; remove one of them."
        )
    if encoder.train == "bridge":
        if encoder.trained_layers:
            yield (
                f"encoder.train is bridge, which freezes the encoder, but encoder.trained_layers is "
                f"{encoder.trained_layers}. Remove one of them; train: all trains the last {encoder.trained_layers} "
                "layers."
            )
        if encoder.lora is not None:
            yield "encoder.train is bridge, which freezes the encoder, but encoder.lora trains it. Remove one of them."
        if pooling.memory_tokens and encoder.init_from is None:
            yield (
                "encoder.train is bridge, which freezes memory tokens, but they would start untrained. Set "
                "encoder.init_from to an export that has them, or encoder.trained_layers=0 and "
                "encoder.train_embeddings=false instead of train: they freeze all but the memory tokens."
            )
    if encoder.lora is not None and encoder.trained_layers is not None:
        yield (
            f"encoder.lora freezes the weights of all layers, but encoder.trained_layers is {encoder.trained_layers}. "
            "Remove one of them."
        )
    # An empty list, null and 0 are the absent ones; ranges exclude a num_groups of 0.
    given = [name for name in ("factors", "num_groups", "memory_tokens") if getattr(pooling, name)]
    if len(given) != 1:
        yield (
            f"pooling: expected exactly one of factors, num_groups and memory_tokens; got "
            f"{' and '.join(given) or 'none'}. "
            "With num_groups or memory_tokens write `factors: []`; to keep every token write `factors: [1]`."
        )


def _decoder_problems(config: RunConfig) -> Iterator[str]:
    if not config.decoders:
        yield "decoders is an empty list; expected at least one decoder with name and backbone."
    elif not config.trained_decoders:
        yield "decoders: all have train: false, so nothing would be trained; expected at least one without it."
    names = [decoder.name for decoder in config.decoders]
    for idx, name in enumerate(names):
        if not DECODER_NAME.fullmatch(name):
            yield f"decoders.{idx}.name is {name!r}; expected letters, digits, '_', '-' and '.' (it names metrics)."
        if name in names[:idx]:
            yield f"decoders.{idx}.name is {name!r}, like that of decoder {names.index(name)}; give it another name."
    for idx, decoder in enumerate(config.decoders):
        if decoder.train and not decoder.backbone:
            yield f"decoders.{idx}.backbone is missing; give the path of its weights, or keep its port: train: false."
        if not decoder.train and config.encoder.init_from is None:
            yield (
                f"decoders.{idx}.train is false, so its bridge and markers must come from an export. Set "
                "encoder.init_from, or train it."
            )
        if decoder.implementation == "transformers" and decoder.activation_checkpointing == "selective":
            yield f"decoders.{idx}.activation_checkpointing: {NO_SELECTIVE}"
        if decoder.lora is not None and decoder.implementation == "transformers":
            yield f"decoders.{idx}.lora: {NO_ADAPTERS}"
        if decoder.lora is not None and not decoder.train:
            yield f"decoders.{idx}: lora needs training, but train is false. Remove one of the two keys."
        if not decoder.train and decoder.fresh_bridge:
            yield f"decoders.{idx}: fresh_bridge needs training, but train is false. Remove one of the two keys."


def _data_problems(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.sources:
        yield "data.sources is an empty list; expected at least one folder of shards ({path: …})."
    if data.validation == ():
        yield "data.validation is an empty list; expected at least one source ({path: …}), or null for no validation."
    if data.batch_size % config.micro_batches:
        yield (
            f"data.batch_size is {data.batch_size}; expected a multiple of micro_batches={config.micro_batches}. "
            "Change one of them."
        )
    key, share = "data.reconstruction_share", data.reconstruction_share
    pairs = share if isinstance(share, tuple) else ((0, share),)
    starts = [start for start, _ in pairs]
    if not pairs or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        yield f"{key} has steps {starts}; expected [from_step, share] pairs with increasing steps from 0."
    for start, value in pairs:
        if not 0 <= value <= 1:
            yield f"{key} is {value} from step {start}; expected a share from 0 to 1."


def _step_problems(config: RunConfig) -> Iterator[str]:
    if not 0 <= config.optimizer.warmup_steps < config.steps:
        yield (
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps}; expected 0 to steps - 1 = {config.steps - 1}. "
            f"For a run of this length, set for example optimizer.warmup_steps={config.steps // 20}."
        )
    if config.validation.every > 0 and not config.data.held_out:
        yield (
            f"validation.every is {config.validation.every}, but data.validation names no held-out shards. "
            "Set data.validation to a folder of shards, or validation.every to 0."
        )
