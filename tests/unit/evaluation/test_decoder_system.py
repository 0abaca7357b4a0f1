"""The systems over one decoder: each reads its documents as described, and answers do not depend on the batch."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds import ArcModel, Context, Vectors
from arc_ds.errors import ConfigError, DataError, WeightsError
from arc_ds.evaluation.datasets import TASKS
from arc_ds.evaluation.prompts import make_prompts
from arc_ds.evaluation.protocol import CLEAN, REFERENCE, Protocol
from arc_ds.evaluation.sample import Document, EvalPrompt, EvalSample, Said
from arc_ds.evaluation.systems import KINDS
from arc_ds.evaluation.systems.budget import choose_sentences, cut_to, rows_of_arc, split_sentences
from arc_ds.evaluation.systems.decoder_system import ArcSystem, DecoderSystem
from arc_ds.evaluation.systems.kind import SystemSettings
from arc_ds.evaluation.systems.served import ServerSection
from arc_ds.export.formats import write_export
from arc_ds.model.decoder import Decoder
from arc_ds.model.decoder_adapters import DecoderLora
from arc_ds.tokenizers import Tokenizer
from tests.helpers.tiny_export import DECODER, tiny_trained

TOWER = "The tower is of stone. It stands by the sea. A lamp burns in it at night."
LAMP = "A lamp of stone held for years. The wind came from the sea."
QUESTION = "Where does the tower stand?"


def settings(name: str, protocol: Protocol = CLEAN) -> SystemSettings:
    return SystemSettings(name=name, protocol=protocol, seed=3, device=torch.device("cpu"), dtype=torch.float32)


def eval_sample(number: int, task: str = "squad") -> EvalSample:
    return EvalSample(
        id=f"q{number}", task=task, passages=(TOWER,), references=("by the sea",), question=QUESTION + "?" * number
    )


def prompt(
    number: int = 0, *, closed: bool = False, task: str = "squad", document: str = TOWER, **fields: Any
) -> EvalPrompt:
    """One in-context example and a question."""
    asked = eval_sample(number, task)
    example: list[str | Document] = [
        "Document: ",
        Document(LAMP),
        "\nQuestion: Of what is the lamp?\n",
        Said("Answer: stone"),
        "\n\n",
    ]
    parts = [*example, "Document: ", Document(document), f"\nQuestion: {asked.question}\n", Said("Answer:")]
    if closed:
        example = ["Question: Of what is the lamp?\n", Said("Answer: stone"), "\n\n"]
        parts = [*example, f"Question: {asked.question}\n", Said("Answer:")]
    options = {"max_new_tokens": 6, "stop": ("\n\n",), "shared": tuple(example), **fields}
    return EvalPrompt(sample=asked, parts=tuple(parts), **options)


def make(folder: Path, kind: str, protocol: Protocol = CLEAN, **keys: Any) -> Any:
    given = {"model": str(folder / "export"), "decoders": (str(folder / "decoder"),)}
    given = given if kind == "arc" else {"decoder": str(folder / "decoder")}
    return KINDS[kind].build(KINDS[kind].section(**{**given, **keys}), settings(kind, protocol))


def words(prompt: EvalPrompt) -> str:
    return "".join(part.text if isinstance(part, Document) else part for part in prompt.parts)


def test_arc_answers_as_the_model_does_on_compressed_documents(folder: Path, model: ArcModel) -> None:
    system, asked = make(folder, "arc"), prompt()
    parts = [Context(part.text) if isinstance(part, Document) else part for part in asked.parts]
    (answer,) = system.answer([asked])
    assert [answer.raw.partition("\n\n")[0].strip()] == [answer.text]
    assert [answer.raw] == model.generate([parts], max_new_tokens=6)
    ((nats, tokens),) = model.nll([parts], [" by the sea"])
    (nll,) = system.answer_nll([asked], ["by the sea"])
    assert nll.tokens == tokens and nll.nats == pytest.approx(nats, rel=1e-5)
    (rows,) = model.prompt_embeds([parts])
    assert system.num_rows(asked) == len(rows) == answer.lengths["prompt_rows"]


def test_arc_counts_tokens_vectors_and_markers(folder: Path, model: ArcModel) -> None:
    (answer,) = make(folder, "arc").answer([prompt()])
    encoder, decoder = model.encoder_tokenizer, model.decoder_tokenizers[0]
    assert encoder is not None and decoder is not None
    vectors = [len(z) - 1 for z in model.compress([LAMP, TOWER])]
    expected = {
        "document_encoder_tokens": len(encoder.encode(LAMP)) + len(encoder.encode(TOWER)),
        "last_document_encoder_tokens": len(encoder.encode(TOWER)),
        "document_decoder_tokens": len(decoder.encode(LAMP)) + len(decoder.encode(TOWER)),
        "last_document_decoder_tokens": len(decoder.encode(TOWER)),
        "vectors": sum(vectors),
        "last_vectors": vectors[1],
        "markers": 2,
        "last_markers": 1,
        "open_book_rows": make(folder, "open").num_rows(prompt()),
    }
    assert {name: answer.lengths[name] for name in expected} == expected
    assert set(answer.lengths) == {*expected, "prompt_rows", "new_tokens"}


@pytest.mark.parametrize("kind", ["arc", "open"])
def test_work_on_examples_is_kept_and_changes_no_bit(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors and rows of examples are kept for the next batch, and vectors of a batch for its NLL."""
    system, compressed, shared = make(folder, kind), list[int](), list[int]()
    compress, read = ArcModel.compress, Decoder.read_shared

    def counted(self: ArcModel, contexts: Sequence[Any], *args: Any) -> Any:
        compressed.append(len(contexts))
        return compress(self, contexts, *args)

    def recorded(self: Decoder, batch: Any, *args: Any) -> Any:
        shared.append(batch.num_decoder_rows)
        return read(self, batch, *args)

    monkeypatch.setattr(ArcModel, "compress", counted)
    monkeypatch.setattr(Decoder, "read_shared", recorded)
    batches = [[prompt(0), prompt(1, document=LAMP[5:])], [prompt(2)], [prompt(3), prompt(4, document=TOWER[9:])]]
    found = [(system.answer(batch), system.answer_nll(batch, ["by the sea"] * len(batch))) for batch in batches]
    assert compressed == ([1, 2, 1, 2] if kind == "arc" else [])
    assert shared == [system.num_rows(dataclasses.replace(prompt(), parts=prompt().shared))]
    for batch, before in reversed(list(zip(batches, found, strict=True))):
        system.forget()
        assert (system.answer(batch), system.answer_nll(batch, ["by the sea"] * len(batch))) == before
    assert len(shared) == 4 and len(compressed) == (10 if kind == "arc" else 0)  # all forgotten
    others = [prompt(0), prompt(1, shared=("Document: ",))]  # examples that differ are not shared
    assert [answer.text for answer in system.answer(others)] == [
        a.text for each in others for a in system.answer([each])
    ]


