"""Prompts in a chat's turns: those of training, and the answers of systems that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds import ArcModel
from arc_ds.data.tasks import make_example
from arc_ds.data.tasks.chat import LayoutName, read_layout
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.errors import TokenizerError
from arc_ds.evaluation.datasets import TASKS
from arc_ds.evaluation.prompts import make_prompts
from arc_ds.evaluation.protocol import CLEAN
from arc_ds.evaluation.sample import Document, EvalSample
from arc_ds.evaluation.systems.chat import chat_parts, end_ids
from arc_ds.export.formats import write_export
from arc_ds.inference.prompt import Vectors
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.tiny_export import tiny_trained
from tests.helpers.written import write_chat_tokenizer
from tests.unit.evaluation.test_decoder_system import make, prompt

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}:\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
FACTS = [("The tower is of stone.", "Of what is the tower?", "stone"), ("The lamp held.", "What held?", "The lamp.")]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("chat"), template=TEMPLATE + OPEN)


@pytest.mark.parametrize("num_examples", [0, 1])
@pytest.mark.parametrize("name", ["llama2", "chatml", "tokenizer"])
def test_the_prompt_of_a_chat_is_that_of_its_training(chat_folder: Path, name: LayoutName, num_examples: int) -> None:
    tokenizer = load_tokenizer(chat_folder)
    layout = read_layout(name, tokenizer, chat_folder)
    asked, example = (
        EvalSample(id=question, task="nq", passages=(text,), references=(answer,), question=question)
        for text, question, answer in FACTS
    )
    (planned,) = make_prompts(TASKS["nq"], [asked], [example], CLEAN, num_examples=num_examples)
    vectors = [Vectors(torch.zeros(3, 4)) for part in planned.parts if isinstance(part, Document)]
    found = chat_parts(_filled(planned.parts, vectors), layout, tokenizer)
    assert [each for each in found if isinstance(each, Vectors)] == vectors

    records = [dict(zip(("passage", "question", "answer"), fact, strict=True)) for fact in FACTS[: num_examples + 1]]
    training = make_example(
        records, task="few_shot", seed=0, encoder=tokenizer, decoder=tokenizer, limits=TaskLimits(), layout=layout
    ).sample.segments
    asked_of = [each for each in training if not each.in_loss][: len(found)]
    assert [None if isinstance(each, Vectors) else list(each.ids) for each in found] == [
        None if each.kind == "context" else list(each.ids) for each in asked_of
    ]

    documents = [part.text for part in planned.parts if isinstance(part, Document)]
    texts = chat_parts(_filled(planned.parts, documents), layout, tokenizer)
    assert _text(tokenizer, texts).count("tower is of stone.") == 1, "a system of texts has the document in its turn"
    examples = chat_parts(_filled(planned.shared, vectors), layout, tokenizer)
    assert examples[:-1] == found[: len(examples) - 1], "the examples alone are what the prompt begins with"


def _filled(parts: Any, documents: Any) -> list[Any]:
    each = iter(documents)
    return [next(each) if isinstance(part, Document) else part for part in parts]


def _text(tokenizer: Tokenizer, parts: Any) -> str:
    return "".join(tokenizer.decode(list(part.ids)) for part in parts)


def test_a_long_document_stands_in_the_user_s_turn(chat_folder: Path) -> None:
    """The reference's form of long documents: label, vectors and instruction; the answer's label opens the answer."""
    tokenizer = load_tokenizer(chat_folder)
    layout = read_layout("chatml", tokenizer, chat_folder)
    sample = EvalSample(id="a", task="qasper", passages=("The sea.",), references=("x",), question="Where?")
    (planned,) = make_prompts(TASKS["qasper"], [sample], None, CLEAN)
    found = chat_parts(_filled(planned.parts, [Vectors(torch.zeros(1, 4))]), layout, tokenizer)
    before, _, after = found
    assert _text(tokenizer, [before]).endswith("user\nArticle:\n")
    user, answer = _text(tokenizer, [after]).split("assistant\n")
    assert user == f"\n\n{TASKS['qasper'].instruction}\n\nQuestion:\nWhere?\n" and answer == "Answer:\n"
    assert end_ids(layout) == (tokenizer.special_ids["<|im_end|>"],)


def test_a_system_reads_the_turns_of_training_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    write_export(tiny_trained(tmp_path / "run", chat_templates=["llama2"]), export)
    asked = prompt()
    chat, given, plain = (
        make(folder, "arc", model=str(model), chat_template=name)
        for model, name in ((export, "auto"), (folder / "export", "llama2"), (export, "none"))
    )
    assert chat.describe()["chat_template"] == "llama2" and plain.describe()["chat_template"] == "none"
    assert make(folder, "arc").answer([asked]) == plain.answer([asked]) != chat.answer([asked])
    assert chat.answer([asked]) == given.answer([asked])
    nll = [system.answer_nll([asked], ["by the sea"])[0] for system in (chat, given, plain)]
    assert nll[0] == nll[1] and nll[0].tokens == nll[2].tokens and nll[0].nats != pytest.approx(nll[2].nats, rel=1e-3)

    arc = ArcModel.from_checkpoint(export, [folder / "decoder"])
    reader = arc.readers[0]
    layout = read_layout("llama2", reader.needed_tokenizer(), folder / "decoder")
    vectors = arc.compress([part.text for part in asked.parts if isinstance(part, Document)])
    parts = chat_parts(_filled(asked.parts, map(Vectors, vectors)), layout, reader.needed_tokenizer())
    (expected,) = reader.generate([parts], max_new_tokens=6)
    assert chat.answer([asked])[0].raw == expected.raw
    assert chat.num_rows(asked) == chat.answer([asked])[0].lengths["prompt_rows"] > plain.num_rows(asked)


def test_examples_in_a_chat_are_read_once_and_change_no_bit(folder: Path) -> None:
    prompts = [prompt(n) for n in range(3)]
    system, fresh = (make(folder, "arc", chat_template="llama2") for _ in range(2))
    together = system.answer(prompts)
    assert system.answer(prompts) == together == [fresh.answer([each])[0] for each in prompts]


def test_a_tokenizer_without_the_template_is_named(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="chatml needs the special tokens"):
        make(folder, "open", chat_template="chatml")
