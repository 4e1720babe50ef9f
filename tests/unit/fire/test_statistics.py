"""Percentiles, exact sums and group maxima."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fire_megatron.fire.statistics import exact_sum, group_maxima, group_percentiles, percentile, row_means
from fire_megatron.parallel.reducer import Reducer

floats = st.floats(-50, 0, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(floats, min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_is_numpys(values, q):
    values = sorted(values)
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("q", range(0, 100, 5))
@pytest.mark.parametrize("rows", [1, 2, 5, 11, 21, 41, 101])
def test_a_percentile_that_falls_on_a_row_is_that_row(q, rows):
    # 55 / 100 * 20 is 11.000000000000002: numpy's and torch's threshold is then above row 11, which drops it.
    values = [math.sqrt(i) for i in range(rows)]
    index = Fraction(q * (rows - 1), 100)
    if index.denominator == 1:
        assert percentile(values, float(q)) == values[int(index)]


@settings(max_examples=100, deadline=None)
@given(st.lists(floats, min_size=1, max_size=60), st.randoms())
def test_sums_do_not_depend_on_order_padding_or_split(values, random):
    shuffled = random.sample(values, len(values))
    cut = random.randint(0, len(values))
    whole = exact_sum(torch.tensor(values))
    assert whole == exact_sum(torch.tensor(shuffled + [0.0] * random.randint(0, 9)))
    assert whole == exact_sum(torch.tensor(shuffled[:cut])) + exact_sum(torch.tensor(shuffled[cut:]))
    assert whole.item() == pytest.approx(math.fsum(values), abs=1e-9 * len(values))


def test_row_means_ignore_padding_and_know_empty_rows():
    values = torch.tensor([[-1.0, -2.0, float("nan")], [float("inf")] * 3, [-4.0, -5.0, -9.0]])
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    assert row_means(values, mask).tolist() == [-1.5, 0.0, -6.0]


def test_group_percentiles_have_none_for_a_group_without_rows():
    values, groups = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([2, 0, 2])
    assert group_percentiles(values, groups, groups=3, q=50, reducer=Reducer()) == [1.0, None, 2.5]
    nothing = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    assert group_percentiles(*nothing, groups=2, q=50, reducer=Reducer()) == [None, None]


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0)])
def test_group_maxima_of_nothing(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    group = torch.zeros(shape[0], dtype=torch.int64)
    assert group_maxima(torch.zeros(shape), mask, group, groups=2).tolist() == [0.0, 0.0]


def test_group_maxima():
    values = torch.tensor([[1.0, 9.0], [2.0, 3.0], [5.0, 4.0]])
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    assert group_maxima(values, mask, torch.tensor([0, 1, 0]), groups=3).tolist() == [5.0, 3.0, 0.0]
