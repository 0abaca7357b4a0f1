"""Rows that all prompts share are read once, and ended sequences leave: the tokens and NLLs are those of plain reading.

The plain path reads every prompt whole, and keeps all sequences until the last one ends. Models are float64 with random
weights, so rounding changes no token. Logits of a wrong variant differ by more than 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arc_ds.batch.segments import TokenIds
from arc_ds.errors import ConfigError, DataError
from arc_ds.inference import generate, reader
from arc_ds.inference.generate import Sampling
from arc_ds.inference.prompt import Vectors
from arc_ds.inference.reader import DecoderReader
from arc_ds.inference.rows import Rows, joined, num_common_rows, num_rows, row_batches, rows_after, rows_before
from arc_ds.model import decoder as decoder_module
from arc_ds.model.backbone_config import RopeScaling
from arc_ds.model.decoder import Decoder
from tests.helpers.tiny_compressor import MANY_PARTS, OUTPUT_NORMED, tiny_decoder

WIDTH, VOCABULARY = 12, 30
LONGROPE = RopeScaling(
    kind="longrope",
    factor=2.0,
    original_max_positions=16,
    attention_factor=1.2,
    short_factors=(1.0, 1.3),
    long_factors=(0.5, 3.0),
)
DYNAMIC = RopeScaling(kind="dynamic", factor=4.0, original_max_positions=8)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "one kv head": {"num_kv_heads": 1},
    "window": {"window": 5, "windowed_layers": (0, 2)},
    "longrope": {"rope_scaling": LONGROPE},
    "dynamic": {"rope_scaling": DYNAMIC},
    "output norms": OUTPUT_NORMED,
    "many parts": MANY_PARTS,
}


def vectors(num: int, seed: int) -> Tensor:
    return torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(num: int, seed: int) -> TokenIds:
    return TokenIds(np.random.default_rng(seed).integers(VOCABULARY, size=num))


DOCUMENT, EXAMPLE = vectors(4, 1), ids(9, 1)
BEGIN = [ids(3, 0), DOCUMENT, EXAMPLE]
PROMPTS: dict[str, list[Rows]] = {
    "ragged": [[*BEGIN, ids(n, 5 + n)] for n in (2, 7, 1)],
    "vectors after the prefix": [[*BEGIN, vectors(n, n), ids(2, 7)] for n in (3, 5)],
    "ends with vectors": [[*BEGIN, vectors(3, 8)], [*BEGIN, vectors(2, 9)]],
    "equal prompts": [[ids(12, 0), DOCUMENT]] * 3,
    "a prompt that is a prefix of another": [BEGIN, [*BEGIN, ids(4, 9)]],
    "ends inside a text": [[ids(12, 0), DOCUMENT, TokenIds([*EXAMPLE, token])] for token in (1, 2)],
    "texts of other lengths before equal vectors": [[ids(n, 0), DOCUMENT, ids(2, 7)] for n in (3, 5)],
    "no common rows": [[ids(8, n + 1), DOCUMENT] for n in range(3)],
    "one": [BEGIN],
}


@contextmanager
def plainly() -> Iterator[None]:
    """Read each prompt whole, and let no sequence leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderReader, "_read_shared", lambda *_: (None, 0))
        patch.setattr(Decoder, "keep", lambda *_: False)
        yield


@contextmanager
def sharing() -> Iterator[list[int]]:
    """Share even a single row. Records the numbers of shared rows."""
    found: list[int] = []
    read = Decoder.read_shared

    def recorded(self: Decoder, batch: Any, z_ZD: Any, max_len: Any) -> Any:
        found.append(batch.num_decoder_rows)
        return read(self, batch, z_ZD, max_len)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_MIN_SAVED_ROWS", 1)
        patch.setattr(Decoder, "read_shared", recorded)
        yield found


def make_reader(**changes: Any) -> DecoderReader:
    return DecoderReader(decoder=tiny_decoder(**changes))


