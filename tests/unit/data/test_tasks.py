"""Tasks: prefix, context and target are pieces of the record's text, with the layout of the reference."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.data.tasks import Example, TaskCounts, TaskLimits, closed, mismatched, open_
from arc_ds.data.tasks.text_views import BEGINNING, Cut, TextViews
from arc_ds.errors import DataError
from arc_ds.tokenizers import load_tokenizer, read_together
from tests.helpers.tiny_data import TEXT, numbered_texts, write_tokenizer_without
from tests.unit.data.examples import Pair, check_targets, example_of, golden_case, text_ids

SIZES = {"max_context": 24, "max_prefix": 24, "max_continuation": 24}
TEXTS = st.text(alphabet="the sea of. \n北🚲é", min_size=1, max_size=120)


def make(pair: Pair, text: str, task: str = "continuation", seed: int = 0, **sizes: object) -> Example:
    return example_of(pair, {"text": text}, task=task, seed=seed, **SIZES | sizes)


def parts(example: Example, pair: Pair) -> tuple[str, str, str]:
    """The text before the context, the context, and the text after it, as strings."""
    segments = example.sample.segments
    place = next(idx for idx, segment in enumerate(segments) if segment.kind == "context")
    before = [token for segment in segments[:place] for token in segment.ids]
    behind = [token for segment in segments[place + 1 :] for token in segment.ids]
    return pair[1].decode(before), pair[0].decode(list(segments[place].ids)), pair[1].decode(behind)


@given(text=TEXTS, seed=st.integers(0, 2**64 - 1), task=st.sampled_from(["reconstruction", "continuation"]))
def test_a_sample_is_one_stretch_of_the_text_or_repeats_what_it_compresses(
    pair: Pair, text: str, seed: int, task: str
) -> None:
    try:
        example = make(pair, text, task=task, seed=seed)
    except DataError:
        assert len(pair[1].encode(text)) < 2
        return
    before, context, behind = parts(example, pair)
    assert (context,) == example.contexts
    assert before + context + behind == pair[1].decode(text_ids(open_(example)))
    if example.sample.task == "reconstruction":
        assert (before, context) == ("", behind) and context in text
    else:
        assert before + context + behind in text
    assert example.degraded == (example.sample.task != task)
    assert 1 <= example.sample.num_context_tokens <= 24
    assert "\ufffd" not in before + context + behind
    assert example.sample.num_text_tokens <= 1 + 24 + max(24, len(text.encode()))
    check_targets(example)


def test_validation_variants_have_the_same_targets(pair: Pair) -> None:
    texts = numbered_texts(14)
    examples = [make(pair, text, task=task) for text in texts[3:7] for task in ("reconstruction", "continuation")]
    others = mismatched(examples)
    for example, other in zip(examples, others, strict=True):
        labels = check_targets(example).labels
        assert torch.equal(pack([other], PoolingSpec()).labels, labels)
        assert len({one.segments for one in (example.sample, closed(example), open_(example), other)}) == 4
        assert other.task == example.sample.task


def test_open_variant_is_the_decoder_s_own_reading_of_the_text(pair: Pair) -> None:
    example = make(pair, TEXT[:70])
    assert text_ids(open_(example)) == [pair[1].bos_id, *pair[1].encode(TEXT[:70])]


def test_mismatched_passes_over_the_same_context(pair: Pair) -> None:
    """Held-out questions often share their passage."""
    first, second = (make(pair, text, task="reconstruction") for text in ("the sea of stone", "a lamp, a tower"))
    contexts = [sample.segments[1].ids for sample in mismatched([first, first, second, second])]
    assert contexts == [second.sample.segments[1].ids] * 2 + [first.sample.segments[1].ids] * 2
    with pytest.raises(DataError, match="needs another context"):
        mismatched([first, first])


def test_counts_add_up_in_every_field() -> None:
    names = [field.name for field in fields(TaskCounts)]
    ones, twos = (TaskCounts(**dict.fromkeys(names, number)) for number in (1, 2))
    assert ones + twos == TaskCounts(**dict.fromkeys(names, 3))
    assert not TaskCounts() and all(TaskCounts(**{name: 1}) for name in names)


def test_layout_bos_markers_and_loss(pair: Pair) -> None:
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
    segments = make(pair, TEXT, task="reconstruction", bos=False, markers=frozenset({"cont"})).sample.segments
    assert segments[0].kind == "context"
    assert segments[0].marker is None


def test_short_record_is_shared_out_in_proportion(pair: Pair) -> None:
    text = "abcdefghijklmno"  # a token each
    before, context, behind = parts(make(pair, text), pair)
    assert [len(context), before + context + behind] == [5, text]
    before, context, behind = parts(make(pair, text, max_context=8, max_prefix=0), pair)
    assert before == ""
    assert context and behind


def test_too_short_record_becomes_a_reconstruction_or_an_error(pair: Pair) -> None:
    example = make(pair, "xy")
    assert (example.sample.task, example.degraded) == ("reconstruction", True)
    with pytest.raises(DataError, match="fewer than two"):
        make(pair, "x")


@pytest.mark.parametrize("task", ["reconstruction", "continuation", "long_context", "few_shot"])
def test_a_text_without_encoder_tokens_is_a_data_error(pair: Pair, task: str, tmp_path: Path) -> None:
    """Some tokenizers have no token for some control characters."""
    encoder = load_tokenizer(write_tokenizer_without(tmp_path / "json", 0x16))
    asked = {"question": "q", "answer": "a"}
    texts = ("the sea of stone", "\x16" * 50)
    whole, empty = ({"passages": [text], **asked} if task == "few_shot" else {"text": text} for text in texts)

    made = partial(example_of, (encoder, pair[1]), task=task, **SIZES)
    assert made(whole).sample.num_context_tokens
    for records in [(empty,), (whole, empty)] if task == "few_shot" else [(empty,)]:
        with pytest.raises(DataError, match="no encoder token|too short for a chunk"):
            made(*records)


def test_a_piece_cut_where_the_decoder_cannot_is_read_as_the_middle_of_its_text(golden: Path, pair: Pair) -> None:
    """Words after a document are the middle of a text. sentencepiece prepends a space to a separate text."""
    decoder = load_tokenizer(golden / "tokenizers" / "sp384.model")
    views = TextViews(TEXT, pair[0], decoder)
    cuts = [cut for cut in range(1, len(TEXT)) if cut not in views.decoder.ends]
    assert len(cuts) > 30
    for cut in cuts:
        piece = views.decoder_piece(Cut(cut, 0, None), views.cut(BEGINNING, len(TEXT)))
        (ids,) = read_together(decoder, [TEXT[cut:]], inside=True)
        assert piece.ids.tolist() == ids.tolist()
        assert (piece.ends[0], piece.ends[-1]) == (0, len(TEXT) - cut)
        if TEXT[cut] != " ":
            assert not decoder.decode([*decoder.encode("a"), *piece.ids.tolist()]).startswith("a ")


def test_window_of_a_long_record_moves_with_the_seed(pair: Pair) -> None:
    windows = {make(pair, TEXT, task="reconstruction", seed=seed).contexts for seed in range(40)}
    assert len(windows) > 10


def test_cuts_prefer_boundaries_of_both_tokenizers(pair: Pair) -> None:
    views = TextViews(TEXT, *pair)
    shared = 0
    for num_tokens in range(16, 60):
        end = views.cut(BEGINNING, num_tokens)
        assert end.encoder_token <= num_tokens
        assert views.encoder.ends[end.encoder_token] == end.character
        assert (end.decoder_token is not None) == (end.character in views.decoder.ends)
        shared += end.decoder_token is not None
    assert shared == 44


@pytest.mark.parametrize("name", [field.name for field in fields(TaskLimits) if type(field.default) is int])
def test_sizes_out_of_range_are_refused(name: str) -> None:
    least = {"max_prefix": 0, "max_continuation": 2}.get(name, 1)
    assert getattr(TaskLimits(**{name: least}), name) == least
    with pytest.raises(DataError, match=f"{name} is {least - 1}; expected at least {least}"):
        TaskLimits(**{name: least - 1})


def test_golden_layout_of_the_reference_reconstruction(golden: Path) -> None:
    """The reference packs the context at offset 0, then its text. The first token of the text is input only.

    Our sequence of the same record has begin-of-text before the context; the reference has it inside the text. Our last
    target is the last token of the context's text; the reference's is one token beyond (oddity 34).
    """
    item, golden_pair = golden_case(golden, "recon")
    text = item["to_embed"][0]["text"][0]
    reference_ids = item["x"][: item["sizes"][0]]
    assert item["insert_embed_list"][0] == [0]
    example = make(golden_pair, text, task="reconstruction", max_context=48)
    context = example.sample.segments[1]
    assert [golden_pair[0].bos_id, *context.ids] == item["to_embed"][0]["tokens"][0]
    batch = pack([example.sample], PoolingSpec())
    assert batch.decoder_ids.tolist() == reference_ids
    assert batch.labels.tolist() == reference_ids[2:]


def test_golden_layout_of_the_reference_continuation(golden: Path) -> None:
    """The reference packs begin-of-text and prefix, context, continuation. The continuation's first token is no target.

    The cuts differ because the reference divides a text in another way. So this compares the layout and the targets.
    """
    item, (encoder, decoder) = golden_case(golden, "cont_interleave")
    size = item["sizes"][0]
    (offset,) = item["insert_embed_list"][0]
    targets = [label for label, is_target in zip(item["y"][:size], item["y_mask"][:size], strict=True) if is_target]
    assert targets[:-1] == item["x"][offset + 1 : size]
    assert item["x"][0] == decoder.bos_id
    text = decoder.decode(item["x"][:offset]) + item["to_embed"][0]["text"][0] + decoder.decode(item["x"][offset:size])
    example = make((encoder, decoder), text, max_prefix=48, max_context=48, max_continuation=48)
    batch = pack([example.sample], PoolingSpec())
    ids = batch.decoder_ids.tolist()
    own_offset = len(example.sample.segments[0].ids)
    assert ids[0] == decoder.bos_id
    assert batch.labels.tolist() == ids[own_offset + 1 :]
    assert ids[own_offset:] == decoder.encode(text)[-len(ids) + own_offset :]
