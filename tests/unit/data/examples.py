"""Examples of a few records, and what all of them have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import RunOrder
from arc_ds.data.tasks import Example, TaskLimits, closed, make_example, open_
from arc_ds.data.tasks.chat import PLAIN, Layout
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.written import written

# The encoder's and the decoder's tokenizer.
Pair = tuple[Tokenizer, Tokenizer]


def example_of(
    pair: Pair, *records: dict[str, Any], task: str, seed: int = 0, layout: Layout = PLAIN, **sizes: Any
) -> Example:
    """The example of some records. sizes: fields of TaskLimits."""
    limits = TaskLimits(**sizes)
    return make_example(records, task=task, seed=seed, encoder=pair[0], decoder=pair[1], limits=limits, layout=layout)


def text_of(pair: Pair, *records: dict[str, Any], **options: Any) -> str:
    """The example's sample as text."""
    return written(example_of(pair, *records, **options).sample, *pair)


def text_ids(sample: Sample) -> list[int]:
    """All decoder tokens of a sample."""
    return [token for segment in sample.segments if segment.kind == "text" for token in segment.ids]


def context_ids(sample: Sample) -> list[list[int]]:
    """The encoder tokens of each context of a sample."""
    return [list(segment.ids) for segment in sample.segments if segment.kind == "context"]


def check_targets(example: Example) -> PackedBatch:
    """Every label is the next text token of a text row, and the variants have the same targets. Returns the batch."""
    batch = pack([example.sample], PoolingSpec())
    tokens = torch.full((batch.num_decoder_rows + 1,), -1)
    tokens[batch.text_rows] = batch.decoder_ids
    assert batch.num_labels > 0
    assert (tokens[batch.label_rows] >= 0).all()
    assert torch.equal(batch.labels, tokens[batch.label_rows + 1])
    for variant in (closed(example), open_(example)):
        assert variant.num_context_tokens == 0
        assert torch.equal(pack([variant], PoolingSpec()).labels, batch.labels)
    return batch


def data_of(source: Source, encoder: Path, decoder: Path, *, seed: int, batch_size: int, **options: Any) -> StepData:
    """Steps of a single source, for one decoder. options: other arguments of StepData."""
    return StepData(
        order=RunOrder(seed=seed, batch_size=batch_size, sources=(source.shape,)),
        sources=[source],
        encoder_tokenizer=encoder,
        readers=[ReaderFiles(tokenizer=decoder)],
        **{"pooling": PoolingSpec(), **options},
    )


def golden_case(golden: Path, case: str) -> tuple[dict, Pair]:
    """The first item of a golden file, with the tokenizers of encoder and decoder."""
    spec = json.loads((golden / "data" / f"{case}.json").read_text())
    encoder, decoder = (load_tokenizer(golden / "tokenizers" / spec["tokenizers"][name]) for name in ("embed", "llm"))
    return spec["items"][0], (encoder, decoder)