@pytest.mark.parametrize(("kind", "template"), [("arc", "none"), ("arc", "llama2"), ("open", "none")])
def test_a_long_document_is_read_once_for_all_questions_on_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, template: str
) -> None:
    samples = [replace(eval_sample(n, "narrativeqa"), passages=(f"{TOWER} {LAMP} " * 4,)) for n in range(4)]
    prompts = make_prompts(TASKS["narrativeqa"], samples, None, CLEAN, max_new_tokens=4)
    system, read, compressed = make(folder, kind, chat_template=template), list[int](), list[int]()
    compress, read_shared = ArcModel.compress, Decoder.read_shared

    def recorded(self: Decoder, batch: Any, *args: Any) -> Any:
        read.append(batch.num_decoder_rows)
        return read_shared(self, batch, *args)

    def counted(self: ArcModel, contexts: Sequence[Any], *args: Any) -> Any:
        compressed.append(len(contexts))
        return compress(self, contexts, *args)

    monkeypatch.setattr(Decoder, "read_shared", recorded)
    monkeypatch.setattr(ArcModel, "compress", counted)
    found = [*system.answer(prompts[:2]), *system.answer(prompts[2:])]
    rows = system.num_rows(replace(prompts[0], parts=prompts[0].shared))
    assert len(read) == 1 and rows - 1 <= read[0] <= rows and sum(compressed) == (kind == "arc")
    apart = make(folder, kind, chat_template=template).answer([replace(each, shared=()) for each in prompts])
    assert [answer.text for answer in found] == [answer.text for answer in apart] and len(read) == 1


