"""A tiny mixture on disk: weighted sources of all tasks and two tokenizers, opened as in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arc_ds.batch.packing import PoolingSpec
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import RunOrder
from arc_ds.data.tasks import TaskLimits
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.reader import ShardSet
from tests.helpers.tiny_data import numbered_texts, write_json_tokenizer, write_shards, write_tiktoken

LIMITS = TaskLimits(
    max_context=16,
    max_prefix=12,
    max_continuation=16,
    max_documents=400,
    max_passages=2,
    max_question=24,
    max_answer=12,
    chunk_tokens=10,
    max_chunks=3,
)
# Records of each source. The numbers differ, so epochs end at different steps.
SIZES = (37, 11, 5)
WEIGHTS = (0.5, 0.3, 0.2)
IN_CONTEXT_EXAMPLES = 3


def question_records(count: int) -> list[dict[str, Any]]:
    """Different fine-tuning records. All texts of a record contain its number."""
    return [
        {
            "passages": [f"Block {idx} is of grey stone. " * (1 + idx % 3), f"Lamp {idx} is on tower {idx}. "],
            "question": f"Of what is block {idx}?",
            "answer": [f"grey stone {idx}", f"stone {idx}"],
        }
        for idx in range(count)
    ]


def write_question_shards(folder: Path, tokenizer: Path, records: list[dict[str, Any]]) -> ShardSet:
    """Write shards of a few fine-tuning records each."""
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    build_shards([source], folder, tokenizer, kind="fine_tuning", shard_bytes=1 << 12)
    return ShardSet(folder)


class TinyMixture:
    """Three sources (pretraining, few-shot, long context) in a folder. Written once, can be opened repeatedly."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.encoder = folder / "tokenizer.model"
        self.decoder = folder / "json"

    @staticmethod
    def write(folder: Path) -> TinyMixture:
        """Write everything."""
        mixture = TinyMixture(folder)
        write_tiktoken(mixture.encoder)
        write_json_tokenizer(mixture.decoder)
        write_shards(folder / "texts", mixture.encoder, numbered_texts(SIZES[0]), shard_bytes=1 << 12)
        write_question_shards(folder / "questions", mixture.encoder, question_records(SIZES[1]))
        long_texts = [text * 2 for text in numbered_texts(SIZES[2])]
        write_shards(folder / "long", mixture.encoder, long_texts, shard_bytes=1 << 10)
        return mixture

    def sources(self, weights: tuple[float, ...] = WEIGHTS) -> list[Source]:
        """Open the sources again."""
        texts, questions, long_texts = (ShardSet(self.folder / name) for name in ("texts", "questions", "long"))
        return [
            Source(shards=texts, weight=weights[0], limits=LIMITS),
            Source(
                shards=questions,
                weight=weights[1],
                task="few_shot",
                in_context_examples=IN_CONTEXT_EXAMPLES,
                limits=LIMITS,
            ),
            Source(shards=long_texts, weight=weights[2], task="long_context", limits=LIMITS),
        ]

    def data(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        batch_size: int = 12,
        weights: tuple[float, ...] = WEIGHTS,
        schedule: str = "sample",
        **changes: Any,
    ) -> StepData:
        """The data of one rank. changes: other arguments of StepData."""
        sources = self.sources(weights)
        order = RunOrder(
            seed=seed,
            batch_size=batch_size,
            sources=tuple(source.shape for source in sources),
            reconstruction_share=((0, 0.5),),
            num_decoders=2,
            decoder_schedule=schedule,  # type: ignore[arg-type]
            window_shards=2,
        )
        return StepData(
            order=order,
            sources=sources,
            encoder_tokenizer=self.encoder,
            readers=[ReaderFiles(tokenizer=self.decoder), ReaderFiles(tokenizer=self.encoder)],
            pooling=PoolingSpec(),
            rank=rank,
            world_size=world_size,
            **changes,
        )
