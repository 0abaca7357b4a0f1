"""Export formats: one self-describing folder, or an ARC checkpoint of the reference implementation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from arc_ds.errors import TokenizerError, WeightsError
from arc_ds.export.consolidate import TrainedCompressor
from arc_ds.export.model_card import CARD_NAME, model_card
from arc_ds.inference.checksums import CHECKSUMS, read_checksums, write_checksums
from arc_ds.inference.load import (
    ARC_DECODERS,
    EXPORT_CONFIG,
    EXPORT_FORMAT,
    EXPORT_VERSION,
    EXPORT_WEIGHTS,
    ArcFolder,
    check_compressor,
    check_encoder_tokenizer,
    open_arc_checkpoint,
    open_arc_folder,
)
from arc_ds.model.weights import write_arc_checkpoint
from arc_ds.model.weights.arc_format import BRIDGE, EMBEDDER, SIZES
from arc_ds.model.weights.arc_spec import params_of_spec
from arc_ds.model.weights.lazy_tensor import LazyTensor, as_lazy, value_bytes, write_safetensors
from arc_ds.model.weights.stores import ALL_ROWS
from arc_ds.system.checksums import FileEntry, hash_file
from arc_ds.system.files import whole_folder
from arc_ds.tokenizers import check_fits, load_tokenizer

logger = logging.getLogger(__name__)

ExportFormat = Literal["arc-ds", "arc", "both"]
FORMATS: tuple[ExportFormat, ...] = ("arc-ds", "arc", "both")
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ROW_BLOCK_VALUES = 1 << 20
_MAPPED_BYTES = 32 << 20  # of a written file, before the check opens it again to release its pages


def write_export(
    trained: TrainedCompressor,
    out: Path,
    *,
    export_format: ExportFormat = "arc-ds",
    dtype: str = "float32",
    overwrite: bool = False,
    tokenizer: Path | None = None,
) -> None:
    """Write a trained compressor to the folder `out`, atomically, and verify it by reading it again.

    Tensors are read, converted and written in blocks, so the memory does not grow with them.

    export_format: one of
        "arc-ds": config.json and model.safetensors. Apart from the decoders, `ArcModel.from_checkpoint` needs nothing
            else.
        "arc": the files that the reference reads, and decoders.json.
        "both": both in one folder. `ArcModel` reads the first, the reference reads the second.
        Each of them also has the encoder's tokenizer, a model card and checksums.json.
    dtype: dtype of the written tensors, a key of `DTYPES`.
    overwrite: replace an earlier export.
    tokenizer: the encoder's tokenizer, if it has moved from the path in the run's config.

    Raises WeightsError if `out` must not be written (`check_target`), the format cannot represent the compressor, or
    the written tensors differ when they are read again. Raises TokenizerError if the tokenizer is missing, does not fit
    the encoder, or is not the one of training.
    """
    out = Path(os.path.realpath(out))  # a link stays, and its folder is written
    check_target(out, overwrite=overwrite)
    path = tokenizer or trained.encoder_tokenizer
    try:
        encoder_tokenizer = load_tokenizer(path)
    except TokenizerError as error:
        raise TokenizerError(f"{error} If it has moved since the run, give its path to --tokenizer.") from error
    check_fits(encoder_tokenizer, trained.spec.backbone.vocab_size, "the encoder")
    expected = () if trained.encoder_fingerprint is None else (trained.encoder_fingerprint,)
    remedy = "Name the file that the run was trained with (--tokenizer)."
    check_encoder_tokenizer(encoder_tokenizer, expected, path, remedy=remedy)
    tensors = {name: as_lazy(tensor).to(DTYPES[dtype]) for name, tensor in trained.tensors.items()}
    with whole_folder(out, overwrite=overwrite) as folder:
        encoder_tokenizer.save(folder)
        # A tokenizer of a GGUF file is saved in another format, which has another fingerprint.
        fingerprints = list(dict.fromkeys((encoder_tokenizer.fingerprint, load_tokenizer(folder).fingerprint)))
        digests: dict[str, str] = {}
        if export_format in ("arc", "both"):
            with _checked(tensors, lambda: open_arc_checkpoint(folder)) as summed:
                digests |= _write_arc(trained, summed, dtype, folder, fingerprints)
        if export_format in ("arc-ds", "both"):
            with _checked(tensors, lambda: open_arc_folder(folder)) as summed:
                digests |= _write_folder(trained, summed, folder, fingerprints)
        write_checksums(folder, _entries(folder, digests))
        (folder / CARD_NAME).write_text(model_card(trained, out, dtype), encoding="utf-8")
        check_target(out, overwrite=overwrite)  # another export may have written it meanwhile


@contextmanager
def _checked(
    tensors: Mapping[str, LazyTensor], open_written: Callable[[], ArcFolder]
) -> Iterator[Mapping[str, LazyTensor]]:
    """A block that writes tensors, which then must read back equal, as `ArcModel` reads them.

    Yields the tensors to write; each must be read once and in order. A progress bar follows both passes on a terminal.

    open_written: opens the written folder.

    Raises WeightsError if the folder does not describe the compressor, or a tensor differs.
    """
    sums = {name: xxhash.xxh3_128() for name in tensors}
    num_read = 0
    total = 2 * sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    with tqdm(desc="export", total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def summed(name: str, tensor: LazyTensor) -> LazyTensor:
            def count(values: Tensor) -> Tensor:
                sums[name].update(value_bytes(values))
                bar.update(values.nbytes)
                return values

            return tensor.map(count)

        yield {name: summed(name, tensor) for name, tensor in tensors.items()}
        written = open_written()
        check_compressor(written.spec, written.tensors)
        for name, expected in sums.items():
            found = xxhash.xxh3_128()
            for rows in _row_blocks(tensors[name]):
                values = value_bytes(written.tensors.tensor(name, rows))
                found.update(values)
                bar.update(values.nbytes)
                num_read += values.nbytes
                if num_read > _MAPPED_BYTES:
                    written, num_read = open_written(), 0
            if found.digest() != expected.digest():
                raise WeightsError(
                    f"{written.tensors.path}: `{name}` was written and reads back with other values. Check the disk "
                    "and the memory of this machine, and export again."
                )


def _row_blocks(tensor: LazyTensor) -> list[slice]:
    """Slices of a tensor's rows of about 1 M values each."""
    if not tensor.shape:
        return [ALL_ROWS]
    step = max(_ROW_BLOCK_VALUES * tensor.shape[0] // max(tensor.numel(), 1), 1)
    return [slice(start, start + step) for start in range(0, tensor.shape[0], step)]


def _entries(folder: Path, digests: Mapping[str, str]) -> list[FileEntry]:
    """The entries of all files in a folder. digests: checksums that are known already."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return [
        FileEntry(path=name, size=path.stat().st_size, xxh128=digests.get(name) or hash_file(path))
        for name, path in paths.items()
    ]


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise WeightsError if `out` exists, unless `overwrite` is set and `out` is empty or an earlier export alone."""
    if not out.exists():
        return
    if not overwrite:
        raise WeightsError(f"{out} exists already. Choose another folder, or add --overwrite.")
    if not out.is_dir() or (any(out.iterdir()) and not _is_export(out)):
        raise WeightsError(f"{out} is not an export and is not overwritten. Choose another folder.")
    if others := _other_files(out):
        raise WeightsError(
            f"{out} is an export, but no export wrote {', '.join(others)} in it, which overwriting would delete. Move "
            "these away, or choose another folder."
        )


def _other_files(folder: Path) -> list[str]:
    """Files and folders at the top of an export that it has not written. Earlier exports list none of their files."""
    listed = {entry.path.partition("/")[0] for entry in read_checksums(folder)}
    found = {path.name for path in folder.iterdir() if listed or path.is_dir()}
    return sorted(found - listed - {CHECKSUMS, CARD_NAME, EMBEDDER.parent.name, BRIDGE.parent.name})


def _is_export(folder: Path) -> bool:
    """Whether the folder is an export of either format. The reference's own checkpoints and other models are not."""
    if (folder / SIZES).is_file() and (folder / EMBEDDER.parent).is_dir():
        return True
    try:
        plain = json.loads((folder / EXPORT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(plain, dict) and plain.get("format") == EXPORT_FORMAT


def _write_arc(
    trained: TrainedCompressor, tensors: Mapping[str, LazyTensor], dtype: str, folder: Path, fingerprints: list[str]
) -> dict[str, str]:
    """Write the files of an ARC checkpoint. Returns checksums of its tensor files by path."""
    spec = trained.spec
    if spec.backbone.rope_scaling is not None:
        logger.warning(
            "the encoder was trained with its backbone's rotary scaling. ARC-DS applies it when it reads this export; "
            "the reference ignores it"
        )
    digests = write_arc_checkpoint(folder, params_of_spec(spec, dtype), tensors, spec.backbone)
    _write_json(folder / ARC_DECODERS, _training(trained, fingerprints))
    return digests


def _write_folder(
    trained: TrainedCompressor, tensors: Mapping[str, LazyTensor], folder: Path, fingerprints: list[str]
) -> dict[str, str]:
    """Write the self-describing folder. Returns the checksum of its tensor file by path."""
    digest = write_safetensors(folder / EXPORT_WEIGHTS, tensors, {"format": "pt"})
    config = {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "step": trained.step,
        **_training(trained, fingerprints),
        "compressor": trained.spec.to_json(),
    }
    _write_json(folder / EXPORT_CONFIG, config)
    return {EXPORT_WEIGHTS: digest}


def _training(trained: TrainedCompressor, fingerprints: list[str]) -> dict[str, Any]:
    """The settings of training that `ArcModel` needs. Both formats record them.

    fingerprints: of the encoder's tokenizer, in training and as written.
    """
    digests = trained.decoder_ids or (None,) * len(trained.decoders)
    decoders = [
        {
            **asdict(decoder),
            "hidden_size": size,
            "ids_digest": digest,
            "weights": trained.decoder_weights.get(decoder.name),
        }
        for decoder, size, digest in zip(trained.decoders, trained.spec.decoder_sizes, digests, strict=True)
    ]
    return {
        "encoder_tokenizer": fingerprints,
        "decoders": decoders,
        "max_context_tokens": trained.max_context_tokens,
        **({} if trained.checkpoint is None else {"checkpoint": trained.checkpoint}),
    }


def _write_json(path: Path, plain: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
