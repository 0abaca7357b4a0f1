"""CEPED as a system: which ids decoder and encoder read, and its answers against the model's own."""

from __future__ import annotations

import dataclasses
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment, TokenIds
from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.protocol import CLEAN, REFERENCE
from arc_ds.evaluation.protocol import Protocol as EvalProtocol
from arc_ds.evaluation.sample import Document, EvalPrompt, EvalSample
from arc_ds.evaluation.systems import KINDS
from arc_ds.evaluation.systems.ceped import CepedSystem, SplitSizes, split_prompt, split_prompt_as_published
from arc_ds.evaluation.systems.kind import SystemSettings
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.generation import generate_ids
from tests.helpers.tiny_ceped import write_tiny_ceped
from tests.helpers.tokenizer_files import KEEPS_TEXT, sentencepiece_model

STORY = "The tower is of stone. It stands by the sea, and a lamp burns in it at night. "
BEFORE = "Story:\n" + STORY * 6
REST = "\n\nAnswer in one word.\n\nQuestion: Where does it stand?\nAnswer:"
PROTOCOLS = {"clean": CLEAN, "reference": REFERENCE}
SIZES = SplitSizes(input=80, context=70, chunk=16)


@pytest.fixture(scope="module")
def ceped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a sentencepiece tokenizer, as Llama 2 has."""
    folder = sentencepiece_model(tmp_path_factory.mktemp("ceped") / "model", **KEEPS_TEXT)
    return write_tiny_ceped(folder, vocab_size=load_tokenizer(folder).vocab_size)


@pytest.fixture(scope="module")
def tokenizer(ceped: Path) -> Tokenizer:
    return load_tokenizer(ceped)


def build(folder: Path, protocol: EvalProtocol = CLEAN, **keys: Any) -> CepedSystem:
    sizes = {"input_tokens": SIZES.input, "context_tokens": SIZES.context, "chunk_tokens": SIZES.chunk}
    settings = SystemSettings(name="ceped", protocol=protocol, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    kind = KINDS["ceped"]
    system = kind.build(kind.section(model=str(folder), **{**sizes, **keys}), settings)
    assert isinstance(system, CepedSystem)
    return system


def make_prompt(copies: int, number: int = 0, **fields: Any) -> EvalPrompt:
    sample = EvalSample(id=f"s{number}", task="narrativeqa", passages=(STORY * copies,), references=("by the sea",))
    parts = ("Story:\n", Document(STORY * copies), REST)
    return EvalPrompt(sample=sample, parts=parts, **{"max_new_tokens": 8, "stop": (), **fields})


def test_a_short_prompt_needs_no_encoder(tokenizer: Tokenizer) -> None:
    whole = [tokenizer.bos_id, *tokenizer.encode("Story:\nIt stands.\n\nAnswer:")]
    for split in (split_prompt, split_prompt_as_published):
        assert split("Story:\nIt stands.", "\n\nAnswer:", len(whole), SIZES, tokenizer) == (whole, [])


@pytest.mark.parametrize("budget", [60, 72, 200])
def test_the_encoder_reads_the_tokens_before_those_of_the_decoder(tokenizer: Tokenizer, budget: int) -> None:
    ids = tokenizer.encode(BEFORE + REST)
    bos, *decoder_ids = (split := split_prompt(BEFORE, REST, budget, SIZES, tokenizer)).decoder_ids
    assert bos == tokenizer.bos_id and len(split.decoder_ids) == budget
    context = list(chain.from_iterable(split.chunks))
    num_before = len(ids) - len(decoder_ids)
    assert decoder_ids == ids[num_before:] and context == ids[:num_before][-SIZES.context :]
    first, *others = map(len, split.chunks)
    assert 0 < first <= SIZES.chunk and set(others) <= {SIZES.chunk}
    assert len(context) == min(SIZES.context, num_before)


def test_the_published_split_loses_the_first_token_and_reads_one_twice(tokenizer: Tokenizer) -> None:
    budget = 60
    split = split_prompt_as_published(BEFORE, REST, budget, SIZES, tokenizer)
    encoding, rest_ids = tokenizer.encode_with_ends(BEFORE), tokenizer.encode("\n\n" + REST)
    assert len(split.decoder_ids) == budget and split.decoder_ids[-len(rest_ids) :] == rest_ids
    num_kept = budget - len(rest_ids)
    first = len(encoding.ids) - num_kept
    assert split.decoder_ids[:num_kept] == encoding.ids[first:].tolist()  # no begin-of-text token
    start, end = encoding.ends[first + 1 - SIZES.context], encoding.ends[first + 1]
    assert list(chain.from_iterable(split.chunks)) == tokenizer.encode(BEFORE[start:end])
    assert len(split.chunks[-1]) == SIZES.chunk >= len(split.chunks[0])


def test_the_protocol_chooses_the_split(ceped: Path) -> None:
    assert build(ceped).describe()["split"] == "clean"
    assert build(ceped, REFERENCE).describe()["split"] == "reference"
    assert build(ceped, REFERENCE, split="clean").describe()["split"] == "clean"
    asked = make_prompt(6)
    clean, published = (build(ceped, split=rule)._split(asked) for rule in ("clean", "reference"))
    assert clean.decoder_ids != published.decoder_ids and clean.chunks != published.chunks


def test_answers_are_those_of_the_model_and_do_not_depend_on_the_batch(ceped: Path, tokenizer: Tokenizer) -> None:
    system = build(ceped)
    prompts = [make_prompt(6), make_prompt(0, 1), make_prompt(3, 2, max_new_tokens=5), make_prompt(0, 3)]
    answers = system.answer(prompts)
    assert [system.answer([prompt])[0] for prompt in prompts] == answers
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, chunks = system._split(prompt)
        model = system.model
        decoder = model.decoder.reading(model.encode([chunks])) if chunks else model.decoder
        batch = pack([Sample("test", (Segment.text(ids),))], PoolingSpec(rules=()))
        assert system.reader.stop_ids is not None
        expected = generate_ids(
            decoder, batch, None, max_new_tokens=prompt.max_new_tokens, stop_ids=system.reader.stop_ids
        )
        assert answer.raw == tokenizer.decode(expected[0]) and answer.text == answer.raw.strip()
        assert answer.lengths["prompt_rows"] == len(ids) == system.num_rows(prompt)
        assert answer.lengths["context_tokens"] == sum(map(len, chunks))
        assert answer.lengths["new_tokens"] == len(expected[0]) > 0
    assert [answer.lengths["context_tokens"] > 0 for answer in answers] == [True, False, True, False]


def test_the_nll_of_an_answer_depends_on_the_context(ceped: Path, tokenizer: Tokenizer) -> None:
    system, prompts = build(ceped), [make_prompt(6), make_prompt(0, 1)]
    found = system.answer_nll(prompts, ["by the sea", "stone"])
    answer_ids = tokenizer.encode(BEFORE + REST + " by the sea")[len(tokenizer.encode(BEFORE + REST)) :]
    ids, chunks = system._split(prompts[0])
    batch = pack([Sample("test", (Segment.text(ids), Segment.text(answer_ids)))], PoolingSpec(rules=()))
    rows = torch.arange(len(ids) - 1, len(ids) - 1 + len(answer_ids))
    labels = torch.tensor(answer_ids)
    nats = []
    for decoder in (system.model.decoder.reading(system.model.encode([chunks])), system.model.decoder):
        with torch.no_grad():
            nats.append(
                float(torch.nn.functional.cross_entropy(decoder.logits(batch, None, rows), labels, reduction="sum"))
            )
    assert found[0].tokens == len(answer_ids) and found[0].nats == pytest.approx(nats[0], rel=1e-5)
    assert abs(nats[0] - nats[1]) > 0.1
    assert found[1] == system.answer_nll(prompts[1:], ["stone"])[0]


@pytest.mark.parametrize("rest", [REST, REST + "\n", ""])
def test_the_ids_of_an_answer_are_those_after_the_prompt(ceped: Path, tokenizer: Tokenizer, rest: str) -> None:
    prompt = dataclasses.replace(make_prompt(1), parts=("Story:\n", Document(STORY.strip()), rest))
    before = f"Story:\n{STORY.strip()}{rest}"
    whole = tokenizer.encode(before + ("" if rest.endswith("\n") else " ") + "by the sea")
    assert build(ceped)._answer_ids(prompt, "by the sea") == TokenIds(whole[len(tokenizer.encode(before)) :])


def test_several_documents_are_divided_together(ceped: Path, tokenizer: Tokenizer) -> None:
    first, last = STORY * 3, STORY * 2
    prompt = dataclasses.replace(make_prompt(1), parts=("Story:\n", Document(first), "\n\n", Document(last), REST))
    (answer,) = build(ceped).answer([prompt])
    num_first, num_last = (len(tokenizer.encode(text)) for text in (first, last))
    assert num_first > num_last
    assert (
        answer.lengths.items()
        >= {
            "prompt_rows": SIZES.input - prompt.max_new_tokens,
            "open_book_rows": 1 + len(tokenizer.encode(f"Story:\n{first}\n\n{last}{REST}")),
            "document_decoder_tokens": num_first + num_last,
            "last_document_decoder_tokens": num_last,
        }.items()
    )


def test_the_reference_samples_summaries_of_govreport_alone(ceped: Path) -> None:
    sample = EvalSample(id="s", task="govreport", passages=(STORY,), references=("by the sea",))
    summary = EvalPrompt(sample=sample, parts=("Report:\n", Document(STORY * 6), REST), max_new_tokens=12, stop=())
    question = make_prompt(6, max_new_tokens=12)
    answers = {name: build(ceped, p, split="clean").answer([summary, question]) for name, p in PROTOCOLS.items()}
    assert answers["clean"][0].raw != answers["reference"][0].raw
    assert answers["clean"][1] == answers["reference"][1]
    system = build(ceped, REFERENCE, split="clean")
    assert system.answer([summary]) == answers["reference"][:1]
    sampling = system._sampling(summary)
    assert sampling is not None and (sampling.temperature, sampling.top_p) == (1.0, 0.95)


def test_an_answer_ends_at_its_stop(ceped: Path) -> None:
    system = build(ceped)
    (whole,) = system.answer([make_prompt(6, max_new_tokens=12)])
    stop = whole.raw[3:5]
    (cut,) = system.answer([make_prompt(6, max_new_tokens=12, stop=(stop,))])
    assert cut.stop == "string" and cut.text == whole.raw[: whole.raw.index(stop)].strip()


def test_a_question_beyond_the_budget_is_refused_and_exceeds_max_rows(ceped: Path, tokenizer: Tokenizer) -> None:
    prompt, before = make_prompt(2), "Story:\n" + STORY * 2
    needed = 1 + len(tokenizer.encode(before + REST)) - len(tokenizer.encode(before)) + 8
    assert build(ceped, input_tokens=needed).answer([prompt])[0].lengths["prompt_rows"] == needed - 8
    system = build(ceped, input_tokens=needed - 1)
    assert system.max_rows is not None and system.num_rows(prompt) + 8 > system.max_rows
    with pytest.raises(DataError, match="text after the documents of s0 and 8 new tokens exceed input_tokens"):
        system.answer([prompt])


def test_more_tokens_than_positions_are_refused(ceped: Path) -> None:
    assert build(ceped, input_tokens=256).max_rows == 256
    with pytest.raises(ConfigError, match="input_tokens is 257, but the decoder of .* has 256 positions"):
        build(ceped, input_tokens=257)
