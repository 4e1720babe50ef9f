"""Emulated FP8 in every layout: what a recipe's scales make independent of the layout is the same in all of them.

Another order of summation differs in the last digits of float32. Powers of two do not move with these, so that layouts
agree to float32's rounding. Scales of ``delayed`` do, and now and then a value is rounded to its other FP8 neighbour:
there the scales agree to 1e-4 and gradients to a tenth of what rounding itself changes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experts import SPEC, make_student, run_step
from models import VOCABULARY
from roles import Spec, layouts, share, whole_gradients
from steps import make_rollouts, make_training_rows, save_state

from fire_megatron.checkpoint.resuming import load_training_state
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import FP8Config, OptimizerConfig, PrecisionConfig
from fire_megatron.metrics.values import reduce_metrics
from fire_megatron.parallel.collectives import all_gather_objects
from fire_megatron.parallel.grid import Layout
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.train.student import Student

BLOCKS = Spec(
    "qwen3",
    changes=(("hidden_size", 256), ("intermediate_size", 256), ("head_dim", 64), ("num_hidden_layers", 2)),
)
"""Halves of every matrix are whole blocks of 128 x 128."""
ROWS, LENGTH = 5, 16
"""Rows of 16 tokens: no layout here pads them, and padding would count among a tensor's values."""
SAME = {"tensorwise": 1e-5, "blockwise": 1e-5, "mxfp8": 1e-5, "delayed": 0.03}
"""Relative distance (Frobenius) of all gradients together between layouts."""
APART = 0.25
"""What rounding changes of them at least, in this random model."""


def rows_of(mine):
    """This replica's rows, with made-up teachers."""
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randint(6, VOCABULARY, (LENGTH,), generator=generator) for _ in range(ROWS)]
    scores = [-2 - 3 * torch.rand(LENGTH - 6, generator=generator) for _ in range(ROWS)]
    rollouts = make_rollouts(mine, [row[:6] for row in draw], [row[6:] for row in draw], scores)
    return make_training_rows(rollouts, scores)


def build(roles, layout, fp8, *, sequence=None, micro_batch_size=1):
    model, grid = roles.build(BLOCKS, layout, vocab_multiple=4, sequence=sequence, fp8=fp8)
    model.used_vocab_size = VOCABULARY
    settings = OptimizerConfig(micro_batch_size=micro_batch_size, distributed=False)
    return Student(model, grid, loss=LossConfig(hooks=()), optimizer=settings, precision=PrecisionConfig(fp8=fp8)), grid


def remembered(student, grid):
    """Scales and histories of all stages' layers."""
    scales = student.model.emulated_fp8.scales if student.model.emulated_fp8 else None
    parts = all_gather_objects(scales.state() if scales else {}, group=grid.pg.pp)
    return {key: value for part in parts for key, value in part.items()}


def step(roles, layout, recipe, **options):
    """Loss, gradients and scales of an update. With ``delayed`` of the second one over the same rows, and the scales
    that the first, which is not rounded, has left for it."""
    fp8 = None if recipe is None else FP8Config(recipe=recipe, emulate=True)
    student, grid = build(roles, layout, fp8, **options)
    rows = rows_of(range(grid.dp_rank, ROWS, layout.data))
    tokens = student.count_tokens(rows, Reducer(grid.pg.dp))
    metrics, scales = student.accumulate_gradients(rows, tokens=tokens), remembered(student, grid)
    if recipe == "delayed":
        metrics = student.accumulate_gradients(rows, tokens=tokens)
    loss = reduce_metrics(metrics, group=grid.span)["loss"]
    return loss, whole_gradients(student, grid), scales


def distance(ours, theirs):
    """Relative distance of all gradients together."""
    squares = sum((ours[key] - value).double().square().sum() for key, value in theirs.items())
    return float((squares / sum(value.double().square().sum() for value in theirs.values())).sqrt())