def tokens(
    found: DecoderReader, prompts: Sequence[Rows], limits: int | list[int] = 8, **options: Any
) -> list[list[int]]:
    joined_prompts = [joined(prompt) for prompt in prompts]
    return [line.ids for line in found.continue_rows(joined_prompts, max_new_tokens=limits, **options)]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_rows_change_no_token(family: str) -> None:
    found = make_reader(**FAMILIES[family])
    for name, prompts in PROMPTS.items():
        found.forget()
        with plainly():
            expected = tokens(found, prompts, 5)
        with sharing() as shared:
            ours = tokens(found, prompts, 5)
        assert ours == expected, name
        assert bool(shared) == (name not in ("no common rows", "one")), name
        assert all(count < min(map(num_rows, prompts)) for count in shared)


@pytest.mark.parametrize("family", ["llama", "window", "longrope", "dynamic"])
def test_wrong_variants_of_shared_rows_have_other_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: rotary scalings of the shared rows by their own length; own rows that begin at position 0; other rows."""
    prompts = [[*BEGIN, ids(6, 5 + n)] for n in range(8)]
    with plainly():
        expected = tokens(make_reader(**FAMILIES[family]), prompts, 16)
    read = Decoder.read_shared
    changes = {
        "by_length": lambda self, batch, z_ZD, _len: read(self, batch, z_ZD, batch.num_decoder_rows),
        "other_rows": lambda self, batch, z_ZD, length: read(self, batch, z_ZD.flip(0), length),
        "no_first_row": lambda self, batch, z_ZD, length: _without_first(read(self, batch, z_ZD, length)),
    }
    for name, change in changes.items():
        with sharing():
            monkeypatch.setattr(Decoder, "read_shared", change)
            is_same = tokens(make_reader(**FAMILIES[family]), prompts, 16) == expected
        assert is_same == (name == "by_length" and family in ("llama", "window")), name


def test_shared_rows_of_the_last_call_are_kept_while_they_fit() -> None:
    """Also for a single prompt. They are read again if the prompts have many more rows in common."""
    found = make_reader()
    calls = [
        [[*BEGIN, ids(n, 5 + n)] for n in (2, 7)],
        [[*BEGIN, ids(4, 9)]],
        [[*BEGIN, ids(20, 3), ids(n, n)] for n in (3, 4)],
        [[*BEGIN, ids(20, 3), ids(n, n)] for n in (8, 9)],
        [[*BEGIN[:2], ids(30, 4), ids(n, n)] for n in (8, 9)],
        [[DOCUMENT, ids(5, 1)]],
        [BEGIN],
    ]
    with sharing() as shared:
        for prompts in calls:
            ours = tokens(found, prompts, 3)
            with plainly():
                assert tokens(found, prompts, 3) == ours
    assert shared == [16, 36, 37]


def test_shared_rows_up_to_a_number_depend_on_no_earlier_call() -> None:
    """With `max_shared`, a call reads at most so many rows apart. The rows of the last call do not matter."""
    found, long = make_reader(), ids(20, 3)
    calls = [[[*BEGIN, long, ids(n, n)] for n in (3, 4)], [[*BEGIN, ids(7, 1)]], [[*BEGIN, long, ids(2, 2)]], [BEGIN]]
    expected = []
    with sharing() as shared:
        for prompts in calls:
            with plainly():
                expected.append(tokens(found, prompts, 3))
        for idx in (0, 1, 2, 0, 3, 2):
            assert tokens(found, calls[idx], 3, max_shared=16) == expected[idx]
        assert shared == [16, 15, 16]  # `BEGIN` alone has 16 rows, of which the last one is its own
        assert tokens(found, calls[0], 3, max_shared=0) == expected[0]
    assert len(shared) == 3


def test_kept_rows_are_those_of_the_vectors_before_they_were_written_to() -> None:
    found, document = make_reader(), vectors(40, 1)
    prompts = [[ids(3, 0), document, ids(n, n)] for n in (4, 5)]
    with sharing() as shared:
        before = tokens(found, prompts)
        document.neg_()
        after = tokens(found, prompts)
        with plainly():
            assert tokens(found, prompts) == after != before
    assert len(shared) == 2


def test_stored_vectors_get_the_dtype_of_the_decoder() -> None:
    found = make_reader()
    (part,) = found.rows([Vectors(vectors(3, 1).float())], 0)
    assert isinstance(part, Tensor) and part.dtype == torch.float64


@pytest.mark.parametrize(("family", "times"), [("llama", 1), ("dynamic", 2)])
def test_kept_rows_of_scalings_by_length_need_the_same_length(family: str, times: int) -> None:
    found = make_reader(**FAMILIES[family])
    prompts = [[*BEGIN, ids(n, 5 + n)] for n in (2, 7)]
    with sharing() as shared:
        for limit in (4, 4, 9):
            ours = tokens(found, prompts, limit)
            with plainly():
                assert tokens(found, prompts, limit) == ours
    assert len(shared) == times


def _without_first(shared: Any) -> Any:
    layers = [type(layer)(layer.keys[1:], layer.values[1:]) for layer in shared.layers]
    return shared._replace(layers=layers, num_rows=shared.num_rows - 1)


parts = st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=4)


@given(prompts=st.lists(parts, min_size=1, max_size=4), family=st.sampled_from(["llama", "many parts"]))
@settings(max_examples=6)
def test_any_prompts_have_the_tokens_of_plain_reading(prompts: list[list[tuple[bool, int, int]]], family: str) -> None:
    found = make_reader(**FAMILIES[family])
    rows = [[ids(n, s) if is_text else vectors(n, s) for is_text, n, s in prompt] for prompt in prompts]
    with plainly():
        expected = tokens(found, rows, 4)
    with sharing():
        assert tokens(found, rows, 4) == expected
        assert tokens(found, rows, 4, max_rows=20) == expected


@given(prompts=st.lists(parts, min_size=2, max_size=4))
@settings(max_examples=30)
def test_the_common_rows_are_the_longest_common_prefix(prompts: list[list[tuple[bool, int, int]]]) -> None:
    """A vector is common only together with all others of its part."""
    whole = [joined([ids(n, s) if is_text else vectors(n, s) for is_text, n, s in prompt]) for prompt in prompts]
    units = [[unit for part in prompt for unit in _units(part)] for prompt in whole]
    longest = 0
    while all(len(line) > longest and line[longest] == units[0][longest] for line in units):
        longest += 1
    expected = sum(rows for rows, *_ in units[0][:longest])
    found = num_common_rows(whole)
    assert found == min(expected, min(map(num_rows, whole)) - 1)
    for prompt in whole:
        before, after = rows_before(prompt, found), rows_after(prompt, found)
        assert num_rows(before) == found and num_rows(after) == num_rows(prompt) - found > 0
        both = joined([*before, *after])
        assert [_units(part) for part in both if isinstance(part, TokenIds)] == [
            _units(part) for part in prompt if isinstance(part, TokenIds)
        ]


def _units(part: TokenIds | Tensor) -> list[tuple[int, Any]]:
    return [(1, token) for token in part] if isinstance(part, TokenIds) else [(len(part), part.tolist())]


def test_ended_sequences_leave_and_change_no_token() -> None:
    found, prompts = make_reader(), [[*BEGIN, ids(n, 5 + n)] for n in (2, 7, 1, 4)]
    limits = [3, 8, 1, 0]
    with plainly():
        expected = tokens(found, prompts, limits)
    seen: list[int] = []
    advance = Decoder.advance

    def recorded(self: Decoder, ids_B: Tensor, state: Any) -> Tensor:
        seen.append(ids_B.numel())
        return advance(self, ids_B, state)

    with sharing(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "advance", recorded)
        assert tokens(found, prompts, limits) == expected
    assert seen == [2, 2, 1, 1, 1, 1, 1] and [len(line) for line in expected] == limits


def test_wrong_rows_after_leaving_would_have_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    found, prompts, limits = make_reader(), [[ids(9, 5 + n)] for n in range(4)], [2, 8, 1, 8]
    expected = tokens(found, prompts, limits)
    keep = Decoder.keep
    monkeypatch.setattr(Decoder, "keep", lambda self, state, places: keep(self, state, (places + 1) % 3))
    assert tokens(found, prompts, limits) != expected


def test_a_few_of_many_sequences_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is copied each time, so one of nine sequences does not leave alone."""
    found, kept = make_reader(), list[int]()
    keep = Decoder.keep

    def recorded(self: Decoder, state: Any, places: Tensor) -> bool:
        kept.append(places.numel())
        return keep(self, state, places)

    monkeypatch.setattr(Decoder, "keep", recorded)
    lines = tokens(found, [[ids(5, n)] for n in range(9)], [1, 2, *[4] * 7])
    assert [len(line) for line in lines] == [1, 2, *[4] * 7] and kept == [7]


