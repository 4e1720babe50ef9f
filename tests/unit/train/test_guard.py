"""Which updates are skipped."""

from __future__ import annotations

import math
import random

import pytest

from fire_megatron.config.schema import GuardConfig
from fire_megatron.train.guard import UpdateGuard


def fed(guard, count=40, seed=0):
    """A guard that has seen ordinary updates: losses around 2, norms around 1."""
    draw = random.Random(seed)
    for _ in range(count):
        assert guard.judge(draw.gauss(2, 0.1), draw.gauss(1, 0.05)) is None
    return guard


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_not_finite(loss, norm):
    guard = UpdateGuard(GuardConfig(max_skipped=1))
    assert guard.judge(loss, norm) == "nonfinite"
    assert guard.ruined and guard.in_a_row == 1 and not guard.exhausted
    assert guard.judge(loss, norm) == "nonfinite" and guard.exhausted == (2, "nonfinite")
    assert guard.judge(2.0, 1.0) is None and not guard.ruined and guard.in_a_row == 0 and guard.total == 2
    assert guard.exhausted == (2, "nonfinite"), "a good update of the same step does not make it good"
    assert guard.metrics() == {"skipped/nonfinite": 2, "skipped/spike": 0, "skipped/in_a_row": 0, "skipped/total": 2}
    assert guard.metrics()["skipped/nonfinite"] == 0, "since the last call"


@pytest.mark.parametrize(
    "loss, norm, verdict",
    [
        (2.0, 1.0, None),
        (2.9, 1.0, None),
        (3.5, 1.0, "spike"),
        (2.0, 2.0, "spike"),
        (-50.0, 1.0, None),
        (2.0, 0.0, None),
    ],
)
def test_spikes(loss, norm, verdict):
    guard = fed(UpdateGuard(GuardConfig(spike_factor=10)))
    assert guard.judge(loss, norm) == verdict
    assert not guard.ruined, "after a spike the weights are as good as before"
    off = fed(UpdateGuard(GuardConfig()))
    assert off.judge(loss, norm) is None


def test_a_spike_does_not_widen_what_is_ordinary():
    guard = fed(UpdateGuard(GuardConfig(spike_factor=10, max_skipped=100)))
    assert [guard.judge(9.0, 1.0) for _ in range(50)] == ["spike"] * 50


def test_nothing_jumps_before_enough_is_known():
    guard = UpdateGuard(GuardConfig(spike_factor=10))
    fed(guard, 15)
    assert guard.judge(1e6, 1.0) is None


def test_rounding_is_no_jump():
    guard = UpdateGuard(GuardConfig(spike_factor=10))
    for _ in range(40):
        assert guard.judge(2.0, 1.0) is None
    assert guard.judge(2.0 + 1e-6, 1.0) is None
    assert guard.judge(2.1, 1.0) == "spike"


def test_a_resumed_guard_judges_alike():
    config = GuardConfig(spike_factor=8, spike_window=20)
    straight, draw = fed(UpdateGuard(config)), random.Random(5)
    straight.judge(math.nan, 1.0)
    resumed = UpdateGuard(config)
    resumed.load(straight.state())
    for _ in range(100):
        loss, norm = draw.gauss(2, 0.6), draw.gauss(1, 0.1)
        assert resumed.judge(loss, norm) == straight.judge(loss, norm)
    assert resumed.state() == straight.state()
