"""Generation with a KV cache: equal to a forward without it and independent of the batch; stopping and sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.errors import ConfigError
from arc_ds.inference.generate import Sampling
from tests.helpers.generation import generate_ids
from tests.helpers.tiny_compressor import sample, tiny_compressor, tiny_decoder

SPEC = PoolingSpec((GroupRule("factor", 4),))
COMPRESSOR, DECODER = tiny_compressor(), tiny_decoder()
# Models are float64; logits are float32 and of order 1, so rounding is 1e-7. One row too many or too few in the cache
# changes them by 1e-2 or more.
ATOL = 1e-6
pieces = st.lists(st.integers(-9, 6).filter(bool), min_size=1, max_size=4)


@torch.no_grad()
def vectors(samples: list[Sample]) -> Tensor:
    return COMPRESSOR(pack(samples, SPEC))


def run(samples: list[Sample], num_tokens: int = 5, **options) -> tuple[list[list[int]], list[Tensor]]:
    """Return the new tokens and the logits of every step."""
    seen: list[Tensor] = []
    lines = generate_ids(
        DECODER,
        pack(samples, SPEC),
        vectors(samples),
        max_new_tokens=num_tokens,
        on_logits=lambda logits_BV: seen.append(logits_BV.clone()),
        **options,
    )
    return lines, seen


@torch.no_grad()
def without_cache(prompts: list[Sample], lines: list[list[int]]) -> Tensor:
    """Logits [B, steps, V] of each prompt's last row and of every new token but the last, in one forward."""
    longer = [
        Sample("test", (*prompt.segments, Segment.text(line[:-1]))) for prompt, line in zip(prompts, lines, strict=True)
    ]
    batch = pack(longer, SPEC)
    rows = batch.decoder_cu_seqlens[1:, None] + torch.arange(-len(lines[0]), 0)
    return DECODER.logits(batch, vectors(longer), rows.flatten()).unflatten(0, rows.shape)


@given(prompts=st.lists(pieces, min_size=1, max_size=4))
@settings(max_examples=10)
def test_every_step_has_the_logits_of_a_forward_without_cache(prompts: list[list[int]]) -> None:
    samples = [sample(*sizes, seed=idx) for idx, sizes in enumerate(prompts)]
    lines, seen = run(samples, 4)
    expected = without_cache(samples, lines)
    torch.testing.assert_close(torch.stack(seen, dim=1), expected, rtol=0, atol=ATOL)
    assert lines == expected.argmax(dim=-1).tolist()


def test_the_first_token_of_a_prompt_that_ends_with_a_context_sees_it() -> None:
    prompt = sample(3, -8)
    other_context = Sample("test", (prompt.segments[0], sample(3, -8, seed=5).segments[1]))
    ((first, second),) = run([prompt, other_context], 1)[1]
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(first, without_cache([prompt], [[0]])[0, 0], rtol=0, atol=ATOL)


def test_a_stop_id_ends_its_own_line_and_is_left_out() -> None:
    samples = [sample(5), sample(-7, 2, seed=1), sample(3, seed=2)]
    free, _ = run(samples, 8)
    stop = next(token for token in free[1] if token not in (free[0][0], free[1][0], free[2][0]))
    lines, _ = run(samples, 8, stop_ids=[stop])
    assert lines == [line[: line.index(stop)] if stop in line else line for line in free]
    assert len(lines[1]) < 8 == max(len(line) for line in free)


def test_a_line_ends_when_the_caller_says_so() -> None:
    samples = [sample(5), sample(-7, 2, seed=1)]
    free, _ = run(samples, 8)
    lines, seen = run(samples, 8, has_ended=lambda _idx, line: len(line) == (2 if line[0] == free[0][0] else 4))
    assert free[0][0] != free[1][0] and lines == [free[0][:2], free[1][:4]] and len(seen) == 4


def test_generation_stops_when_all_lines_have_ended() -> None:
    lines, seen = run([sample(5)], 50, stop_ids=range(30))
    assert (lines, len(seen)) == ([[]], 1)


def test_no_new_tokens_are_an_empty_line_for_each_prompt() -> None:
    assert run([sample(5), sample(2)], 0)[0] == [[], []]


