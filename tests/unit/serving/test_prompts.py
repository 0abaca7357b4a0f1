"""Prompts of requests are those of training, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from arc_ds import ArcModel, Context, Segment
from arc_ds.data.tasks.chat import PLAIN, Layout, read_layout
from arc_ds.data.tasks.example import ExampleSpec
from arc_ds.data.tasks.kinds.few_shot import TASK as FEW_SHOT
from arc_ds.data.tasks.kinds.question_answering import TASK as QUESTION_ANSWERING
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.task import Task
from arc_ds.export.formats import write_export
from arc_ds.serving import prompts
from arc_ds.serving.protocol import ChatBody, CompletionBody, RequestError
from tests.helpers.served import served
from tests.helpers.tiny_export import tiny_trained, write_decoder

DOCUMENT, QUESTION = "Wind came from the sea; the lamp held.", "Which lamp held?"
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ArcModel:
    folder = tmp_path_factory.mktemp("prompts")
    write_export(tiny_trained(folder / "run"), folder / "export")
    (write_decoder(folder / "decoder") / "chat_template.jinja").write_text(TEMPLATE)
    found = ArcModel.from_checkpoint(folder / "export", decoders=[folder / "decoder"])
    found.folder = folder / "decoder"
    return found


def layout_of(model: ArcModel) -> Layout:
    return read_layout("tokenizer", model.decoder_tokenizers[0], model.folder)


def chat(*messages: dict[str, Any], **fields: Any) -> prompts.Chat:
    return prompts.read_chat(ChatBody(messages=list(messages), **fields), "cont")


def user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def document(text: str) -> dict[str, Any]:
    return {"type": "document", "text": text}


def trained(model: ArcModel, layout: Layout, task: Task, records: list[dict[str, Any]]) -> list[Piece]:
    """The sample of a training task."""
    spec = ExampleSpec("test", 3, model.encoder_tokenizer, model.decoder_tokenizers[0], TaskLimits(), layout)
    return pieces(task.example(records, spec).sample.segments)


Piece = tuple[str, int, Any]


def pieces(segments: Iterable[Segment]) -> list[Piece]:
    """Tokens and contexts, one by one."""
    return [
        piece
        for segment in segments
        for piece in (
            [("context", hash(segment.ids), segment.marker)]
            if segment.kind == "context"
            else [("text", token, None) for token in segment.ids]
        )
    ]


def record(place: int = 0) -> dict[str, Any]:
    passages = [DOCUMENT, "A lamp of stone."]
    return {"passages": [passages[place]], "question": QUESTION, "answer": ["The tower"]}


def asked(model: ArcModel, layout: Layout, found: prompts.Chat) -> list[Piece]:
    if layout.is_chat:
        return pieces(prompts.chat_segments(found, layout, model.encoder_tokenizer, model.decoder_tokenizers[0]))
    return pieces(model.segments(list(prompts.write_plain(found))))


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_a_question_on_a_document_is_written_as_in_training(model: ArcModel, kind: str) -> None:
    layout = PLAIN if kind == "plain" else layout_of(model)
    sample = trained(model, layout, QUESTION_ANSWERING, [record()])
    for found in (chat(user(QUESTION), documents=[DOCUMENT]), chat(user(document(DOCUMENT), f" {QUESTION}\n"))):
        ours = asked(model, layout, found)
        assert ours == sample[: len(ours)] and any(piece[0] == "context" for piece in ours)
        answer = model.decoder_tokenizers[0].decode([piece[1] for piece in sample[len(ours) :]])
        assert answer.strip() == "The tower"
    other = asked(model, layout, chat(user(QUESTION), documents=["Another one"]))
    assert other != sample[: len(other)]


def test_earlier_turns_are_written_as_the_examples_of_training(model: ArcModel) -> None:
    sample = trained(model, PLAIN, FEW_SHOT, [record(0), record(1)])
    turns = (user(QUESTION, document(text)) for text in ("A lamp of stone.", DOCUMENT))
    first, second = turns
    ours = asked(model, PLAIN, chat(first, {"role": "assistant", "content": "The tower"}, second))
    assert ours == sample[: len(ours)]
    assert model.decoder_tokenizers[0].decode([piece[1] for piece in sample[len(ours) :]]).strip() == "The tower"


def chat_ids(model: ArcModel, *messages: dict[str, Any]) -> list[int]:
    tokenizers = model.encoder_tokenizer, model.decoder_tokenizers[0]
    (segment,) = prompts.chat_segments(chat(*messages), layout_of(model), *tokenizers)
    return list(segment.ids)


def test_a_server_answers_in_the_template(model: ArcModel) -> None:
    layout, tokenizers = layout_of(model), (model.encoder_tokenizer, model.decoder_tokenizers[0])
    texts = []
    with served(model, layout=layout) as found:
        for documents in ([DOCUMENT], []):
            body = {"messages": [user(QUESTION)], "documents": documents, "max_tokens": 12}
            segments = prompts.chat_segments(chat(user(QUESTION), documents=documents), layout, *tokenizers)
            (ids,) = model.generate_ids([segments], max_new_tokens=12, stop_ids=model.decoder_stop_ids[0])
            text = model.decoder_tokenizers[0].decode(ids)
            # The space after the template's "Answer:" is no part of the answer.
            texts.append(text.removeprefix(" ") if documents else text)
            assert found.ask("/v1/chat/completions", body).text == texts[-1]
    assert texts[0] != texts[1]


def test_a_chat_without_documents_is_a_plain_turn_of_its_template(model: ArcModel) -> None:
    bos, *words = chat_ids(model, {"role": "system", "content": "Be brief."}, user("Hello"))
    assert bos == 0
    assert model.decoder_tokenizers[0].decode(words) == "user\nBe brief.\n\nHello\nassistant\n"


def test_instructions_stand_before_the_first_turn_only(model: ArcModel) -> None:
    messages = ({"role": "system", "content": "Brief."}, user("a"), {"role": "assistant", "content": "b"}, user("c"))
    words = model.decoder_tokenizers[0].decode([idx for idx in chat_ids(model, *messages) if idx > 1])
    assert words == "user\nBrief.\n\na\nassistant\nb\nuser\nc\nassistant\n"


def test_names_of_special_tokens_in_a_message_stay_text(model: ArcModel) -> None:
    usual = chat_ids(model, user("x"))
    for text in ("</s>", "<s>assistant"):
        ids = chat_ids(model, user(text))
        assert [ids.count(special) for special in (0, 1)] == [usual.count(special) for special in (0, 1)]


def test_a_completion_has_its_contexts_in_place_and_its_documents_first() -> None:
    body = CompletionBody(prompt="So <context>one</context> is", documents=["two", {"text": "three"}])
    one, two, three = (Context(text, None) for text in ("one", "two", "three"))
    found = prompts.read_completion(body, None)
    assert found == ("Document: ", two, three, "\n", "So ", one, " is")
    assert prompts.as_text(found) == "Document: twothree\nSo one is"


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([{"role": "assistant", "content": "x"}, user("y")], "must begin and end with a message of the user"),
        ([user("y"), {"role": "assistant", "content": "x"}], "must begin and end with a message of the user"),
        ([{"role": "system", "content": "x"}], "must begin and end with a message of the user"),
        ([user("  ")], "the last message is empty"),
        ([{"role": "system", "content": [document("x")]}, user("y")], "must be in a message of the user"),
    ],
)
def test_conversations_that_no_template_can_write_are_refused(messages: list[dict[str, Any]], fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        chat(*messages)


def test_documents_of_the_request_come_before_those_of_the_last_message() -> None:
    turns = chat(user("q", document("b")), documents=["a"]).turns
    assert [context.text for context in turns[-1].documents] == ["a", "b"]


def test_adjacent_messages_of_one_role_are_one() -> None:
    found = chat(user("a"), user("b", document("d")), {"role": "assistant", "content": "c"}, user("e"))
    first, last = found.turns
    assert first == prompts.ChatTurn((Context("d", "cont"),), "a\n\nb", "c") and last.words == "e"
