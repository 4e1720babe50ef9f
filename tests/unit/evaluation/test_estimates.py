"""Scores against brute force, closed forms and known values."""

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fire_megatron.evaluation.estimates import RESAMPLES, bootstrap, majority, pass_at, powers_to, score, table


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * c + [False] * (n - c)
        draws = list(itertools.combinations(samples, k))
        assert pass_at(np.array([c]), n, k)[0] == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_pass_at_k_is_equation_1_of_chen_et_al(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    expected = 1 - comb(n - c, k) / comb(n, k)
    assert pass_at(np.array([c]), n, k)[0] == pytest.approx(expected, abs=1e-9)


def test_pass_at_k_is_unbiased():
    """Averaged over what n samples may be, it is the chance of k fresh ones, 1 - (1 - p)^k, which 1 - (1 - c/n)^k is
    not."""
    n, k, p = 6, 3, 0.3
    chances = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    estimates = pass_at(np.arange(n + 1), n, k)
    plugged = 1 - (1 - np.arange(n + 1) / n) ** k
    assert abs(np.dot(chances, plugged) - (1 - (1 - p) ** k)) > 0.01
    assert np.dot(chances, estimates) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_1_is_the_average():
    counts = np.arange(9)
    np.testing.assert_allclose(pass_at(counts, 8, 1), counts / 8, atol=1e-15)


@pytest.mark.parametrize(
    ("classes", "correct", "expected"),
    [
        ([0, 0, 1], [1, 1, 0], 1.0),
        ([0, 1, 1], [1, 0, 0], 0.0),
        ([0, 1], [1, 0], 1 / 2),
        ([0, 1, 2], [1, 0, 0], 1 / 3),
        ([0, 0, 1, 1, 2], [1, 1, 0, 0, 0], 1 / 2),
        ([None, None, None, 0], [0, 0, 0, 1], 1.0),  # no answer is no vote
        ([None, None], [0, 0], 0.0),
        ([0, 1, 2, 2, 3], [1, 1, 0, 0, 0], 1 / 2),  # right ones vote together, however they are written
        ([0], [0], 0.0),
        ([0], [1], 1.0),
    ],
)
def test_majority(classes, correct, expected):
    assert majority(classes, [bool(c) for c in correct]) == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.booleans()), min_size=1, max_size=7))
def test_majority_against_its_definition(samples):
    votes = ["right" if right else name for name, right in samples if right or name is not None]
    most = max(map(votes.count, votes), default=0)
    winners = {vote for vote in votes if votes.count(vote) == most}
    expected = ("right" in winners) / len(winners) if winners else 0.0
    names, correct = zip(*samples, strict=True)
    assert majority(names, correct) == pytest.approx(expected)


def test_bootstrap_of_shares_is_binomial():
    """Of 0 and 1 the resampled means are binomial, whose deviation is known."""
    values = [1.0] * 30 + [0.0] * 70
    estimate = bootstrap(values)
    deviation = (0.3 * 0.7 / 100) ** 0.5
    assert estimate.value == pytest.approx(0.3)
    assert estimate.low == pytest.approx(0.3 - 1.96 * deviation, abs=0.01)
    assert estimate.high == pytest.approx(0.3 + 1.96 * deviation, abs=0.01)


def test_bootstrap_covers_what_it_says():
    """95 intervals of 100 hold the true mean, give or take."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        estimate = bootstrap(generator.random(50))
        hits += estimate.low <= 0.5 <= estimate.high
    assert 51 <= hits <= 60


def test_bootstrap_is_the_same_every_time():
    values = np.linspace(0, 1, 37)
    assert bootstrap(values) == bootstrap(values.tolist())
    assert bootstrap([0.25]) == bootstrap([0.25]) and bootstrap([0.25]).low == bootstrap([0.25]).high == 0.25
    assert RESAMPLES >= 1000


def test_a_table_worked_by_hand():
    correct = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    classes = [[0, 0, 1, 1], [0, 1, None, 2], [0, 0, 0, 0]]
    truncated = np.array([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    scores = score(correct, correct ^ [1, 0, 0, 0], classes, np.full((3, 4), 10), truncated)
    assert scores.average.value == pytest.approx(6 / 12)
    assert {k: e.value for k, e in scores.passes.items()} == pytest.approx(
        {1: 6 / 12, 2: (1 - 1 / 6 + 0 + 1) / 3, 4: 2 / 3}
    )
    assert scores.vote.value == pytest.approx((0.5 + 0 + 1) / 3)
    assert (scores.mean_length, scores.truncated, scores.unanswered) == pytest.approx((10, 1 / 12, 1 / 12))
    assert scores.agrees_with_math_verify == pytest.approx(3 / 4)
    assert set(scores.as_dict()) >= {"agrees_with_math_verify", "avg@4", "pass@1", "pass@2", "pass@4", "maj@4"}
    assert "50.0 [0.0, 100.0]" in table({"three": scores})


def test_sizes_of_pass_at_k():
    assert powers_to(1) == [1]
    assert powers_to(8) == [1, 2, 4, 8]
    assert powers_to(12) == [1, 2, 4, 8, 12]