@pytest.mark.parametrize(("kind", "shares"), [("bm25", False), ("truncated", True)])
def test_planned_rows_are_those_that_questions_on_a_long_document_share(folder: Path, kind: str, shares: bool) -> None:
    """BM25 chooses other sentences for each question, so it would take the memory of all of them."""
    samples = [replace(eval_sample(n, "narrativeqa"), passages=(f"{TOWER} {LAMP} " * 4,)) for n in range(2)]
    asked = make_prompts(TASKS["narrativeqa"], samples, None, CLEAN)[0]
    system = make(folder, kind, tokens=40)
    assert (system.num_shared_rows(asked) >= 40) == shares and (system.num_shared_rows(asked) == 0) != shares
    assert system.num_shared_rows(prompt()) > 0, "in-context examples have questions of their own"


def test_long_documents_are_compressed_in_chunks_as_in_training(folder: Path, model: ArcModel) -> None:
    """Each chunk has a marker, and a shorter document is one chunk."""
    system, encoder = make(folder, "arc", chunk_tokens=21), model.encoder_tokenizer
    assert encoder is not None

    def chunked(text: str) -> list[torch.Tensor]:
        ids = encoder.encode(text)
        return model.compress([ids[start : start + 21] for start in range(0, len(ids), 21)])

    asked = prompt()
    vectors = {text: chunked(text) for text in (LAMP, TOWER)}
    parts = [Vectors(torch.cat(vectors[p.text])) if isinstance(p, Document) else p for p in asked.parts]
    (answer,), (nll,) = system.answer([asked]), system.answer_nll([asked], ["by the sea"])
    num = len(vectors[TOWER])
    assert num > 2 and [answer.raw] == model.generate([parts], max_new_tokens=6)
    assert nll.nats == pytest.approx(model.nll([parts], [" by the sea"])[0].nats, rel=1e-5)
    (whole,) = make(folder, "arc").answer_nll([asked], ["by the sea"])
    assert abs(nll.nats - whole.nats) > 1e-3
    assert system.num_rows(asked) == len(model.prompt_embeds([parts])[0]) == answer.lengths["prompt_rows"]
    names = ("last_markers", "last_vectors", "last_document_encoder_tokens", "markers")
    rows = sum(map(len, vectors[TOWER]))
    expected = [num, rows - num, len(encoder.encode(TOWER)), num + len(vectors[LAMP])]
    assert [answer.lengths[name] for name in names] == expected
    assert rows_of_arc(folder / "export", chunk_tokens=21)(TOWER) == rows
    assert make(folder, "arc", chunk_tokens=1000).answer([asked]) == make(folder, "arc").answer([asked])
    with pytest.raises(DataError, match="the document '' has no token"):
        system.num_rows(prompt(document=""))


def test_systems_that_are_alive_share_weights(folder: Path) -> None:
    systems = [make(folder, "arc"), make(folder, "arc", pooling_factor=2, marker="none"), make(folder, "open")]
    assert len({id(system.reader.decoder) for system in systems}) == 1
    assert systems[0].model.compressor is systems[1].model.compressor
    alone = ArcModel.from_checkpoint(folder / "export", [folder / "decoder"], pooling_factor=2)
    parts = [Context(p.text, None) if isinstance(p, Document) else p for p in prompt().parts]
    nats = [system.answer_nll([prompt()], ["by the sea"])[0].nats for system in systems]
    assert nats[1] == pytest.approx(alone.nll([parts], [" by the sea"])[0].nats, rel=1e-5) and len(set(nats)) == 3
    budget = rows_of_arc(folder / "export", marker=None, pooling_factor=2)
    own, others = (system.lengths_of_documents(prompt())["last_vectors"] for system in systems[1::-1])
    assert budget(TOWER) == own > others
    decoder, compressor = (weakref.ref(part) for part in (systems[0].reader.decoder, systems[0].model.compressor))
    del systems
    assert decoder() is compressor() is None  # at once, without a search for cycles


