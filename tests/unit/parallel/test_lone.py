"""Collectives in a group of one rank, as megatron-core may ask for them: nothing is sent, and the result is there."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer as megatron

from fire_megatron.parallel import lone
from fire_megatron.plan.trace import Tracing
from fire_megatron.platform import launch


@pytest.fixture(scope="module")
def group():
    launch.start("cpu", threads=1)
    yield dist.group.WORLD
    launch.stop()


def sums(values, group, how):
    call = {
        "by name": lambda: dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group, async_op=False),
        "by place": lambda: dist.all_reduce(values, dist.ReduceOp.AVG, group, False),
        "later": lambda: dist.all_reduce(values, group=group, async_op=True),
        "later, by place": lambda: dist.all_reduce(values, dist.ReduceOp.SUM, group, True),
    }
    return values, call[how]()


def moved(values, group, how):
    out, summed = torch.zeros(2, 3), dist.ReduceOp.SUM
    call = {
        "by name": lambda: megatron.dist_all_gather_func(out, values, group=group),
        "by place": lambda: megatron.dist_all_gather_func(out, values, group, False),
        "later": lambda: megatron.dist_reduce_scatter_func(
            out, values, op=dist.ReduceOp.SUM, group=group, async_op=True
        ),
        "later, by place": lambda: megatron.dist_reduce_scatter_func(out, values, summed, group, True),
    }
    return out, call[how]()


@pytest.mark.parametrize("collective", [sums, moved])
@pytest.mark.parametrize("how", ["by name", "by place", "later", "later, by place"])
def test_what_is_asked_for_is_there_at_once(group, collective, how):
    values = torch.arange(6.0).view(2, 3)
    with lone.lone_groups_silent(), Tracing() as tracing:
        result, work = collective(values, group, how)
    assert not tracing.trace.calls, "sent within a group of one"
    assert torch.equal(result, torch.arange(6.0).view(2, 3))
    if how.startswith("later"):
        assert work.wait() and work.is_completed()
    else:
        assert work is None


def test_what_stays_in_its_memory_is_not_touched(group):
    values = torch.arange(3.0)
    before = values._version
    with lone.lone_groups_silent():
        megatron.dist_reduce_scatter_func(values.view(3), values, group=group)
        assert values._version == before
        found = [None]
        dist.all_gather_object(found, {"a": 1}, group)
    assert found == [{"a": 1}]


def test_afterwards_and_without_a_group_collectives_are_themselves(group):
    """No group is the world, of which one rank is a test."""
    real = dist.all_reduce
    for ask in ({}, {"group": None}):
        with lone.lone_groups_silent(), Tracing() as tracing:
            assert dist.all_reduce is not real
            dist.all_reduce(torch.ones(1), **ask)
        assert len(tracing.trace.calls) == 1
    assert dist.all_reduce is real
