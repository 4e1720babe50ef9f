"""Sampling on one shard; tests/distributed/test_sampler.py holds it against several."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fire_megatron.rollout.sampler import sample_tokens, uniforms


@pytest.fixture(scope="module")
def alone():
    """A process group of this process alone."""
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if started:
        dist.destroy_process_group()


def draw(logits, numbers, group, temperature=1.0, top_p=1.0):
    return sample_tokens(logits, numbers, temperature=temperature, top_p=top_p, vocab_start=0, group=group)


def test_uniforms_are_a_pure_function_of_their_place_and_look_uniform():
    numbers = torch.cat([uniforms(7, step, range(500), position) for step in range(4) for position in range(50)])
    assert torch.equal(uniforms(7, 2, range(500), 3)[17:19], uniforms(7, 2, [17, 18], 3))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(numbers.unique()) == len(numbers)
    counts, _ = np.histogram(numbers.numpy(), bins=20, range=(0, 1))
    expected = len(numbers) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_frequencies_follow_the_softmax(alone):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    rows = 20000
    drawn = draw(logits.expand(rows, -1), uniforms(1, 0, range(rows), 0), alone, temperature=0.7)
    expected = (logits / 0.7).softmax(-1)[0]
    observed = drawn.tokens.bincount(minlength=40) / rows
    assert (observed - expected).abs().max() < 4 * (0.25 / rows) ** 0.5
    torch.testing.assert_close(drawn.log_probs, (logits / 0.7).log_softmax(-1)[0][drawn.tokens])


def test_entropy_is_of_the_full_softmax_at_temperature_one(alone):
    logits = torch.randn(5, 30)
    logits[:, 25:] = float("-inf")  # vocabulary padding
    drawn = draw(logits, uniforms(1, 0, range(5), 0), alone, temperature=0.5, top_p=0.5)
    reference = torch.distributions.Categorical(logits=logits[:, :25].double()).entropy()
    torch.testing.assert_close(drawn.entropies.double(), reference, rtol=1e-6, atol=1e-6)


def test_top_p_keeps_the_smallest_likeliest_set(alone):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    numbers = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    drawn = draw(logits.expand(100, -1), numbers, alone, top_p=0.7)
    assert set(drawn.tokens.tolist()) == {0, 1}
    torch.testing.assert_close(drawn.log_probs.exp(), torch.tensor([5 / 8, 3 / 8])[drawn.tokens])


def test_greedy_takes_the_first_of_equals(alone):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    drawn = draw(logits, torch.zeros(1, dtype=torch.float64), alone, temperature=0.0)
    assert drawn.tokens.tolist() == [1]
    torch.testing.assert_close(drawn.log_probs, logits.log_softmax(-1)[:, 1])


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_ends_of_the_unit_interval_never_pick_a_token_without_mass(alone, number):
    logits = torch.full((1, 6), float("-inf"))
    logits[0, 2:4] = 0.0
    drawn = draw(logits, torch.tensor([number], dtype=torch.float64), alone)
    assert drawn.tokens.item() == (2 if number == 0 else 3)


def test_extreme_logits_stay_finite(alone):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    drawn = draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), alone)
    assert drawn.tokens.tolist() == [0, 1]
    assert torch.isfinite(drawn.log_probs).all() and torch.isfinite(drawn.entropies).all()
