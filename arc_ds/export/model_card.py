"""The model card of an export: README.md. Its figures come from the run's records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from arc_ds.export.consolidate import TrainedCompressor
from arc_ds.export.training_record import TrainingRecord, read_license
from arc_ds.system.urls import shown_url

CARD_NAME = "README.md"
_FIGURES = {"nll_closed": "no text", "nll_mismatched": "another text", "nll_compressed": "vectors", "nll_open": "text"}
_LOSSES = 100  # number of steps whose mean loss is given, because the loss of one step is noisy
_NOT_RECORDED = "not recorded"


def model_card(trained: TrainedCompressor, out: Path, dtype: str) -> str:
    """The text of an export's model card.

    out: the export's folder, for the snippet.
    dtype: dtype of the tensors.
    """
    spec, record = trained.spec, trained.record
    factors = ", ".join(f"{rule.kind} {rule.value}" for rule in spec.rules) or f"{spec.memory_tokens} memory tokens"
    names = ", ".join(f"{d.name} (width {w})" for d, w in zip(trained.decoders, spec.decoder_sizes, strict=True))
    adapted = ", ".join(d.name for idx, d in enumerate(trained.decoders) if spec.adapters_of(idx) is not None)
    parameters = sum(tensor.numel() for tensor in trained.tensors.values())
    steps = ", ".join(map(str, trained.averaged_steps))
    rows = {
        "decoders": names,
        **({"adapters of decoders": f"{adapted} (`ArcModel` adds them to the decoder's weights)"} if adapted else {}),
        "pooling": f"{spec.strategy}, {factors}",
        "encoder": f"{spec.num_layers} layers, width {spec.backbone.hidden_size}",
        "parameters": f"{parameters / 1e6:.1f} M, {dtype}",
        "trained for": f"{trained.step} steps",
        **({"weights": f"the mean of the checkpoints of the steps {steps}"} if steps else {}),
    }
    sections = [
        "# ARC-Encoder\n\nCompresses a text into vectors that a frozen decoder reads in place of its tokens "
        "(arXiv 2510.20535).",
        _table("| | |", rows.items()),
        f"## Use\n\n```python\n{_snippet(trained, out)}```",
    ]
    if record is not None:
        sections += ["## Training", "\n".join(_training(trained, record)), *_validation(trained, record)]
        sections += ["## Licences of the backbones", _licenses(trained, record)]
    return "\n\n".join(sections) + "\n"


def _snippet(trained: TrainedCompressor, out: Path) -> str:
    """Python that compresses a text and lets each decoder read it."""
    record = trained.record
    paths = [(record and record.backbone(decoder.name)) or f"PATH_OF_{decoder.name}" for decoder in trained.decoders]
    marker = "" if "cont" in trained.spec.markers else ", marker=None"
    context = 'Context("A long text ..."' + marker + ")"
    listed = "".join(f"        {path!r},  # {d.name}\n" for path, d in zip(paths, trained.decoders, strict=True))
    generate = "".join(
        f'print(model.generate([["Document: ", {context}, "\\nSummary:"]], decoder={idx}))  # {decoder.name}\n'
        for idx, decoder in enumerate(trained.decoders)
    )
    return (
        "from arc_ds import ArcModel, Context\n\n"
        f"model = ArcModel.from_checkpoint(\n    {str(out)!r},\n    decoders=[\n{listed}    ],\n)\n"
        f'vectors = model.compress(["A long text ..."]{marker})\n{generate}'
    )


def _training(trained: TrainedCompressor, record: TrainingRecord) -> Iterator[str]:
    last = list(record.losses.items())[-_LOSSES:]
    if last:
        mean = sum(loss for _, loss in last) / len(last)
        yield f"- Training loss: {last[-1][1]:.4f} nats per token at step {last[-1][0]}."
        if len(last) > 1:
            yield f"- Its mean over the {len(last)} logged steps from {last[0][0]} to {last[-1][0]}: {mean:.4f}."
    else:
        yield f"- Training loss: {_NOT_RECORDED}."
    if trained.averaged_steps:
        yield "- These figures are those of the run. The mean of its checkpoints was not validated."
    yield f"- Fingerprint of the data: `{record.data}`."
    if record.config is not None:
        for source in record.config.data.sources:
            yield f"- Data: `{shown_url(source.path)}`, task {source.task}, weight {source.weight:g}."
        yield f"- Seed: {record.config.seed}. Batch: {record.config.data.batch_size} samples."
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    yield f"- Versions: {versions or _NOT_RECORDED}."


def _validation(trained: TrainedCompressor, record: TrainingRecord) -> list[str]:
    if record.validated_at is None:
        return ["The run has no validation up to this step."]
    header = f"| {' | '.join(['decoder', 'task', *_FIGURES.values(), 'gap closed', 'samples'])} |"
    rows = []
    exported = {decoder.name for decoder in trained.decoders}
    for (decoder, task), figures in record.validation.items():
        if decoder not in exported:
            continue
        shown = [_figure(figures.get(name)) for name in (*_FIGURES, "gap_closed")]
        samples = f"{figures['num_samples']:.0f}" if "num_samples" in figures else _NOT_RECORDED
        rows.append([decoder, task, *shown, samples])
    return [
        f"Validation at step {record.validated_at}: nats per token of the held-out texts, if the decoder is given",
        _table(header, rows),
        "Gap closed is the share of the full text's benefit that the vectors deliver, over the better of no text and "
        "another text's vectors. It is undefined if the full text has none. With few samples it is uncertain.",
    ]


def _figure(value: float | None) -> str:
    return _NOT_RECORDED if value is None else "undefined" if math.isnan(value) else f"{value:.3f}"


def _licenses(trained: TrainedCompressor, record: TrainingRecord) -> str:
    rows = {"encoder": record.backbone()} | {d.name: record.backbone(d.name) for d in trained.decoders}
    return _table("| | backbone | licence |", [(n, p or _NOT_RECORDED, read_license(p)) for n, p in rows.items()])


def _table(header: str, rows: Iterable[Sequence[str]]) -> str:
    rule = "|" + " --- |" * (header.count("|") - 1)
    return "\n".join([header, rule, *(f"| {' | '.join(row)} |" for row in rows)])
