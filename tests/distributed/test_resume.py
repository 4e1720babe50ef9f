"""A run stopped after step 2 and resumed, in the same or another layout, is the run that was never stopped."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import roles
import torch.distributed as dist
from roles import assert_same_state
from tiny_run import make_inputs, read_metrics, tiny_recipe

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.load import recipe_from_dict
from fire_megatron.train.lifecycle import Trainer

STEPS, STOP = 3, 2
MACHINE = ("time/", "memory/", "rollout/tokens_per_second", "router/")
"""Metrics of the machine, not of the run."""


@pytest.fixture(scope="module")
def shared(world, folder):
    """The module's folder with the models in it."""
    if world.is_main:
        make_inputs(folder, tie_word_embeddings=True)
    dist.barrier()
    return folder


def settings(layout, *, distributed=True, dtype="float32", **changes):
    """Recipe changes of a case."""
    tensor, pipeline, context = layout
    return {
        "student__parallel": {"tensor": tensor, "pipeline": pipeline, "context": context},
        "student__precision": {"dtype": dtype},
        "optimizer": {
            "lr": 2e-4,
            # Where a gradient is nearly zero, Adam divides it by its own size and so turns the last digit of a sum,
            # which depends on the order that a layout adds in, into a full step. A large eps leaves such steps small.
            "eps": 1e-4,
            "schedule": "linear",
            "weight_decay": 0.1,
            "distributed": distributed,
            "mini_batches": 2,
        },
        # More than one pass over the prompts: the order of the second is resumed as well.
        "rollout__prompts_per_step": 7,
        **changes,
    }


def trainer(world, shared, folder, case, *, stop_after=None):
    """A Trainer on ``shared/folder`` that every rank builds; with ``stop_after`` it is asked to stop after that step,
    as a signal would."""
    recipe = recipe_from_dict(tiny_recipe(shared, shared / folder, **{**case, "run__steps": STEPS}))
    check_recipe(recipe, world_size=world.size)
    made = Trainer(recipe, world)
    if stop_after is not None:
        one_step = made._one_step

        def step_then_ask():
            one_step()
            if made.step == stop_after and world.rank == world.size - 1:  # one rank only: the others must hear of it
                made.stop.signal_name = "SIGTERM"

        made._one_step = step_then_ask
    return made


def whole_state(made):
    """Weights and optimizer state of a trainer's whole model, and Adam's count of updates on every rank."""
    return roles.whole_state(made.run.student, made.run.grid)


def assert_same_metrics(resumed, straight, rel):
    """Compare two runs' metrics.jsonl line by line."""
    assert [line["step"] for line in resumed] == [line["step"] for line in straight] == list(range(1, STEPS + 1))
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            if not key.startswith(MACHINE):
                assert ours[key] == pytest.approx(theirs[key], rel=rel, abs=rel), f"step {theirs['step']}: {key}"


def run_straight_and_stopped(world, shared, name, case):
    """An uninterrupted run, and one stopped after step 2; both states, the second as it was when it stopped."""
    straight = trainer(world, shared, f"{name}-straight", case)
    assert straight.train()
    stopped = trainer(world, shared, f"{name}-stopped", case, stop_after=STOP)
    assert not stopped.train()
    assert stopped.step == STOP
    return whole_state(straight), whole_state(stopped)


def copy_run(world, source, target):
    """Copy a run's folder, so that it can be resumed more than once."""
    if world.is_main:
        shutil.copytree(source, target)
    dist.barrier()


def layouts(size):
    """Splits of the world into tensor x pipeline x context; data parallelism takes the rest. Of 2 ranks each alone, of
    4 two of them together."""
    alone, together = [(1, 1, 2), (1, 2, 1), (2, 1, 1)], [(2, 2, 1), (1, 2, 2), (2, 1, 2)]
    shapes = [(1, 1, 1), *(alone if size % 4 else together)]
    return [shape for shape in shapes if size % math.prod(shape) == 0]


@pytest.mark.parametrize("distributed", [True, False])
def test_resumed_equals_uninterrupted(world, shared, distributed):
    first, *others = layouts(world.size) if distributed else layouts(world.size)[::-1]
    # Half of the saves are written in the background, while the next step is computed.
    case = settings(first, distributed=distributed, checkpoint={"every": 1, "async_save": distributed})
    name = f"float32-{distributed}"
    end, middle = run_straight_and_stopped(world, shared, name, case)
    moments = [value for (kind, _), value in middle[0].items() if kind != "weight"]
    assert middle[1] == {2 * STOP} and all(moment.abs().max() > 0 for moment in moments), "nothing to be restored"
    for layout in (first, *(others if distributed else others[::2])):  # between them, each way to each layout
        same = layout == first
        folder = f"{name}-resumed-{layout}"
        copy_run(world, shared / f"{name}-stopped", shared / folder)
        # What is resumed elsewhere may also share out the optimizer's state otherwise.
        resumed = trainer(world, shared, folder, settings(layout, distributed=distributed or not same))
        assert resumed.step == STOP
        # Exactly, whatever the layout: loading moves numbers and computes none.
        assert_same_state(whole_state(resumed), middle, 0)
        assert resumed.train()
        assert_same_state(whole_state(resumed), end, 0 if same else 1e-4)
        if world.is_main:
            straight = read_metrics(shared / f"{name}-straight")
            assert_same_metrics(read_metrics(shared / folder), straight, 0 if same else 1e-4)


def test_resumed_equals_uninterrupted_in_bfloat16(world, shared):
    for distributed in (True, False) if world.size == 2 else (True,):
        case = settings(layouts(world.size)[-1 if distributed else 0], dtype="bfloat16", distributed=distributed)
        name = f"bfloat16-{distributed}"
        end, middle = run_straight_and_stopped(world, shared, name, case)
        assert any(kind == "master" for kind, _ in middle[0])
        resumed = trainer(world, shared, f"{name}-stopped", case)
        assert_same_state(whole_state(resumed), middle, 0)
        assert resumed.train()
        assert_same_state(whole_state(resumed), end, 0)
        if world.is_main:
            straight = read_metrics(shared / f"{name}-straight")
            assert_same_metrics(read_metrics(shared / f"{name}-stopped"), straight, 0)


def test_the_whole_state_sees_what_is_not_restored(world, shared):
    """The comparison above would notice lost moments, a lost step count and one wrong number."""
    made = trainer(world, shared, "perturbed", settings(layouts(world.size)[0]), stop_after=1)
    made.train()
    state = whole_state(made)
    for key in (next(k for k in state[0] if k[0] == "exp_avg"), next(k for k in state[0] if k[0] == "weight")):
        other = (copy.deepcopy(state[0]), state[1])
        other[0][key].view(-1)[-1] += 1e-3 * state[0][key].abs().max()
        with pytest.raises(AssertionError):
            assert_same_state(other, state, 1e-4)
    with pytest.raises(AssertionError):
        assert_same_state((state[0], {0}), state, 1e-4)
