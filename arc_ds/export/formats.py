"""Export formats: one self-describing folder, or an ARC checkpoint of the reference implementation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.export.consolidate import TrainedCompressor
from arc_ds.inference.load import (
    ARC_DECODERS,
    EXPORT_CONFIG,
    EXPORT_FORMAT,
    EXPORT_VERSION,
    EXPORT_WEIGHTS,
    check_encoder_tokenizer,
)
from arc_ds.model.weights import write_arc_checkpoint
from arc_ds.model.weights.arc_spec import params_of_spec
from arc_ds.system.files import whole_folder
from arc_ds.tokenizers import check_fits, load_tokenizer

logger = logging.getLogger(__name__)

ExportFormat = Literal["arc-ds", "arc"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_export(
    trained: TrainedCompressor,
    out: Path,
    *,
    export_format: ExportFormat = "arc-ds",
    dtype: str = "float32",
    overwrite: bool = False,
    tokenizer: Path | None = None,
) -> None:
    """Write a trained compressor to the folder `out`, atomically.

    export_format: one of
        "arc-ds": config.json, model.safetensors, the encoder's tokenizer and a model card. Apart from the decoders,
            `ArcModel.from_checkpoint` needs nothing else.
        "arc": the files that the reference reads, plus the tokenizer and decoders.json.
    dtype: dtype of the written tensors, a key of `DTYPES`.
    overwrite: replace an earlier export.
    tokenizer: the encoder's tokenizer, if it has moved from the path in the run's config.

    Raises WeightsError if `out` must not be written (`check_target`) or the format cannot represent the compressor, and
    TokenizerError if the tokenizer is missing, does not fit the encoder, or is not the one of training.
    """
    out = Path(os.path.abspath(out))
    check_target(out, overwrite=overwrite)
    path = tokenizer or trained.encoder_tokenizer
    encoder_tokenizer = load_tokenizer(path)
    check_fits(encoder_tokenizer, trained.spec.backbone.vocab_size, "the encoder")
    expected = () if trained.encoder_fingerprint is None else (trained.encoder_fingerprint,)
    remedy = "Name the file that the run was trained with (--tokenizer)."
    check_encoder_tokenizer(encoder_tokenizer, expected, path, remedy=remedy)
    tensors = {name: t.to(DTYPES[dtype]).contiguous() for name, t in trained.tensors.items()}
    with whole_folder(out) as folder:
        encoder_tokenizer.save(folder)
        # A tokenizer of a GGUF file is saved in another format, which has another fingerprint.
        fingerprints = list(dict.fromkeys((encoder_tokenizer.fingerprint, load_tokenizer(folder).fingerprint)))
        if export_format == "arc":
            _write_arc(trained, tensors, dtype, folder, fingerprints)
        else:
            _write_folder(trained, tensors, folder, fingerprints)
        check_target(out, overwrite=overwrite)  # another export may have written it meanwhile


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise WeightsError if `out` exists, unless `overwrite` is set and `out` is empty or an earlier export."""
    if not out.exists():
        return
    if not overwrite:
        raise WeightsError(f"{out} exists already. Choose another folder, or add --overwrite.")
    if not out.is_dir() or (any(out.iterdir()) and not _is_export(out)):
        raise WeightsError(f"{out} is not an export and is not overwritten. Choose another folder.")


def _is_export(folder: Path) -> bool:
    """Whether the folder is an export of either format. config.json or params.json alone may be another model."""
    if (folder / "params.json").is_file() and (folder / "embedder").is_dir():
        return True
    try:
        plain = json.loads((folder / EXPORT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(plain, dict) and plain.get("format") == EXPORT_FORMAT


def _write_arc(
    trained: TrainedCompressor, tensors: Mapping[str, Tensor], dtype: str, folder: Path, fingerprints: list[str]
) -> None:
    spec = trained.spec
    if spec.backbone.rope_scaling is not None:
        logger.warning(
            "the encoder was trained with its backbone's rotary scaling. ARC-DS applies it when it reads this export; "
            "the reference ignores it"
        )
    write_arc_checkpoint(folder, params_of_spec(spec, dtype), tensors, spec.backbone)
    _write_json(folder / ARC_DECODERS, _training(trained, fingerprints))


def _write_folder(
    trained: TrainedCompressor, tensors: Mapping[str, Tensor], folder: Path, fingerprints: list[str]
) -> None:
    save_file(dict(tensors), folder / EXPORT_WEIGHTS, metadata={"format": "pt"})
    config = {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "step": trained.step,
        **_training(trained, fingerprints),
        "compressor": trained.spec.to_json(),
    }
    _write_json(folder / EXPORT_CONFIG, config)
    (folder / "README.md").write_text(_model_card(trained), encoding="utf-8")


def _training(trained: TrainedCompressor, fingerprints: list[str]) -> dict[str, Any]:
    """The settings of training that `ArcModel` needs. Both formats record them.

    fingerprints: of the encoder's tokenizer, in training and as written.
    """
    digests = trained.decoder_ids or (None,) * len(trained.decoders)
    decoders = [
        {**asdict(decoder), "hidden_size": size, "ids_digest": digest}
        for decoder, size, digest in zip(trained.decoders, trained.spec.decoder_sizes, digests, strict=True)
    ]
    return {
        "encoder_tokenizer": fingerprints,
        "decoders": decoders,
        "max_context_tokens": trained.max_context_tokens,
    }


def _write_json(path: Path, plain: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def _model_card(trained: TrainedCompressor) -> str:
    spec = trained.spec
    factors = ", ".join(f"{rule.kind} {rule.value}" for rule in spec.rules) or f"{spec.memory_tokens} memory tokens"
    names = ", ".join(f"{d.name} (width {w})" for d, w in zip(trained.decoders, spec.decoder_sizes, strict=True))
    parameters = sum(t.numel() for t in trained.tensors.values())
    return f"""# ARC-Encoder

Compresses a text into vectors that a frozen decoder reads in place of its tokens (arXiv 2510.20535).

| | |
| --- | --- |
| decoders | {names} |
| pooling | {spec.strategy}, {factors} |
| encoder | {spec.num_layers} layers, width {spec.backbone.hidden_size} |
| parameters | {parameters / 1e6:.1f} M |
| trained for | {trained.step} steps |

```python
from arc_ds import ArcModel, Context

model = ArcModel.from_checkpoint("THIS_FOLDER", decoders=["DECODER_FOLDER"])
vectors = model.compress(["A long text ..."])
print(model.generate([["Document: ", Context("A long text ..."), "\\nSummary:"]]))
```
"""
