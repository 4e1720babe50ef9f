"""The learning rate at every step."""

from __future__ import annotations

import math

import pytest

from fire_megatron.config.schema import OptimizerConfig
from fire_megatron.train.schedule import learning_rate

LR, MIN_LR = 0.8, 0.1


def rates(schedule, warmup, total, *, min_lr=MIN_LR, beyond=0):
    """The rate of each step."""
    min_lr = 0.0 if schedule == "constant" else min_lr
    config = OptimizerConfig(lr=LR, min_lr=min_lr, schedule=schedule, warmup_steps=warmup)
    return [learning_rate(config, step, total) for step in range(total + beyond)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up(schedule):
    """The first step already moves; the first step after it has the full rate, and so has the last one of it."""
    assert rates(schedule, 4, 20)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates(schedule, 0, 20)[0] == rates(schedule, 1, 20)[0] == LR


def test_constant():
    assert set(rates("constant", 0, 9, beyond=5)) == {LR}


def test_linear():
    assert rates("linear", 1, 9) == pytest.approx([LR, *(LR - 0.1 * i for i in range(8))])


def test_cosine():
    steps = rates("cosine", 2, 11)
    assert steps[2:] == pytest.approx([0.1 + 0.7 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)])
    assert steps[6] == pytest.approx((LR + MIN_LR) / 2), "half of the way down in the middle"
    falls = [a - b for a, b in zip(steps[2:], steps[3:], strict=False)]
    assert falls[0] < falls[3] > falls[-1] and falls == pytest.approx(falls[::-1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("min_lr", [0.0, MIN_LR, LR])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_last_step_has_the_least_rate_and_so_have_those_beyond(schedule, min_lr, warmup):
    """A run that is continued beyond its steps must not come up again."""
    steps = rates(schedule, warmup, 12, min_lr=min_lr, beyond=30)
    assert steps[11:] == pytest.approx([min_lr] * 31)
    assert all(a >= b for a, b in zip(steps[warmup:], steps[warmup + 1 :], strict=False))
    assert min(steps[:11]) > min_lr or min_lr == LR


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (1, 2), (5, 5), (9, 3)])
def test_short_runs(schedule, warmup, total):
    """No division by zero, nothing above the peak, no step that does not move."""
    assert all(0 < rate <= LR for rate in rates(schedule, warmup, total))
