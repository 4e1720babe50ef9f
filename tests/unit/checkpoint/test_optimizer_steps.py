"""The count of updates that Adam's bias correction needs, as each implementation keeps it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fire_megatron.checkpoint.optimizer_state import initialise, set_steps_taken, steps_taken


class CountsByGroup(torch.optim.Optimizer):
    """As Transformer Engine's and apex's FusedAdam: the count is a group's, and is not there before the first step."""

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def moments(optimizer):
    """What megatron-core's init_state_fn does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)


def wrapped(kind):
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    inner = kind([{"params": [p]} for p in parameters])
    return SimpleNamespace(optimizer=inner, init_state_fn=moments), parameters


def test_a_fresh_optimizer_that_counts_by_group_takes_the_saved_count():
    part, parameters = wrapped(lambda groups: CountsByGroup(groups, {}))
    initialise(part)
    assert steps_taken(part) == 0
    set_steps_taken(part, 41)
    part.optimizer.step()
    assert [group["step"] for group in part.optimizer.param_groups] == [42, 42] and steps_taken(part) == 42
    assert all("step" not in part.optimizer.state[p] for p in parameters)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_torch_counts_by_parameter_on_its_device(kind):
    part, parameters = wrapped(lambda groups: kind(groups, lr=0.1, fused=True))
    initialise(part)
    for parameter in parameters:
        part.optimizer.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        assert part.optimizer.state[parameter]["step"].device == parameter.device
    set_steps_taken(part, 41)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    part.optimizer.step()
    assert steps_taken(part) == 42
