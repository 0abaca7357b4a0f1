"""Open the shards of checkpoints as whole tensors, without a GPU, a process group or DeepSpeed.

This reads names and places only. The tensors are read in blocks when they are written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arc_ds.checkpoints.checkpoint import (
    CheckpointRemoved,
    TrainerState,
    list_checkpoints,
    read_trainer_state,
    reading,
)
from arc_ds.checkpoints.frozen_source import FrozenSource
from arc_ds.checkpoints.kept_ports import name_in_export, read_kept_ports
from arc_ds.checkpoints.manifest import manifest_digest, read_manifest
from arc_ds.checkpoints.shards import SavedParameter, open_shards
from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.errors import CheckpointError, ConfigError, words_of
from arc_ds.export.frozen_weights import open_frozen
from arc_ds.export.training_record import TrainingRecord, read_training_record
from arc_ds.inference.load import empty_compressor
from arc_ds.model.lora import merge_adapters
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.weights.lazy_tensor import LazyTensor, as_lazy
from arc_ds.system.checksums import find_faults

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class TrainedCompressor:
    """A trained compressor in a checkpoint, or the mean of several.

    spec: sizes and semantics of the compressor.
    tensors: float32 tensors by their names in `Compressor`.
    step: number of optimizer steps done.
    encoder_tokenizer: path of the encoder's tokenizer, as given in the run's config.
    decoders: the decoders it was trained for, in the order of the ports.
    encoder_fingerprint: of the encoder's tokenizer in training; None if the checkpoint does not record it.
    decoder_ids: digest of each decoder's tokenizer (`tokenizers.ids_digest`); None if it is unknown. Empty if the
        checkpoint records none.
    decoder_weights: samples of each decoder's weights by its name (`weight_samples.sample_weights`), if recorded.
    max_context_tokens: length of the longest context in training; None if the checkpoint does not record it.
    averaged_steps: steps of the checkpoints whose mean this is; empty for one checkpoint.
    record: the run's own record of the training; None if this is no checkpoint of a run.
    checkpoint: digest of the checkpoint (`manifest_digest`), of the last one if this is a mean; None if there is none.
    """

    spec: CompressorSpec
    tensors: Mapping[str, Tensor | LazyTensor]
    step: int
    encoder_tokenizer: str
    decoders: tuple[TrainedFor, ...]
    encoder_fingerprint: str | None = None
    decoder_ids: tuple[str | None, ...] = ()
    decoder_weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_context_tokens: int | None = None
    averaged_steps: tuple[int, ...] = ()
    record: TrainingRecord | None = None
    checkpoint: str | None = None


def find_checkpoint(path: Path) -> Path:
    """Resolve `path` to a checkpoint: a step folder itself, or the newest one of a run or of its checkpoints folder.

    Raises CheckpointError if there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: expected a run's folder or one of its checkpoints/step_NNNNNN")
    if (path / "trainer.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        found = list_checkpoints(folder)
        if found:
            return found[-1]
    raise CheckpointError(f"{path} holds no checkpoint. Expected a run's folder or one of its checkpoints/step_NNNNNN")


def consolidate_newest(
    path: Path,
    average: int = 1,
    use: Callable[[TrainedCompressor], object] = lambda trained: None,
    decoders: Collection[str] = (),
    encoder: Path | None = None,
) -> tuple[Path, TrainedCompressor]:
    """The checkpoint that `find_checkpoint` finds, and its compressor as `consolidate` reads it.

    average: number of checkpoints to average: this one and those before it.
    use: called with the compressor, to read its tensors.
    decoders: see `with_decoders`.
    encoder: see `consolidate`.

    If a run that is going on removes one of the checkpoints before `use` returns, the newest ones are read instead.

    Raises CheckpointError like both, and if there are fewer checkpoints than `average`. Raises CheckpointRemoved if
    `path` itself is removed, or too many in a row. Raises ConfigError like `with_decoders`.
    """
    attempts = 0
    while True:
        checkpoint, attempts = find_checkpoint(path), attempts + 1
        try:
            members = [consolidate(each, encoder) for each in _last_checkpoints(checkpoint, average)]
            trained = _average([with_decoders(member, decoders) for member in members])
            use(trained)
            return checkpoint, trained
        except CheckpointRemoved:
            if checkpoint == path or attempts == _MAX_ATTEMPTS:
                raise
            logger.warning("%s was removed by its run while it was read; reading the newest one", checkpoint)


def with_decoders(trained: TrainedCompressor, names: Collection[str] = ()) -> TrainedCompressor:
    """A compressor with the ports of some decoders, in the order of the run. A lone decoder owns a shared bridge.

    names: of the decoders; empty for all.

    Raises ConfigError if the compressor has no such decoder.
    """
    known = [decoder.name for decoder in trained.decoders]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"the checkpoint has no decoder {', '.join(unknown)}; it was trained for {', '.join(known)}. Give one of "
            "these names to --decoder."
        )
    chosen = [idx for idx, name in enumerate(known) if not names or name in names]
    is_shared = trained.spec.bridge_shared and len(chosen) > 1
    tensors = {}
    for name, tensor in trained.tensors.items():
        part, _, rest = name.partition(".")
        port, _, leaf = rest.partition(".")
        if part != "ports":
            tensors[f"ports.0.{name}" if part == "bridge" and not is_shared else name] = tensor
        elif int(port) in chosen:
            tensors[f"ports.{chosen.index(int(port))}.{leaf}"] = tensor
    spec = trained.spec.with_ports((trained.spec.decoder_sizes[idx], trained.spec.adapters_of(idx)) for idx in chosen)
    return replace(
        trained,
        spec=replace(spec, bridge_shared=is_shared),
        tensors=tensors,
        decoders=tuple(trained.decoders[idx] for idx in chosen),
        decoder_ids=tuple(trained.decoder_ids[idx] for idx in chosen) if trained.decoder_ids else (),
    )