def cases(size):
    """Layout, options and the recipes whose update is the same there as in the first."""
    every = {"tensorwise", "delayed", "blockwise", "mxfp8"}
    by_values = {"delayed", "blockwise", "mxfp8"}  # with shards of whole blocks
    yield Layout(num_ranks=size), {}, every
    yield Layout(pipeline=2, num_ranks=size), {}, every
    if size % 4 == 0:
        yield Layout(tensor=2, pipeline=2, num_ranks=size), {}, by_values
        yield Layout(tensor=2, context=2, num_ranks=size), {"micro_batch_size": 2}, {"delayed"}
        return
    yield Layout(tensor=2, num_ranks=size), {}, by_values
    yield Layout(tensor=2, num_ranks=size), {"sequence": False}, by_values
    yield Layout(context=2, num_ranks=size), {}, {"delayed"}
    yield Layout(num_ranks=size), {"micro_batch_size": 4}, {"delayed"}


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_an_update_does_not_depend_on_the_layout(roles, world, recipe):
    exact = step(roles, Layout(num_ranks=world.size), None)
    reference = None
    for layout, options, recipes in cases(world.size):
        if recipe not in recipes:
            continue
        found = step(roles, layout, recipe, **options)
        reference = reference or found
        case = f"{layout}, {options}"
        assert found[0] == pytest.approx(reference[0], rel=5e-3 if recipe == "delayed" else 1e-5), case
        assert distance(found[1], reference[1]) <= SAME[recipe], case
        assert found[2].keys() == reference[2].keys()
        for key, state in found[2].items():
            for name in state:
                assert torch.allclose(state[name], reference[2][key][name], rtol=1e-4), f"{case}: {key}, {name}"
    assert distance(reference[1], exact[1]) > APART, "rounding shows"
    assert reference[0] == pytest.approx(exact[0], rel=0.05)


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_the_loss_does_not_depend_on_what_splits_tokens(roles, world, recipe):
    """Blocks along the tokens are the weight gradient's alone."""
    layout = Layout(num_ranks=world.size)
    loss = step(roles, layout, recipe)[0]
    assert step(roles, layout, recipe, micro_batch_size=4)[0] == pytest.approx(loss, rel=1e-4)
    assert step(roles, Layout(context=2, num_ranks=world.size), recipe)[0] == pytest.approx(loss, rel=1e-4)


def test_tensorwise_scales_are_those_of_the_tensors_of_a_rank(roles, world):
    """With sequence parallelism ranks share a scale of the tokens that they split; shards of a matrix have their own,
    so a tensor-parallel split is another rounding."""
    together = step(roles, Layout(tensor=2, num_ranks=world.size), "tensorwise")
    apart = step(roles, Layout(tensor=2, num_ranks=world.size), "tensorwise", sequence=False)
    whole = step(roles, Layout(num_ranks=world.size), "tensorwise")
    assert distance(together[1], apart[1]) <= SAME["tensorwise"] and distance(together[1], whole[1]) > 0.1


def test_a_saved_step_has_the_scales_for_any_layout(roles, world, tmp_path):
    fp8 = FP8Config(recipe="delayed", emulate=True)
    first, *others = layouts(world.size, pipelines=(1, 2))
    student, grid = build(roles, first, fp8)
    rows = rows_of(range(grid.dp_rank, ROWS, first.data))
    student.accumulate_gradients(rows, tokens=50.0)
    saved = remembered(student, grid)
    assert len(saved) == 8 and all(bool((state["scale"] > 0).all()) for state in saved.values())
    step = save_state(student, grid, source=roles.checkpoint(BLOCKS), checkpoints=Path(share(str(tmp_path))))
    for layout in others:
        other, grid = build(roles, layout, fp8)
        load_training_state(step, other.model, other.optimizer, grid=grid)
        again = remembered(other, grid)
        assert again.keys() == saved.keys()
        assert all(torch.equal(again[key][name], saved[key][name]) for key in saved for name in saved[key])


def test_an_expert_has_its_own_scale_in_any_layout(roles, world):
    results = []
    for layout in (Layout(num_ranks=world.size), Layout(expert=2, num_ranks=world.size)):
        student, grid = make_student(roles, layout, fp8=FP8Config(recipe="delayed", emulate=True))
        for _ in range(2):
            metrics = run_step(student, grid, count=4)
        results.append((metrics["loss"], whole_gradients(student, grid), remembered(student, grid)))
    (loss, gradients, state), (reference_loss, reference_gradients, reference_state) = results
    assert loss == pytest.approx(reference_loss, rel=1e-2) and state.keys() == reference_state.keys()
    assert sum("local_experts" in key for key in state) == 2 * 2 * SPEC.hf().config.num_experts
    for key in state:
        assert torch.allclose(state[key]["scale"], reference_state[key]["scale"], rtol=0.02), key
    assert distance(gradients, reference_gradients) < 0.05