def test_drawn_tokens_follow_the_seed() -> None:
    samples = [sample(5), sample(-7, 2, seed=1)]

    def drawn(seed: int) -> list[list[int]]:
        return run(samples, 12, sampling=Sampling(temperature=1.5, seed=seed))[0]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(3) != run(samples, 12)[0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.4), (2.0, 0.8), (0.5, 0.9)])
def test_drawn_tokens_come_from_the_smallest_set_that_reaches_top_p(temperature: float, top_p: float) -> None:
    samples = [sample(4, seed=seed) for seed in range(20)]
    lines, seen = run(samples, 10, sampling=Sampling(temperature=temperature, top_p=top_p, seed=1))
    beyond_greedy = 0
    for step, logits_BV in enumerate(seen):
        for idx, logits_V in enumerate(logits_BV):
            probs = torch.softmax(logits_V.double() / temperature, dim=-1)
            token = lines[idx][step]
            likelier = probs[probs > probs[token]].sum()
            assert likelier < top_p + 1e-6
            beyond_greedy += int(likelier > 0)
    assert beyond_greedy > 10, "greedy would pass"


def test_all_of_top_p_draws_by_probability() -> None:
    samples = [sample(4)] * 400
    greedy, seen = run(samples[:1], 1)
    lines, _ = run(samples, 1, sampling=Sampling(temperature=1.0, seed=0))
    share = sum(line == greedy[0] for line in lines) / len(lines)
    expected = torch.softmax(seen[0][0], dim=-1).max().item()
    assert abs(share - expected) < 4 * (expected * (1 - expected) / len(lines)) ** 0.5


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(5e-324, 1.0), (1e-40, 1.0), (1e-30, 1.0), (9.0, 5e-324), (9.0, 1e-50), (9.0, 1e-9)]
)
def test_the_limit_of_small_temperatures_and_top_p_is_greedy(temperature: float, top_p: float) -> None:
    samples = [sample(5), sample(-7, 2, seed=1)]
    assert run(samples, sampling=Sampling(temperature=temperature, top_p=top_p))[0] == run(samples)[0]


@pytest.mark.parametrize("temperature", [1e30, 1e300, 10**300])
def test_the_limit_of_large_temperatures_draws_uniformly(temperature: float) -> None:
    ids = [line[0] for line in run([sample(4)] * 400, 1, sampling=Sampling(temperature=temperature))[0]]
    assert max(map(ids.count, ids)) < 60, "about 400 / 30 each"


@pytest.mark.parametrize("seed", [-(2**63), 2**63, 2**64 - 1])
def test_every_seed_of_torch_is_allowed(seed: int) -> None:
    for same in (seed, np.uint64(seed) if seed >= 0 else np.int64(seed)):
        assert len(run([sample(5)], 3, sampling=Sampling(temperature=1.0, seed=same))[0][0]) == 3


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, True, None])
def test_other_seeds_are_refused(seed) -> None:
    with pytest.raises(ConfigError, match=f"seed is {seed}; expected a whole number from -9223372036854775808"):
        Sampling(seed=seed)


def test_a_cache_beyond_memory_is_refused_before_it_is_allocated(monkeypatch) -> None:
    monkeypatch.setattr("arc_ds.inference.generate.usable_memory_bytes", lambda device: 10_000)
    run([sample(5)], 1)
    with pytest.raises(ConfigError, match=r"1 prompts of up to 5 tokens and max_new_tokens 100 take .* Lower"):
        run([sample(5)], 100)


WRONG_SAMPLING = [(-0.1, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (10**400, 1.0), ("1", 1.0), (None, 1.0)]
WRONG_SAMPLING += [(1.0, p) for p in (0.0, -0.1, 1.1, float("nan"), float("inf"), "1")]


@pytest.mark.parametrize(("temperature", "top_p"), WRONG_SAMPLING)
def test_sampling_that_cannot_be_is_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ConfigError, match="temperature is"):
        Sampling(temperature=temperature, top_p=top_p)


def test_a_text_only_batch_needs_no_vectors() -> None:
    batch = pack([sample(5)], SPEC)
    with_none = generate_ids(DECODER, batch, None, max_new_tokens=4)
    assert with_none == run([sample(5)], 4)[0]
