"""Tasks: prefix, context and target are pieces of the record's text, with the layout of the reference."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.data.tasks import Example, TaskCounts, TaskLimits, closed, make_example, mismatched, open_
from arc_ds.data.tasks.text_views import BEGINNING, Cut, TextViews
from arc_ds.errors import DataError
from arc_ds.tokenizers import Tokenizer, load_tokenizer, read_together
from tests.helpers.tiny_data import TEXT, numbered_texts, write_json_tokenizer, write_tiktoken, write_tokenizer_without

LIMITS = TaskLimits(max_context=24, max_prefix=24, max_continuation=24)
TEXTS = st.text(alphabet="the sea of. \n北🚲é", min_size=1, max_size=120)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """Tokenizers of the encoder and the decoder, of different kinds."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return load_tokenizer(write_tiktoken(folder / "t.model")), load_tokenizer(write_json_tokenizer(folder / "json"))


def make(pair: tuple[Tokenizer, Tokenizer], text: str, task="continuation", seed=0, limits=LIMITS) -> Example:
    return make_example([{"text": text}], task=task, seed=seed, encoder=pair[0], decoder=pair[1], limits=limits)


def parts(example: Example, pair: tuple[Tokenizer, Tokenizer]) -> tuple[str, str, str]:
    """The text before the context, the context, and the text after it, as strings."""
    segments = example.sample.segments
    place = next(idx for idx, segment in enumerate(segments) if segment.kind == "context")
    before = [token for segment in segments[:place] for token in segment.ids]
    behind = [token for segment in segments[place + 1 :] for token in segment.ids]
    return pair[1].decode(before), pair[0].decode(list(segments[place].ids)), pair[1].decode(behind)


@given(text=TEXTS, seed=st.integers(0, 2**64 - 1))
def test_continuation_is_one_stretch_of_the_text(pair: tuple[Tokenizer, Tokenizer], text: str, seed: int) -> None:
    try:
        example = make(pair, text, seed=seed)
    except DataError:
        assert len(pair[1].encode(text)) < 2
        return
    before, context, behind = parts(example, pair)
    assert (context,) == example.contexts
    assert before + context + behind == pair[1].decode([i for s in open_(example).segments for i in s.ids])
    if example.degraded:
        assert context == behind
    else:
        assert before + context + behind in text
    assert 1 <= example.sample.num_context_tokens <= LIMITS.max_context
    assert "\ufffd" not in before + context + behind
    assert example.sample.num_text_tokens <= 1 + LIMITS.max_prefix + max(LIMITS.max_continuation, len(text.encode()))


@given(text=TEXTS, seed=st.integers(0, 2**64 - 1))
def test_reconstruction_repeats_what_it_compresses(pair: tuple[Tokenizer, Tokenizer], text: str, seed: int) -> None:
    try:
        example = make(pair, text, task="reconstruction", seed=seed)
    except DataError:
        return
    before, context, behind = parts(example, pair)
    assert (before, context) == ("", behind)
    assert context in text
    assert not example.degraded


@given(text=TEXTS, task=st.sampled_from(["reconstruction", "continuation"]))
def test_every_label_is_the_next_token_of_the_decoder_s_text(
    pair: tuple[Tokenizer, Tokenizer], text: str, task: str
) -> None:
    try:
        example = make(pair, text, task=task)
    except DataError:
        return
    batch = pack([example.sample], PoolingSpec())
    is_text = torch.zeros(batch.num_decoder_rows, dtype=torch.bool)
    is_text[batch.text_rows] = True
    tokens = torch.full((batch.num_decoder_rows + 1,), -1)
    tokens[batch.text_rows] = batch.decoder_ids
    assert is_text[batch.label_rows].all()
    assert torch.equal(batch.labels, tokens[batch.label_rows + 1])
    assert batch.num_labels > 0


def test_validation_variants_have_the_same_targets(pair: tuple[Tokenizer, Tokenizer]) -> None:
    texts = numbered_texts(14)
    examples = [make(pair, text, task=task) for text in texts[3:7] for task in ("reconstruction", "continuation")]
    others = mismatched(examples)
    for example, other in zip(examples, others, strict=True):
        variants = (example.sample, closed(example), open_(example), other)
        labels = [pack([variant], PoolingSpec()).labels for variant in variants]
        assert all(torch.equal(label, labels[0]) for label in labels)
        assert len({tuple(variant.segments) for variant in variants}) == 4
        assert closed(example).num_context_tokens == open_(example).num_context_tokens == 0
        assert other.task == example.sample.task


def test_open_variant_is_the_decoder_s_own_reading_of_the_text(pair: tuple[Tokenizer, Tokenizer]) -> None:
    example = make(pair, TEXT[:70])
    ids = [token for segment in open_(example).segments for token in segment.ids]
    assert ids == [pair[1].bos_id, *pair[1].encode(TEXT[:70])]