def test_drawn_tokens_do_not_depend_on_those_that_have_left() -> None:
    found, prompts, limits = make_reader(), [[*BEGIN, ids(3, 5 + n)] for n in range(3)], [1, 9, 4]
    options: dict[str, Any] = {"sampling": Sampling(temperature=1.5, seed=3)}
    with plainly():
        expected = tokens(found, prompts, limits, **options)
    with sharing():
        assert tokens(found, prompts, limits, **options) == expected
    assert expected != tokens(found, prompts, limits)


def test_each_end_has_its_reason() -> None:
    found, prompts = make_reader(), [[ids(5, n)] for n in range(4)]
    free = tokens(found, prompts, 6)
    stop = free[1][3]
    ended = [found_at for line in free for found_at in [line.index(stop) if stop in line else 6]]
    assert ended[0] > 2, "the first sequence ends by the callback"
    lines = found.continue_rows(
        [joined(p) for p in prompts],
        max_new_tokens=6,
        stop_ids=[stop],
        has_ended=lambda idx, line: idx == 0 and len(line) == 2,
    )
    assert [line.ids for line in lines[1:]] == [line[:end] for line, end in zip(free[1:], ended[1:], strict=True)]
    assert lines[0].ids == free[0][:2] and lines[0].stop == "string" and lines[1].stop == "eos"
    assert {line.stop for line in lines[2:]} <= {"eos", "length"}
    assert [line.stop == "length" for line in lines[2:]] == [len(line.ids) == 6 for line in lines[2:]]


