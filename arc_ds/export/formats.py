"""What an export is written as: one self-describing folder, or the reference's ARC checkpoint (design 6)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from arc_ds.data.tokenizers import load_tokenizer
from arc_ds.errors import WeightsError
from arc_ds.export.consolidate import TrainedCompressor
from arc_ds.model.load import EXPORT_CONFIG, EXPORT_FORMAT, EXPORT_WEIGHTS
from arc_ds.model.weights import write_arc_checkpoint
from arc_ds.model.weights.arc_spec import params_of_spec

ExportFormat = Literal["arc-ds", "arc"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_export(
    trained: TrainedCompressor,
    out: Path,
    *,
    export_format: ExportFormat = "arc-ds",
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Writes a trained compressor to `out`; the folder appears whole or not at all.

    "arc-ds": config.json, model.safetensors, the encoder's tokenizer and a model card; `ArcModel.from_checkpoint` needs
    nothing else but the decoders. "arc": what the reference reads, and the tokenizer beside it.
    WeightsError where `out` exists and `overwrite` is False, or the format cannot say what the compressor is.
    """
    tensors = {name: t.to(DTYPES[dtype]).contiguous() for name, t in trained.tensors.items()}
    if export_format == "arc":
        params = params_of_spec(
            trained.spec, param_dtype=dtype, trained_layers=trained.spec.num_layers, train_embeddings=True
        )
        write_arc_checkpoint(out, params, tensors, trained.spec.backbone, overwrite=overwrite)
        load_tokenizer(trained.encoder_tokenizer).save(out)
        return
    _write_folder(trained, tensors, out, overwrite=overwrite)


def _write_folder(trained: TrainedCompressor, tensors: Mapping[str, Tensor], out: Path, *, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise WeightsError(f"{out} exists already. Choose another folder, or add --overwrite.")
    if out.exists() and any(out.iterdir()) and not (out / EXPORT_CONFIG).is_file():
        raise WeightsError(f"{out} holds something else than an export and is not overwritten. Choose another folder.")
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(dict(tensors), temporary / EXPORT_WEIGHTS, metadata={"format": "pt"})
    load_tokenizer(trained.encoder_tokenizer).save(temporary)
    config = {
        "format": EXPORT_FORMAT,
        "version": 1,
        "step": trained.step,
        "decoders": [
            {"name": d.name, "hidden_size": size, "rope_scaling": d.rope_scaling}
            for d, size in zip(trained.decoders, trained.spec.decoder_sizes, strict=True)
        ],
        "compressor": trained.spec.to_json(),
    }
    (temporary / EXPORT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(_model_card(trained), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


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
| pooling | {factors} |
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