def test_a_decoder_with_adapters_is_shared_by_systems_of_its_export_alone(folder: Path, tmp_path: Path) -> None:
    lora = DecoderLora.of(DECODER, rank=2, scale=0.5)
    write_export(tiny_trained(tmp_path / "run", adapters=(lora,)), tmp_path / "export")
    adapted = {"model": str(tmp_path / "export")}
    names = ("arc", "open", "arc", "arc")
    systems = [make(folder, kind, **keys) for kind, keys in zip(names, ({}, {}, adapted, adapted), strict=True)]
    base, same, own, again = (system.reader.decoder for system in systems)
    assert base is same and own is again and own is not base
    wq = "layers.0.attention.wq.weight"
    assert (own.get_parameter(wq) - base.get_parameter(wq)).norm() > 0.01
    assert systems[2].describe()["decoder_digest"] != systems[0].describe()["decoder_digest"]
    with pytest.raises(ConfigError, match="another engine would answer with the wrong weights.*leave out.*`server`"):
        make(folder, "arc", **adapted, server=ServerSection(url="http://127.0.0.1:1", model="base"))


@pytest.mark.parametrize("kind", ["arc", "closed", "open", "truncated", "bm25"])
def test_answers_do_not_depend_on_the_batch(folder: Path, kind: str) -> None:
    system = make(folder, kind, **({"tokens": 9} if kind in ("truncated", "bm25") else {}))
    prompts = [prompt(n, closed=kind == "closed", max_new_tokens=4 + n, stop=("e",) * (n % 2)) for n in range(4)]
    together = system.answer(prompts)
    assert together == [system.answer([each])[0] for each in prompts]
    assert len({answer.raw for answer in together}) > 1 and {answer.stop for answer in together} >= {"length"}
    nlls = system.answer_nll(prompts, ["by the sea"] * 4)
    for nll, each in zip(nlls, prompts, strict=True):
        (alone,) = system.answer_nll([each], ["by the sea"])
        assert nll.nats == pytest.approx(alone.nats, rel=1e-4) and nll.tokens == alone.tokens > 0
    json.dumps(system.describe())
    assert system.describe()["kind"] == kind