def test_mismatched_needs_another_context(pair: tuple[Tokenizer, Tokenizer]) -> None:
    example = make(pair, TEXT)
    with pytest.raises(DataError, match="another context"):
        mismatched([example])
    with pytest.raises(DataError, match="another context"):
        mismatched([example, example])


def test_mismatched_passes_over_the_same_context(pair: tuple[Tokenizer, Tokenizer]) -> None:
    """Held-out questions often share their passage."""
    first, second = (make(pair, text, task="reconstruction") for text in ("the sea of stone", "a lamp, a tower"))
    contexts = [sample.segments[1].ids for sample in mismatched([first, first, second, second])]
    assert contexts == [second.sample.segments[1].ids] * 2 + [first.sample.segments[1].ids] * 2


def test_counts_add_up_in_every_field() -> None:
    names = [field.name for field in fields(TaskCounts)]
    ones, twos = (TaskCounts(**dict.fromkeys(names, number)) for number in (1, 2))
    assert ones + twos == TaskCounts(**dict.fromkeys(names, 3))
    assert not TaskCounts() and all(TaskCounts(**{name: 1}) for name in names)


def test_layout_bos_markers_and_loss(pair: tuple[Tokenizer, Tokenizer]) -> None:
    continuation = make(pair, TEXT).sample
    assert [(s.kind, s.marker, s.in_loss) for s in continuation.segments] == [
        ("text", None, False),
        ("context", "cont", False),
        ("text", None, False),
        ("text", None, True),
    ]
    assert continuation.segments[0].ids[0] == pair[1].bos_id
    reconstruction = make(pair, TEXT, task="reconstruction").sample
    assert reconstruction.segments[0].ids == (pair[1].bos_id,)
    assert reconstruction.segments[1].marker == "rec"
    bare = TaskLimits(max_context=24, bos=False, markers=frozenset({"cont"}))
    segments = make(pair, TEXT, task="reconstruction", limits=bare).sample.segments
    assert segments[0].kind == "context"
    assert segments[0].marker is None


def test_short_record_is_shared_out_in_proportion(pair: tuple[Tokenizer, Tokenizer]) -> None:
    text = "abcdefghijklmno"  # a token each
    before, context, behind = parts(make(pair, text), pair)
    assert [len(context), before + context + behind] == [5, text]
    before, context, behind = parts(make(pair, text, limits=TaskLimits(max_context=8, max_prefix=0)), pair)
    assert before == ""
    assert context and behind


def test_too_short_record_becomes_a_reconstruction_or_an_error(pair: tuple[Tokenizer, Tokenizer]) -> None:
    example = make(pair, "xy")
    assert (example.sample.task, example.degraded) == ("reconstruction", True)
    with pytest.raises(DataError, match="fewer than two"):
        make(pair, "x")


@pytest.mark.parametrize("task", ["reconstruction", "continuation", "long_context", "few_shot"])
def test_a_text_without_encoder_tokens_is_a_data_error(
    pair: tuple[Tokenizer, Tokenizer], task: str, tmp_path: Path
) -> None:
    """Some tokenizers have no token for some control characters."""
    encoder = load_tokenizer(write_tokenizer_without(tmp_path / "json", 0x16))
    asked = {"question": "q", "answer": "a"}
    texts = ("the sea of stone", "\x16" * 50)
    whole, empty = ({"passages": [text], **asked} if task == "few_shot" else {"text": text} for text in texts)

    def made(*records: dict) -> Example:
        return make_example(records, task=task, seed=0, encoder=encoder, decoder=pair[1], limits=LIMITS)  # type: ignore[arg-type]

    assert made(whole).sample.num_context_tokens
    for records in [(empty,), (whole, empty)] if task == "few_shot" else [(empty,)]:
        with pytest.raises(DataError, match="no encoder token|too short for a chunk"):
            made(*records)


def test_a_piece_cut_where_the_decoder_cannot_is_read_as_the_middle_of_its_text(golden: Path, tmp_path: Path) -> None:
    """Words after a document are the middle of a text. sentencepiece prepends a space to a separate text."""
    decoder = load_tokenizer(golden / "tokenizers" / "sp384.model")
    views = TextViews(TEXT, load_tokenizer(write_tiktoken(tmp_path / "t.model")), decoder)
    cuts = [cut for cut in range(1, len(TEXT)) if cut not in views.decoder.ends]
    assert len(cuts) > 30
    for cut in cuts:
        piece = views.decoder_piece(Cut(cut, 0, None), views.cut(BEGINNING, len(TEXT)))
        (ids,) = read_together(decoder, [TEXT[cut:]], inside=True)
        assert piece.ids.tolist() == ids.tolist()
        assert (piece.ends[0], piece.ends[-1]) == (0, len(TEXT) - cut)
        if TEXT[cut] != " ":
            assert not decoder.decode([*decoder.encode("a"), *piece.ids.tolist()]).startswith("a ")


