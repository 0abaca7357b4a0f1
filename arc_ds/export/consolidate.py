"""Join the ZeRO shards of a checkpoint into whole tensors, without a GPU and without a process group."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from arc_ds.checkpoints.checkpoint import (
    CheckpointRemoved,
    TrainerState,
    list_checkpoints,
    read_trainer_state,
    reading,
)
from arc_ds.checkpoints.kept_ports import name_in_export, read_kept_ports
from arc_ds.checkpoints.manifest import find_faults, read_manifest
from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.errors import CheckpointError
from arc_ds.model.spec import CompressorSpec

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class TrainedCompressor:
    """A trained compressor, read from a checkpoint.

    spec: sizes and semantics of the compressor.
    tensors: float32 tensors by their names in `Compressor`.
    step: number of optimizer steps done.
    encoder_tokenizer: path of the encoder's tokenizer, as given in the run's config.
    decoders: the decoders it was trained for, in the order of the ports.
    encoder_fingerprint: of the encoder's tokenizer in training; None if the checkpoint does not record it.
    decoder_ids: digest of each decoder's tokenizer (`tokenizers.ids_digest`); None if it is unknown. Empty if the
        checkpoint records none.
    max_context_tokens: length of the longest context in training; None if the checkpoint does not record it.
    """

    spec: CompressorSpec
    tensors: Mapping[str, Tensor]
    step: int
    encoder_tokenizer: str
    decoders: tuple[TrainedFor, ...]
    encoder_fingerprint: str | None = None
    decoder_ids: tuple[str | None, ...] = ()
    max_context_tokens: int | None = None


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


def consolidate_newest(path: Path) -> tuple[Path, TrainedCompressor]:
    """The checkpoint that `find_checkpoint` finds, and its compressor as `consolidate` reads it.

    If a run that is going on removes it meanwhile, the newest one is read instead.

    Raises CheckpointError like both, and CheckpointRemoved if `path` itself is removed, or too many in a row.
    """
    attempts = 0
    while True:
        checkpoint, attempts = find_checkpoint(path), attempts + 1
        try:
            return checkpoint, consolidate(checkpoint)
        except CheckpointRemoved:
            if checkpoint == path or attempts == _MAX_ATTEMPTS:
                raise
            logger.warning("%s was removed by its run while it was read; reading the newest one", checkpoint)


def consolidate(checkpoint: Path) -> TrainedCompressor:
    """Join the shards of a checkpoint into whole float32 tensors, including frozen ones. Holds all of them in memory.

    Checksums of all files are verified first, because DeepSpeed's shards are pickles. Raises CheckpointError if a file
    is missing or differs, or if the checkpoint does not describe its compressor, and CheckpointRemoved if it vanishes.
    """
    with reading(checkpoint):
        return _consolidate(checkpoint)


def _consolidate(checkpoint: Path) -> TrainedCompressor:
    faults = find_faults(checkpoint, read_manifest(checkpoint).files)
    if faults:
        raise CheckpointError(
            f"{checkpoint} is not valid: {'; '.join(faults)}. Export an earlier checkpoint of the run, or save again."
        )
    state = read_trainer_state(checkpoint)
    description = _description(state, checkpoint)
    places = description.get("port_places")
    tensors = {name_in_export(name, places): tensor for name, tensor in _join_shards(checkpoint).items()}
    tensors |= {name: tensor.float() for name, tensor in read_kept_ports(checkpoint).items()}
    return TrainedCompressor(
        spec=CompressorSpec.from_json(description["compressor"]),
        tensors=tensors,
        step=state.step,
        encoder_tokenizer=description["encoder_tokenizer"],
        decoders=tuple(TrainedFor(**d) for d in description["decoders"]),
        encoder_fingerprint=description.get("tokenizers", {}).get("encoder"),
        decoder_ids=tuple(description.get("decoder_ids", ())),
        max_context_tokens=description.get("max_context_tokens"),
    )


def _join_shards(checkpoint: Path) -> Mapping[str, Tensor]:
    # No GPU is needed. Without this variable DeepSpeed detects an accelerator at import and logs the result.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Standard output is reserved for the command's own output. DeepSpeed prints its progress there, and its logger
    # keeps the stream that it sees at the first import.
    with redirect_stdout(sys.stderr):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):  # also its progress bar, which fills logs
        tensors = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    logger.debug("%s", said.getvalue().rstrip())
    return tensors


def _description(state: TrainerState, checkpoint: Path) -> Mapping[str, Any]:
    missing = {"compressor", "encoder_tokenizer", "decoders"} - set(state.extra)
    if missing:
        raise CheckpointError(
            f"{checkpoint}/trainer.json lacks {', '.join(sorted(missing))}. `arc-ds train` writes these keys: use a "
            "checkpoint of a run that it trained."
        )
    return state.extra