def test_text_systems_read_their_documents(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked, like = prompt(), str(folder / "export")
    parts = {
        "open": make(folder, "open").parts(asked),
        "closed": make(folder, "closed").parts(prompt(closed=True)),
        "head": make(folder, "truncated", like=like).parts(asked),
        "tail": make(folder, "truncated", like=like, keep="tail").parts(asked),
        "middle": make(folder, "truncated", like=like, keep="middle").parts(asked),
        "bm25": make(folder, "bm25", tokens=40).parts(asked),
    }
    texts = {name: ["".join(map(str, of))] for name, of in parts.items()}
    assert texts["open"] == [words(asked)] and texts["closed"] == [words(prompt(closed=True))]
    assert len({text for (text,) in texts.values()}) == 6
    before = words(asked).index(TOWER)
    budget = rows_of_arc(folder / "export")(TOWER)
    tokenizer = make(folder, "open").reader.needed_tokenizer()
    for keep in ("head", "tail", "middle"):
        (text,) = texts[keep]
        kept = text.rpartition("Document: ")[2].partition("\nQuestion")[0]
        assert kept and kept in TOWER and kept == cut_to(TOWER, budget, keep, tokenizer)
        assert len(tokenizer.encode(kept)) <= budget < len(tokenizer.encode(TOWER))
    assert "It stands by the sea." in texts["bm25"][0] and TOWER not in texts["bm25"][0]
    assert before > 0 and not caplog.records


def test_closed_book_refuses_documents(folder: Path) -> None:
    system = make(folder, "closed")
    assert not system.uses_documents and make(folder, "open").uses_documents
    with pytest.raises(DataError, match="closed reads no documents, but the prompt of q0 has some"):
        system.answer([prompt()])


def test_a_shortened_prompt_takes_as_many_rows_as_the_compressed_one(folder: Path) -> None:
    """Up to the rounding of tokens: each of two documents may be a few tokens shorter."""
    arc, short = make(folder, "arc"), make(folder, "truncated", like=str(folder / "export"))
    assert 0 <= arc.num_rows(prompt()) - short.num_rows(prompt()) <= 4
    (answer,) = short.answer([prompt()])
    assert answer.lengths["last_kept_decoder_tokens"] <= answer.lengths["last_document_decoder_tokens"] // 2
    assert answer.lengths["prompt_rows"] < answer.lengths["open_book_rows"]


def test_govreport_of_the_reference_is_sampled_by_its_sample(folder: Path) -> None:
    prompts = [prompt(n, task="govreport", max_new_tokens=12) for n in range(3)]
    system, greedy = make(folder, "open", REFERENCE), make(folder, "open")
    drawn = system.answer(prompts)
    assert drawn == system.answer(prompts) == [system.answer([each])[0] for each in prompts]
    assert [a.raw for a in drawn] != [a.raw for a in greedy.answer(prompts)]
    others = [prompt(n, max_new_tokens=12) for n in range(3)]
    assert [a.raw for a in system.answer(others)] == [a.raw for a in greedy.answer(others)]


def test_the_window_is_the_rows_that_the_decoder_reads(folder: Path) -> None:
    system: DecoderSystem = make(folder, "open")
    assert system.max_rows == system.reader.max_positions
    limited = dataclasses.replace(system.reader, max_positions=77)
    assert type(system)("x", limited, settings("x"), description={"kind": "open"}).max_rows == 77  # type: ignore[call-arg]


def test_wrong_keys_are_one_clear_error(folder: Path, model: ArcModel) -> None:
    for keys in ({}, {"tokens": 3, "like": str(folder / "export")}):
        with pytest.raises(ConfigError, match="truncated: set either `tokens` or `like`"):
            make(folder, "truncated", **keys)
    with pytest.raises(ConfigError, match="arc: decoder_idx is 1, but decoders lists 1"):
        make(folder, "arc", decoder_idx=1)
    with pytest.raises(WeightsError, match="does not exist|neither"):
        make(folder, "open", decoder=str(folder / "gone"))
    with pytest.raises(ConfigError, match="marker is 'mid'"):
        ArcSystem("arc", model, settings("arc"), marker="mid")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer(model: ArcModel) -> Tokenizer:
    found = model.decoder_tokenizers[0]
    assert found is not None
    return found


def test_sentences_are_chosen_by_their_words_and_stay_in_order(tokenizer: Tokenizer) -> None:
    text = "Cats sleep all day. The harbour of Varn is deep.\nDogs run. Ships of Varn sail at dawn! Birds sing."
    assert split_sentences(text)[1] == "The harbour of Varn is deep.\n" and len(split_sentences(text)) == 5
    budget = len(tokenizer.encode("The harbour of Varn is deep.\nShips of Varn sail at dawn!"))
    chosen = choose_sentences(text, "When do the ships of Varn leave the harbour?", budget, tokenizer)
    assert chosen == "The harbour of Varn is deep.\nShips of Varn sail at dawn!"
    assert choose_sentences(text, "What do dogs do?", len(tokenizer.encode("Dogs run.")), tokenizer) == "Dogs run."
    assert choose_sentences(text, "x", 10**6, tokenizer) == text
    first = choose_sentences(text, "zzz", budget, tokenizer)
    assert first.startswith("Cats sleep all day.")  # no word of the query occurs


def test_sentences_that_cannot_fit_are_not_tried(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of thousands of sentences would otherwise be tokenised once for each of them."""
    sentences = [f"The ship of {number} sails at dawn." for number in range(100, 300)]
    text, budget = " ".join(sentences), len(tokenizer.encode(" ".join(sentences[:15])))
    seen, encode = list[int](), type(tokenizer).encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, word: [seen.append(len(word)), encode(self, word)][1])
    chosen = choose_sentences(text, "Which ship of 217 sails?", budget, tokenizer)
    assert "of 217 " in chosen and chosen.count(".") == 15 and sum(seen) < 4 * len(text)


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_a_budget_is_never_exceeded(tokenizer: Tokenizer, num_tokens: int) -> None:
    for text in (TOWER, "…", "a", "?! ?!\n\n", "Ünïcödé wörds: 北京 🙂🙂 end."):
        for part in ("head", "tail", "middle"):
            cut = cut_to(text, num_tokens, part, tokenizer)
            assert len(tokenizer.encode(cut)) <= num_tokens and cut in text
        chosen = choose_sentences(text, QUESTION, num_tokens, tokenizer)
        assert len(tokenizer.encode(chosen)) <= num_tokens
    assert choose_sentences("", QUESTION, 3, tokenizer) == ""
    assert cut_to(TOWER, 1000, "middle", tokenizer) == TOWER