def test_window_of_a_long_record_moves_with_the_seed(pair: tuple[Tokenizer, Tokenizer]) -> None:
    windows = {make(pair, TEXT, task="reconstruction", seed=seed).contexts for seed in range(40)}
    assert len(windows) > 10


def test_cuts_prefer_boundaries_of_both_tokenizers(pair: tuple[Tokenizer, Tokenizer]) -> None:
    views = TextViews(TEXT, *pair)
    shared = 0
    for num_tokens in range(16, 60):
        end = views.cut(BEGINNING, num_tokens)
        assert end.encoder_token <= num_tokens
        assert views.encoder.ends[end.encoder_token] == end.character
        assert (end.decoder_token is not None) == (end.character in views.decoder.ends)
        shared += end.decoder_token is not None
    assert shared == 44


@pytest.mark.parametrize(
    "name", ["max_documents", "max_passages", "max_question", "max_answer", "chunk_tokens", "max_chunks"]
)
def test_sizes_of_fine_tuning_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is 0; expected at least 1"):
        TaskLimits(**{name: 0})


@pytest.mark.parametrize("sizes", [{"max_context": 0}, {"max_prefix": -1}, {"max_continuation": 1}])
def test_sizes_out_of_range_are_refused(sizes: dict) -> None:
    with pytest.raises(DataError, match="at least 1, 0 and 2"):
        TaskLimits(**sizes)


def _texts_of(golden: Path, case: str) -> tuple[dict, list[dict]]:
    spec = json.loads((golden / "data" / f"{case}.json").read_text())
    return spec, spec["items"]


def test_golden_layout_of_the_reference_reconstruction(golden: Path) -> None:
    """The reference packs the context at offset 0, then its text. The first token of the text is input only.

    Our sequence of the same record has begin-of-text before the context; the reference has it inside the text. Our last
    target is the last token of the context's text; the reference's is one token beyond (oddity 34).
    """
    spec, items = _texts_of(golden, "recon")
    encoder = load_tokenizer(golden / "tokenizers" / spec["tokenizers"]["embed"])
    decoder = load_tokenizer(golden / "tokenizers" / spec["tokenizers"]["llm"])
    text = items[0]["to_embed"][0]["text"][0]
    reference_ids = items[0]["x"][: items[0]["sizes"][0]]
    assert items[0]["insert_embed_list"][0] == [0]
    example = make_example(
        [{"text": text}],
        task="reconstruction",
        seed=0,
        encoder=encoder,
        decoder=decoder,
        limits=TaskLimits(max_context=48),
    )
    context = example.sample.segments[1]
    assert [encoder.bos_id, *context.ids] == items[0]["to_embed"][0]["tokens"][0]
    batch = pack([example.sample], PoolingSpec())
    assert batch.decoder_ids.tolist() == reference_ids
    assert batch.labels.tolist() == reference_ids[2:]


def test_golden_layout_of_the_reference_continuation(golden: Path) -> None:
    """The reference packs begin-of-text and prefix, context, continuation. The continuation's first token is no target.

    The cuts differ because the reference divides a text in another way. So this compares the layout and the targets.
    """
    spec, items = _texts_of(golden, "cont_interleave")
    encoder = load_tokenizer(golden / "tokenizers" / spec["tokenizers"]["embed"])
    decoder = load_tokenizer(golden / "tokenizers" / spec["tokenizers"]["llm"])
    item, size = items[0], items[0]["sizes"][0]
    (offset,) = item["insert_embed_list"][0]
    targets = [label for label, is_target in zip(item["y"][:size], item["y_mask"][:size], strict=True) if is_target]
    assert targets[:-1] == item["x"][offset + 1 : size]
    assert item["x"][0] == decoder.bos_id
    text = decoder.decode(item["x"][:offset]) + item["to_embed"][0]["text"][0] + decoder.decode(item["x"][offset:size])
    limits = TaskLimits(max_prefix=48, max_context=48, max_continuation=48)
    record = {"text": text}
    example = make_example([record], task="continuation", seed=0, encoder=encoder, decoder=decoder, limits=limits)
    batch = pack([example.sample], PoolingSpec())
    ids = batch.decoder_ids.tolist()
    own_offset = len(example.sample.segments[0].ids)
    assert ids[0] == decoder.bos_id
    assert batch.labels.tolist() == ids[own_offset + 1 :]
    assert ids[own_offset:] == decoder.encode(text)[-len(ids) + own_offset :]
