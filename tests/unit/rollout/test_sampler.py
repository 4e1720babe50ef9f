"""Sampling on one shard; tests/distributed/test_sharded_sampler.py holds several against it, and has the rest."""

import numpy as np
import torch

from fire_megatron.rollout.sampler import sample_tokens, uniforms


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


def test_frequencies_follow_the_softmax(grid):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    rows = 20000
    drawn = draw(logits.expand(rows, -1), uniforms(1, 0, range(rows), 0), grid.pg.tp, temperature=0.7)
    expected = (logits / 0.7).softmax(-1)[0]
    observed = drawn.tokens.bincount(minlength=40) / rows
    assert (observed - expected).abs().max() < 4 * (0.25 / rows) ** 0.5
    torch.testing.assert_close(drawn.log_probs, (logits / 0.7).log_softmax(-1)[0][drawn.tokens])


def test_entropy_is_of_the_full_softmax_at_temperature_one(grid):
    logits = torch.randn(5, 30)
    logits[:, 25:] = float("-inf")  # vocabulary padding
    drawn = draw(logits, uniforms(1, 0, range(5), 0), grid.pg.tp, temperature=0.5, top_p=0.5)
    reference = torch.distributions.Categorical(logits=logits[:, :25].double()).entropy()
    torch.testing.assert_close(drawn.entropies.double(), reference, rtol=1e-6, atol=1e-6)


def test_extreme_logits_stay_finite(grid):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    drawn = draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), grid.pg.tp)
    assert drawn.tokens.tolist() == [0, 1]
    assert torch.isfinite(drawn.log_probs).all() and torch.isfinite(drawn.entropies).all()