def test_the_callback_hears_of_each_sequence_until_its_end() -> None:
    found, calls = make_reader(), list[tuple[int, int]]()

    def has_ended(idx: int, line: list[int]) -> bool:
        calls.append((idx, len(line)))
        return idx == 1

    found.continue_rows([[ids(5, n)] for n in range(3)], max_new_tokens=[3, 3, 2], has_ended=has_ended, max_rows=16)
    assert calls == [(0, 1), (1, 1), (0, 2), (0, 3), (2, 1), (2, 2)]  # two batches: two prompts and one


@pytest.mark.parametrize("window", [None, 4])
def test_a_step_of_the_kernel_has_the_tokens_of_the_others(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """On a GPU an attention kernel reads the own rows if no rows are shared."""
    found = make_reader(window=window, windowed_layers=(1,) if window else ())
    prompts, limits = [[ids(n, n), vectors(3, n)] for n in (4, 9, 2)], [6, 2, 7]
    expected = tokens(found, prompts, limits)
    cache = decoder_module.KVCache

    class Kernel(cache):
        def __init__(self, config: Any, like: Tensor, **options: Any) -> None:
            monkeypatch.setattr(Tensor, "is_cuda", True)
            super().__init__(config, like, **options)
            monkeypatch.delattr(Tensor, "is_cuda")

    monkeypatch.setattr(decoder_module, "KVCache", Kernel)
    assert tokens(found, prompts, limits) == expected


def test_a_step_in_half_precision_errs_at_most_twice_as_much_as_a_forward() -> None:
    """Both against float64."""
    prompts, exact = [joined([*BEGIN, ids(n, n)]) for n in (2, 5)], make_reader()
    half = DecoderReader(decoder=tiny_decoder().bfloat16())
    lines = [[4, 5, 6, 7], [9, 8, 7, 6]]
    expected, forward = (_last_logits(found, prompts, lines) for found in (exact, half))
    with torch.no_grad(), sharing():
        shared, num_shared = half._read_shared(prompts, None)
        batch, z_ZD = reader.pack_rows([rows_after(p, num_shared) for p in prompts], half.device, half.dtype)
        logits_BV, state = half.decoder.prefill(batch, z_ZD, 4, shared)
        for step in range(4):
            logits_BV = half.decoder.advance(torch.tensor([line[step] for line in lines]), state)
    assert 0 < (logits_BV - expected).norm() <= 2 * (forward - expected).norm()


@torch.no_grad()
def _last_logits(found: DecoderReader, prompts: Sequence[Rows], lines: list[list[int]]) -> Tensor:
    """Logits after prompts and tokens, in one forward without cache."""
    whole = [joined([*prompt, TokenIds(line)]) for prompt, line in zip(prompts, lines, strict=True)]
    batch, z_ZD = reader.pack_rows(whole, found.device, found.dtype)
    return found.decoder.logits(batch, z_ZD, batch.decoder_cu_seqlens[1:].long() - 1).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_nll_is_that_of_the_logits(family: str) -> None:
    found = make_reader(**FAMILIES[family])
    answers = [ids(n, 20 + n) for n in (3, 1, 0)]
    for name in ("ragged", "ends with vectors", "equal prompts"):
        prompts = [joined(prompt) for prompt in PROMPTS[name]]
        given_answers = answers[: len(prompts)]
        expected = [_nll(found, prompt, answer) for prompt, answer in zip(prompts, given_answers, strict=True)]
        found.forget()
        with sharing() as shared:
            ours = found.nll_rows(prompts, given_answers)
            one_by_one = found.nll_rows(prompts, given_answers, max_rows=1)
        assert shared
        for result in (ours, one_by_one):
            assert [each.tokens for each in result] == [len(answer) for answer in given_answers]
            np.testing.assert_allclose([each.nats for each in result], expected, atol=1e-5)
        others = found.nll_rows(prompts, [ids(len(a), 40 + len(a)) for a in given_answers])
        assert abs(others[0].nats - ours[0].nats) > 1e-2


@torch.no_grad()
def _nll(found: DecoderReader, prompt: Rows, answer: TokenIds) -> float:
    """From the logits of the whole sequence alone."""
    batch, z_ZD = reader.pack_rows([joined([*prompt, answer])], torch.device("cpu"), torch.float64)
    rows = torch.arange(len(answer)) + num_rows(prompt) - 1
    log_probs = found.decoder.logits(batch, z_ZD, rows).log_softmax(dim=-1)
    return -float(log_probs[torch.arange(len(answer)), torch.tensor(list(answer), dtype=torch.int64)].sum())


def test_batches_keep_to_the_limit_of_rows() -> None:
    alone = [range(place, place + 1) for place in range(2, 7)]
    assert list(row_batches([3, 3, 3, 8, 1, 20, 2], 8)) == [range(2), *alone]
    assert list(row_batches([2, 2, 2, 2], 8)) == [range(4)] and list(row_batches([], 8)) == []


def test_batches_change_no_token_of_scalings_by_length() -> None:
    """All batches of a call count with its longest sequence."""
    found, prompts = make_reader(rope_scaling=DYNAMIC), [[ids(n, n)] for n in (2, 3, 30)]
    expected = tokens(found, prompts)
    assert tokens(found, prompts, max_rows=1) == expected
    assert tokens(found, prompts[:2], max_rows=1) != expected[:2]


def test_wrong_limits_and_vectors_are_one_clear_error() -> None:
    found, prompt = make_reader(), [ids(3, 0)]
    with pytest.raises(ConfigError, match="max_new_tokens has 2 limits for 1 prompts"):
        found.continue_rows([prompt], max_new_tokens=[1, 2])
    with pytest.raises(ConfigError, match="max_new_tokens is -1; expected a whole number from 0"):
        found.continue_rows([prompt], max_new_tokens=-1)
    with pytest.raises(ConfigError, match="max_rows is 0; expected a whole number from 1"):
        found.continue_rows([prompt], max_new_tokens=1, max_rows=0)
    for wrong in (vectors(2, 0)[:, :-1], vectors(2, 0)[0], vectors(0, 0)):
        with pytest.raises(DataError, match=r"vectors of prompt 3 have shape .*; the decoder reads \[m, 12\]"):
            found.rows([Vectors(wrong)], 3)


def test_a_cache_beyond_the_memory_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "usable_memory_bytes", lambda _device: 10_000)
    with pytest.raises(ConfigError, match=r"GiB can be used. Lower max_new_tokens"):
        make_reader().continue_rows([[ids(3, 0)]], max_new_tokens=1000)
