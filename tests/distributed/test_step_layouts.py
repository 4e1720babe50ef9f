"""The same batch gives the same loss and gradients in every layout, micro-batch size and data-parallel split."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from models import EOS, VOCABULARY, save_megatron
from roles import layouts, load_role

from fire_megatron.checkpoint.shards import model_shards
from fire_megatron.config.schema import (
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
)
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts
from fire_megatron.evaluation.heldout import replica_rows
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.metrics.values import reduce_metrics
from fire_megatron.parallel.grid import GridFactory
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.teachers.router import TeacherRouter
from fire_megatron.teachers.teacher import Teacher
from fire_megatron.train.select import rebalance, select
from fire_megatron.train.student import Student

ROWS = 9
PIPELINES = (1, 2, 3)
ROUTE = {"math": "math", "code": "code"}


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    """Student and two teachers of other depth and width, written by rank 0, seen by all."""
    box = [str(tmp_path_factory.mktemp("models")) if world.is_main else None]
    dist.broadcast_object_list(box, src=0)
    from pathlib import Path

    folder = Path(box[0])
    if world.is_main:
        save_megatron("qwen3", folder / "student", num_hidden_layers=3)
        save_megatron("qwen3", folder / "math", seed=1, num_hidden_layers=5)
        save_megatron("llama", folder / "code", seed=2, hidden_size=96, num_hidden_layers=2)
    dist.barrier()
    return folder


@pytest.fixture(scope="module")
def factory(world):
    """One set of process groups for the module."""
    return GridFactory(timeout=60)


def rows():
    """Prompts and fixed responses of the global batch; one response is a single token."""
    generator = torch.Generator().manual_seed(3)

    def draw(n):
        return torch.randint(6, VOCABULARY, (n,), generator=generator)

    prompts = [Prompt(i, ("math", "code")[i % 2], tuple(draw(3 + i).tolist()), "") for i in range(ROWS)]
    return prompts, [draw(1 + (5 * i) % 13) for i in range(ROWS)]


def rollouts_of(mine):
    """This replica's rows, with made-up rollout statistics."""
    prompts, responses = rows()
    generator = torch.Generator().manual_seed(4)
    noise = [torch.rand(len(r), generator=generator) for r in responses]
    return Rollouts(
        row_ids=tuple(mine),
        prompts=tuple(prompts[i] for i in mine),
        responses=tuple(responses[i] for i in mine),
        log_probs=tuple(-3.0 - noise[i] for i in mine),
        entropies=tuple(1.0 + noise[i] for i in mine),
        truncated=tuple(False for _ in mine),
        weight_version=0,
    )


def whole_gradients(student, grid):
    """Every gradient of the whole model by checkpoint key, put together from all ranks."""
    parts = {}
    if grid.dp_rank == 0:
        for shard in model_shards(student.model, grid=grid):
            if shard.writes:
                gradient = shard.real(shard.within(shard.parameter.main_grad))
                parts[shard.key, shard.offset] = (shard.global_shape, gradient.clone())
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, parts)
    whole = {}
    for (key, offset), (shape, gradient) in itertools.chain(*(part.items() for part in gathered)):
        target = whole.setdefault(key, torch.zeros(shape))
        target[tuple(slice(o, o + n) for o, n in zip(offset, gradient.shape, strict=True))] = gradient
    return whole


def run_step(folder, world, factory, layout, micro_batch_size, loss=None):
    """Score, select, and accumulate gradients; returns loss and whole gradients, the same on every rank."""
    loss = loss or LossConfig()
    role = StudentConfig(
        checkpoint=str(folder / "student"),
        parallel=ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline),
        vocab_multiple=4,
    )
    grid = factory.grid(layout)
    model = load_role(folder / "student", role, grid, world)
    teachers = {}
    for name in ROUTE:
        teacher = TeacherConfig(checkpoint=str(folder / name), vocab_multiple=4)
        teachers[name] = Teacher(name, load_role(folder / name, teacher, grid, world), grid, micro_batch_tokens=24)
    # distributed=False leaves each whole gradient in main_grad on every data-parallel rank, to be compared.
    student = Student(
        model,
        grid,
        loss=loss,
        optimizer=OptimizerConfig(micro_batch_size=micro_batch_size, distributed=False),
        precision=PrecisionConfig(),
    )
    router = TeacherRouter(teachers, ROUTE, student_grid=grid)
    rollouts = rollouts_of(replica_rows(ROWS, grid))
    kept, _ = select(
        rollouts,
        router.score(rollouts),
        router.names,
        build_hooks(loss.hooks),
        micro_batch_size=micro_batch_size,
        grid=grid,
    )
    part = rebalance(kept, grid=grid)
    tokens = student.count_tokens(part, Reducer(grid.pg.dp))
    metrics = student.accumulate_gradients(part, tokens=tokens)
    return reduce_metrics(metrics, group=grid.span)["loss"], whole_gradients(student, grid)


def test_loss_and_gradients_do_not_depend_on_the_layout(checkpoints, world, factory):
    reference_loss, reference = None, None
    for layout in layouts(world.size, pipelines=PIPELINES):
        for micro_batch_size in (1, 2, 4):
            value, gradients = run_step(checkpoints, world, factory, layout, micro_batch_size)
            if reference is None:
                reference_loss, reference = value, gradients
                assert abs(value) > 1e-3 and all(g.abs().max() > 0 for g in gradients.values())
                continue
            case = f"{layout}, micro-batch {micro_batch_size}"
            assert value == pytest.approx(reference_loss, rel=1e-5), case
            assert gradients.keys() == reference.keys(), case
            for key, gradient in gradients.items():
                scale = reference[key].abs().max()
                assert (gradient - reference[key]).abs().max() <= 1e-5 * scale, f"{case}: {key}"


def test_teacher_equal_to_student_gives_no_gradient(checkpoints, world, factory):
    grid = factory.grid(layouts(world.size, pipelines=PIPELINES)[-1])
    role = StudentConfig(
        checkpoint=str(checkpoints / "student"),
        parallel=ParallelConfig(tensor=grid.layout.tensor, pipeline=grid.layout.pipeline),
    )
    model = load_role(checkpoints / "student", role, grid, world)
    twin = load_role(checkpoints / "student", role, grid, world)
    teacher = Teacher("twin", twin, grid, micro_batch_tokens=24)
    router = TeacherRouter({"twin": teacher}, {"math": "twin", "code": "twin"}, student_grid=grid)
    engine = MegatronEngine(model, grid, RolloutConfig(prompts_per_step=ROWS, max_new_tokens=9), stop_ids=[EOS], seed=5)
    prompts, _ = rows()
    mine = replica_rows(ROWS, grid)
    rollouts = engine.generate([prompts[i] for i in mine], mine, step=0)
    scores = router.score(rollouts)
    for student_log_prob, teacher_log_prob in zip(rollouts.log_probs, scores.log_probs, strict=True):
        torch.testing.assert_close(student_log_prob, teacher_log_prob, rtol=0, atol=2e-5)
    student = Student(
        model, grid, loss=LossConfig(), optimizer=OptimizerConfig(distributed=False), precision=PrecisionConfig()
    )
    kept, metrics = select(rollouts, scores, router.names, [], micro_batch_size=1, grid=grid)
    part = rebalance(kept, grid=grid)
    student.accumulate_gradients(part, tokens=student.count_tokens(part, Reducer(grid.pg.dp)))
    if mine:
        assert metrics["teacher/twin/reverse_kl"].result == pytest.approx(0, abs=1e-5)
    for key, gradient in whole_gradients(student, grid).items():
        assert gradient.abs().max() < 1e-4, key