def consolidate(checkpoint: Path, encoder: Path | None = None) -> TrainedCompressor:
    """Open the shards of a checkpoint as whole float32 tensors. Frozen ones come from the files that the run names.

    encoder: folder of these files, if they have moved.

    Checksums of all files are verified first. Raises CheckpointError if a file is missing or differs, or if the
    checkpoint does not describe its compressor, and CheckpointRemoved if it vanishes.
    """
    with reading(checkpoint):
        manifest = read_manifest(checkpoint)
        if faults := find_faults(checkpoint, manifest.files):
            raise CheckpointError(
                f"{checkpoint} is not valid: {'; '.join(faults)}. Export an earlier checkpoint of the run, or save "
                "again."
            )
        state = read_trainer_state(checkpoint)
        shards = open_shards(checkpoint, manifest.world_size)
        kept = read_kept_ports(checkpoint)
        saved = {name: _read_safely(checkpoint, each) for name, each in {**shards.trained, **shards.others}.items()}
        try:
            trained = _described(state, saved, kept, read_training_record(checkpoint.parent.parent, state))
            if (frozen := state.extra.get("frozen")) is not None:
                trained = _with_frozen(trained, FrozenSource(**frozen), encoder)
            if (scale := state.extra.get("lora_scale")) is not None:
                trained = replace(trained, tensors=merge_adapters(trained.tensors, float(scale)))
            return replace(trained, checkpoint=manifest_digest(checkpoint))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint}/trainer.json does not describe a compressor as this version of `arc-ds train` does "
                f"({type(error).__name__}: {words_of(error)}). Export it with the version that wrote it."
            ) from error


def _read_safely(checkpoint: Path, parameter: SavedParameter) -> LazyTensor:
    """A parameter of a checkpoint that may vanish while it is read."""

    def read(start: int, stop: int) -> Tensor:
        with reading(checkpoint):
            return parameter.read(start, stop)

    return LazyTensor(shape=tuple(parameter.shape), dtype=torch.float32, read=read)


