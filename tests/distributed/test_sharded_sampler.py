"""Sampling from vocabulary shards equals sampling from the whole vocabulary, token for token."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from interpreted import by_kernels, needs_triton

from fire_megatron.rollout.sampler import sample_tokens, uniforms

VOCABULARY = 96


def case(rows, *, padding=0, scale=3.0, dtype=torch.float32):
    """The same on every rank: [rows, VOCABULARY] logits with padding at the end, and a number a row."""
    generator = torch.Generator().manual_seed(rows + padding)
    logits = torch.randn(rows, VOCABULARY, generator=generator).mul_(scale).to(dtype)
    logits[:, VOCABULARY - padding :] = float("-inf")
    return logits, uniforms(3, 1, range(rows), 2)


def draw(logits, numbers, group, **options):
    """Sample from this rank's shard; checks that the logits stay as they were and that all ranks agree."""
    width = logits.shape[1] // group.size()
    start = group.rank() * width
    part = logits[:, start : start + width].clone()
    drawn = sample_tokens(part, numbers, vocab_start=start, group=group, **options)
    assert torch.equal(part, logits[:, start : start + width])
    same = torch.stack((drawn.tokens.double(), drawn.log_probs.double(), drawn.entropies.double()))
    gathered = [torch.empty_like(same) for _ in range(group.size())]
    dist.all_gather(gathered, same, group=group)
    assert all(torch.equal(other, same) for other in gathered)
    return drawn


@pytest.fixture
def shards(subgroup, world_size):
    """Groups over which the vocabulary is split, and this rank alone."""
    return subgroup(world_size), subgroup(1)


# 90 of 96 columns padded leave whole shards without a real column.
@pytest.mark.parametrize("padding", [0, 5, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_equals_unsharded(shards, padding, dtype, top_p, temperature):
    equals_unsharded(shards, 500, padding, dtype, top_p, temperature)


def equals_unsharded(shards, rows, padding, dtype, top_p, temperature):
    many, alone = shards
    logits, numbers = case(rows, padding=padding, dtype=dtype)
    options = {"temperature": temperature, "top_p": top_p}
    whole, ours = draw(logits, numbers, alone, **options), draw(logits, numbers, many, **options)
    assert torch.equal(ours.tokens, whole.tokens)
    assert ours.tokens.max() < VOCABULARY - padding
    assert padding == 90 or len(ours.tokens.unique()) > min(30, rows // 4)  # tokens of every shard
    torch.testing.assert_close(ours.log_probs, whole.log_probs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.entropies, whole.entropies, rtol=1e-6, atol=2e-6)


@needs_triton
@pytest.mark.two_ranks
@pytest.mark.parametrize("padding", [5, 90])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_kernels_equal_unsharded(monkeypatch, shards, padding, temperature):
    by_kernels(monkeypatch)
    equals_unsharded(shards, 50, padding, torch.float32, 1.0, temperature)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_ends_of_the_unit_interval_stay_on_tokens_with_mass(shards, number):
    many, _ = shards
    logits = torch.full((2, VOCABULARY), float("-inf"))
    logits[0, 40:60] = 0.0  # within one shard of two, and over shards 1 and 2 of four
    logits[1, [0, 95]] = torch.tensor([0.0, -12.0])
    numbers = torch.full((2,), number, dtype=torch.float64)
    drawn = draw(logits, numbers, many, temperature=1.0, top_p=1.0)
    assert drawn.tokens.tolist() == ([40, 0] if number == 0 else [59, 95])


def test_numbers_on_the_edges_of_shards(shards):
    # 96 equal columns: row k's number is the very edge between columns k - 1 and k, and belongs to k.
    many, _ = shards
    logits, edges = torch.zeros(VOCABULARY, VOCABULARY), torch.arange(VOCABULARY, dtype=torch.float64) / VOCABULARY
    drawn = draw(logits, edges, many, temperature=1.0, top_p=1.0)
    exact = drawn.tokens - torch.arange(VOCABULARY)
    assert exact.abs().max() <= 1  # k / 96 rounds, so an edge may fall to either side, never further
    assert drawn.tokens[:: VOCABULARY // 4].tolist() == [0, 24, 48, 72]  # quarters are exact in binary
    middles = draw(logits, edges + 0.5 / VOCABULARY, many, temperature=1.0, top_p=1.0)
    assert middles.tokens.tolist() == list(range(VOCABULARY))


def test_greedy_takes_the_first_of_equals_over_shards(shards):
    many, _ = shards
    logits = torch.zeros(3, VOCABULARY)
    logits[0, [30, 31, 90]] = 5.0
    logits[1, [95, 70]] = 5.0
    drawn = draw(logits, torch.zeros(3, dtype=torch.float64), many, temperature=0.0, top_p=1.0)
    assert drawn.tokens.tolist() == [30, 70, 0]
    expected = logits.log_softmax(-1).gather(-1, drawn.tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(drawn.log_probs, expected)


def test_nucleus_is_of_the_whole_vocabulary(shards):
    # A nucleus within each shard would keep 60 or 90 too.
    many, _ = shards
    logits = torch.full((400, VOCABULARY), -12.0)
    likely = torch.tensor([3, 30, 60, 90])
    logits[:, likely] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    drawn = draw(logits, uniforms(0, 0, range(400), 0), many, temperature=1.0, top_p=0.6)
    assert set(drawn.tokens.tolist()) == {3, 30}
    expected = torch.where(drawn.tokens == 3, 4 / 7, 3 / 7)
    torch.testing.assert_close(drawn.log_probs.exp(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nucleus_of_equals_keeps_no_more_than_it_needs(shards, dtype):
    # 96 equal tokens: half of the mass is the first 48, not all 96.
    many, _ = shards
    rows = 500
    drawn = draw(
        torch.zeros(rows, VOCABULARY, dtype=dtype), uniforms(0, 0, range(rows), 0), many, temperature=1.0, top_p=0.5
    )
    assert set(drawn.tokens.tolist()) == set(range(48))
    torch.testing.assert_close(drawn.log_probs, torch.full((rows,), 1 / 48).log())


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8)])
def test_frequencies_follow_the_softmax(shards, temperature, top_p):
    many, _ = shards
    rows = 20000
    logits = case(1, padding=5, scale=1.5)[0]
    drawn = draw(logits.expand(rows, -1), uniforms(1, 0, range(rows), 0), many, temperature=temperature, top_p=top_p)
    expected = (logits[0] / temperature).double().softmax(-1)
    if top_p < 1:
        ranked, order = expected.sort(descending=True)
        expected[order[int((ranked.cumsum(0) < top_p).sum()) + 1 :]] = 0
        expected /= expected.sum()
    observed = drawn.tokens.bincount(minlength=VOCABULARY).double()
    assert observed[expected == 0].sum() == 0
    tested = expected * rows >= 5  # the usual rule for Pearson's statistic
    statistic = float(((observed - expected * rows) ** 2 / (expected * rows))[tested].sum())
    freedom = int(tested.sum()) - 1
    # Wilson & Hilferty's cube-root normal at 3.1 standard deviations: p = 0.001. The numbers are fixed.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.1 * np.sqrt(2 / (9 * freedom))) ** 3
    assert freedom > 10 and statistic < limit
    log_p = expected.log()[drawn.tokens]
    torch.testing.assert_close(drawn.log_probs.double(), log_p, rtol=1e-5, atol=1e-5)