def _with_frozen(trained: TrainedCompressor, source: FrozenSource, moved: Path | None) -> TrainedCompressor:
    """A compressor with the weights that its run did not train."""
    parameters = empty_compressor(trained.spec, Path(source.path)).named_parameters()
    missing = [name for name, _ in parameters if name not in trained.tensors]
    tensors = open_frozen(missing, source, trained.spec, moved) if missing else {}
    return replace(trained, tensors={**trained.tensors, **tensors})


def _last_checkpoints(checkpoint: Path, count: int) -> list[Path]:
    """The `count` checkpoints of a run up to the given one, oldest first."""
    if count == 1:
        return [checkpoint]
    known = list_checkpoints(checkpoint.parent)
    found = known[: known.index(checkpoint) + 1][-count:] if checkpoint in known else []
    if len(found) < count:
        raise CheckpointError(
            f"{checkpoint.parent} holds {len(found)} checkpoints up to {checkpoint.name}, but the mean of {count} was "
            "requested. Lower --average, or keep more of them in the next run (checkpoint.keep_last)."
        )
    return found


def _average(members: Sequence[TrainedCompressor]) -> TrainedCompressor:
    """The mean of checkpoints of one run; everything else is the last one's."""
    last = members[-1]
    if len(members) == 1:
        return last
    if last.spec.adapters:
        raise CheckpointError(
            "the checkpoints hold adapters of a decoder, whose products have no mean of the same rank. Export one of "
            "them without --average."
        )
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.tensors.items()} for each in members]
    if any(each.spec != last.spec for each in members) or any(each != shapes[-1] for each in shapes):
        steps = ", ".join(str(each.step) for each in members)
        raise CheckpointError(
            f"the checkpoints of the steps {steps} hold compressors of different sizes, so they have no mean. Export "
            "one of them without --average."
        )
    tensors = {name: _mean([each.tensors[name] for each in members]) for name in last.tensors}
    return replace(last, tensors=tensors, averaged_steps=tuple(each.step for each in members))


def _mean(tensors: Sequence[Tensor | LazyTensor]) -> LazyTensor:
    """The mean of float32 tensors, block by block. It is exact if all are equal, as frozen ones are."""
    first, *others = (as_lazy(tensor) for tensor in tensors)

    def read(start: int, stop: int) -> Tensor:
        mean = first.read(start, stop)
        for count, tensor in enumerate(others, start=2):
            mean = torch.lerp(mean, tensor.read(start, stop), 1 / count)
        return mean

    return replace(first, read=read)


def _described(
    state: TrainerState, shards: Mapping[str, LazyTensor], kept: Mapping[str, Tensor], record: TrainingRecord
) -> TrainedCompressor:
    """The compressor of these tensors, which a trainer's state describes."""
    description = state.extra
    places = description.get("port_places")
    tensors = {name_in_export(name, places): tensor for name, tensor in shards.items()}
    tensors |= {name: as_lazy(tensor.float()) for name, tensor in kept.items()}
    spec = CompressorSpec.from_json(description["compressor"])
    decoders = tuple(TrainedFor(**d) for d in description["decoders"])
    ids = tuple(description.get("decoder_ids", ()))
    if len(decoders) != len(spec.decoder_sizes) or (ids and len(ids) != len(decoders)):
        raise ValueError(f"{len(decoders)} decoders and {len(ids)} tokenizers for {len(spec.decoder_sizes)} ports")
    return TrainedCompressor(
        spec=spec,
        tensors=tensors,
        step=state.step,
        encoder_tokenizer=description["encoder_tokenizer"],
        decoders=decoders,
        encoder_fingerprint=description.get("tokenizers", {}).get("encoder"),
        decoder_ids=ids,
        decoder_weights=description.get("decoder_weights", {}),
        max_context_tokens=description.get("max_context_tokens"),
        record=record,
    )
