"""The same batch gives the same loss and gradients in every layout, micro-batch size and data-parallel split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dense
import pytest
import torch
import torch.distributed as dist
from models import EOS, VOCABULARY, make_hf
from roles import hf_response_logits, layouts, load_role, make_router, parallel_config, score, share, whole_gradients
from steps import ROUTE, ROWS, rollouts_of, rows, write_checkpoints

from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import (
    OptimizerConfig,
    PrecisionConfig,
    StudentConfig,
    TeacherConfig,
)
from fire_megatron.data.packing import fill_by_tokens
from fire_megatron.evaluation.heldout import replica_rows
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.metrics.values import reduce_metrics
from fire_megatron.parallel.grid import GridFactory
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform.host import HostMemory
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.heads import teacher_heads
from fire_megatron.teachers.messages import StateKind
from fire_megatron.teachers.teacher import Teacher
from fire_megatron.train.rebalance import rebalance
from fire_megatron.train.select import select
from fire_megatron.train.student import Student

PIPELINES = (1, 2, 3)
CONTEXTS = (1, 2, 4)


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    """Student and two teachers of other depth and width, written by rank 0, seen by all."""
    folder = Path(share(str(tmp_path_factory.mktemp("models"))))
    if world.is_main:
        write_checkpoints(folder)
    dist.barrier()
    return folder


@pytest.fixture(scope="module")
def factory(world):
    """One set of process groups for the module."""
    return GridFactory(timeout=60)


def run_step(
    folder, world, factory, layout, micro_batch_size, loss=None, teacher_layout=None, mixed=False, *,
    student="student", sequence=None, count=ROWS, micro_batch_tokens=0,
):  # fmt: skip
    """Score, select, and accumulate gradients; returns metrics and whole gradients, the same on every rank."""
    loss = loss or LossConfig()
    role = StudentConfig(
        checkpoint=str(folder / student),
        parallel=parallel_config(layout, sequence=sequence),
        vocab_multiple=4,
    )
    grid = factory.grid(layout)
    model = load_role(folder / student, role, grid, world)
    model.used_vocab_size = VOCABULARY
    theirs = factory.grid(teacher_layout or layout)
    parallel = parallel_config(theirs.layout)
    configs, models, teachers = {}, {}, {}
    for name in ROUTE:
        configs[name] = TeacherConfig(checkpoint=str(folder / name), vocab_multiple=4, parallel=parallel)
        models[name] = load_role(folder / name, configs[name], theirs, world)
        models[name].used_vocab_size = VOCABULARY
        teachers[name] = Teacher(models[name], theirs, micro_batch_tokens=24, state_kind=StateKind.of(loss))
    shapes = {name: read_hf_config(folder / name) for name in ROUTE}
    heads = teacher_heads(configs, shapes, models, model) if loss.estimator == "full" else {}
    # distributed=False leaves each whole gradient in main_grad on every data-parallel rank, to be compared.
    student = Student(
        model,
        grid,
        loss=loss,
        optimizer=OptimizerConfig(
            micro_batch_size=1 if micro_batch_tokens else micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            distributed=False,
        ),
        precision=PrecisionConfig(),
        heads=heads,
    )
    router = make_router(teachers, ROUTE, grid, factory, prompts=rows(mixed)[0], mixture=loss.mixture)
    rollouts = rollouts_of(replica_rows(count, grid), mixed)
    scores = score(router, rollouts, keep_states=True)
    selected = select(
        rollouts,
        scores,
        build_hooks(loss.hooks),
        router.names,
        micro_batch_size=micro_batch_size,
        grid=grid,
    )
    part, traffic = router.attach(
        rebalance(selected.rows, rows(mixed)[0], router.target, grid=grid, memory=HostMemory()), scores.kept
    )
    if micro_batch_tokens:
        packed = [sorted(pack.rows) for pack in student.packs(part)]
        expected = fill_by_tokens(range(len(part)), part.rollouts.lengths, micro_batch_tokens) or [[]]
        assert packed == [sorted(batch) for batch in expected]
    tokens = student.count_tokens(part, Reducer(grid.pg.dp))
    metrics = student.accumulate_gradients(part, tokens=tokens)
    if grid.tp_rank == 0 and grid.is_first_stage:  # each row once, as in the trainer
        metrics = selected.metrics | metrics
    return reduce_metrics(traffic | metrics, group=grid.span), whole_gradients(student, grid)


def assert_same_step(step, reference, case):
    (metrics, gradients), (reference_metrics, reference_gradients) = step, reference
    assert metrics.keys() == reference_metrics.keys(), case
    for key in metrics:
        if "bytes_per_token" not in key:  # which grow with the ranks that get them
            assert metrics[key] == pytest.approx(reference_metrics[key], rel=1e-5, abs=1e-7), f"{case}: {key}"
    assert gradients.keys() == reference_gradients.keys(), case
    for key, gradient in gradients.items():
        scale = reference_gradients[key].abs().max()
        assert (gradient - reference_gradients[key]).abs().max() <= 1e-5 * scale, f"{case}: {key}"


ESTIMATORS = {
    "sampled": LossConfig(),
    "full": LossConfig(estimator="full", divergence="jensen_shannon", beta=0.3, teacher_temperature=1.5),
    "full, log_probs": LossConfig(estimator="full", mixture="log_probs", student_temperature=0.8, chunk_tokens=5),
    "topk": LossConfig(estimator="topk", top_k=7, divergence="forward_kl", chunk_tokens=5),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loss_and_gradients_do_not_depend_on_the_layout(checkpoints, world, factory, estimator):
    loss, mixed, reference = ESTIMATORS[estimator], estimator != "topk", None
    options = layouts(world.size, pipelines=PIPELINES, contexts=CONTEXTS)
    for number, layout in enumerate(options):
        # The teachers' layout is another than the student's, each meets each in turn.
        theirs = options[number - 1]
        # Rows have 4 to 23 tokens: a budget of 30 packs two or three of them, one of 12 leaves the longest alone.
        sizes = [(1, 0), (2, 0), (4, 0), (1, 12), (1, 30)]
        # All of them on the first layout, two on each of the others in turn.
        for micro_batch_size, budget in sizes if number == 0 else (sizes * 2)[number % 5 : number % 5 + 4 : 3]:
            step = run_step(
                checkpoints, world, factory, layout, micro_batch_size, loss, theirs, mixed, micro_batch_tokens=budget
            )
            if reference is None:
                reference = step
                assert abs(step[0]["loss"]) > 1e-3 and all(g.abs().max() > 0 for g in step[1].values())
            assert_same_step(step, reference, f"{layout}, {theirs}, micro-batch {micro_batch_size}, {budget} tokens")


VARIANTS = {
    "without sequence parallelism": {"sequence": False},
    "one row, so replicas have none": {"count": 1},
    "a tied student with the larger vocabulary": {"student": "tied"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("estimator", ["sampled", "full", "topk"])
def test_variants_do_not_depend_on_the_layout(checkpoints, world, factory, estimator, variant):
    loss, options = replace(ESTIMATORS[estimator], hooks=()), VARIANTS[variant]
    reference, *others = layouts(world.size, pipelines=PIPELINES, contexts=CONTEXTS)
    expected = run_step(checkpoints, world, factory, reference, 2, loss, **options)
    for layout in others:
        step = run_step(checkpoints, world, factory, layout, 2, loss, reference, **options)
        assert_same_step(step, expected, f"{variant}, {layout}")


def test_no_logits_are_held_after_a_step(checkpoints, world, factory, monkeypatch):
    layers = []
    real = OutputLayer.__init__

    def listening(layer, *args, **kwargs):
        layers.append(layer)
        real(layer, *args, **kwargs)

    monkeypatch.setattr(OutputLayer, "__init__", listening)
    run_step(checkpoints, world, factory, layouts(world.size)[0], 2, ESTIMATORS["full"], mixed=True)
    assert len(layers) >= 4 and all(layer.held == 0 for layer in layers)


def test_output_weights_of_teachers_are_theirs_shared_or_read(checkpoints, world, factory):
    shape = read_hf_config(checkpoints / "code")
    weight = make_hf("llama", seed=2, hidden_size=96, num_hidden_layers=2, vocab_size=320).lm_head.weight
    config = TeacherConfig(checkpoint=str(checkpoints / "code"), vocab_multiple=4)
    shared = []
    for layout in layouts(world.size, pipelines=(1, 2)):
        for theirs in layouts(world.size, pipelines=(1, 2)):
            parallel = [parallel_config(x) for x in (layout, theirs)]
            role = StudentConfig(checkpoint=str(checkpoints / "student"), vocab_multiple=4, parallel=parallel[0])
            student = load_role(checkpoints / "student", role, factory.grid(layout), world)
            own = load_role(checkpoints / "code", replace(config, parallel=parallel[1]), factory.grid(theirs), world)
            own.used_vocab_size = VOCABULARY
            heads = teacher_heads({"code": config}, {"code": shape}, {"code": own}, student)
            if not student.post_process:
                assert heads == {}
                continue
            rows = heads["code"].weight_VH[: heads["code"].columns]
            assert torch.equal(rows, weight[student.vocab_start :][: student.used_columns])
            shared.append(own.post_process and rows.data_ptr() == own.output_weight.data_ptr())
    assert True in shared and False in shared


@pytest.mark.parametrize("estimator", ["full", "full, log_probs", "topk"])
def test_the_loss_is_the_dense_divergence_from_transformers_logits(checkpoints, world, factory, estimator):
    loss, mixed = replace(ESTIMATORS[estimator], hooks=()), estimator != "topk"
    layout = layouts(world.size, pipelines=PIPELINES)[-1]
    metrics, _ = run_step(checkpoints, world, factory, layout, 2, loss, mixed=mixed)
    models = {
        "student": make_hf("qwen3", num_hidden_layers=3),
        "math": make_hf("qwen3", seed=1, num_hidden_layers=5),
        "code": make_hf("llama", seed=2, hidden_size=96, num_hidden_layers=2, vocab_size=320),
    }
    total = tokens = 0
    for prompt, response in zip(*rows(mixed), strict=True):
        logits = {
            name: hf_response_logits(model, torch.tensor(prompt.token_ids), response)[:, :VOCABULARY]
            for name, model in models.items()
        }
        log_s = dense.log_softmax(logits["student"], loss.student_temperature)
        names, shares = zip(*prompt.shares, strict=True)
        shares = torch.tensor(shares).expand(len(response), -1)
        log_t = dense.mixture([logits[n] for n in names], shares, loss.mixture, loss.teacher_temperature)
        if loss.estimator == "topk":
            ids = log_t.topk(loss.top_k).indices
            log_s, log_t = dense.buckets(log_s, ids), dense.buckets(log_t, ids)
        total += dense.divergence(loss.divergence, log_s, log_t, beta=loss.beta).sum()
        tokens += len(response)
    assert metrics["loss"] == metrics["loss/divergence"] == pytest.approx(float(total / tokens), rel=1e-5)


def test_bytes_that_teachers_send(checkpoints, world, factory):
    hidden = {"math": 64, "code": 96}
    for layout in layouts(world.size, pipelines=PIPELINES, contexts=(1, 2)):
        for estimator, width in {
            "sampled": dict.fromkeys(hidden, 0),
            "full": hidden,
            "topk": dict.fromkeys(hidden, 15),
        }.items():
            metrics, _ = run_step(checkpoints, world, factory, layout, 2, ESTIMATORS[estimator])
            for name in hidden:
                # A slice for each tensor rank of each context rank, and log-probability and entropy.
                tensor = layout.tensor
                states = 4 * layout.context * tensor * -(-width[name] // tensor)
                assert metrics[f"teacher/{name}/bytes_per_token"] == states + 8
                assert metrics[f"teacher/{name}/bytes_per_token_of_logits"] == 4 * VOCABULARY


def test_teacher_equal_to_student_gives_no_gradient(checkpoints, world, factory):
    grid = factory.grid(layouts(world.size, pipelines=PIPELINES)[-1])
    role = StudentConfig(
        checkpoint=str(checkpoints / "student"),
        parallel=parallel_config(grid.layout),
    )
    model = load_role(checkpoints / "student", role, grid, world)
    twin = load_role(checkpoints / "student", role, grid, world)
    teacher = Teacher(twin, grid, micro_batch_tokens=24)
    router = make_router({"twin": teacher}, {"math": "twin", "code": "twin"}, grid, factory)
    prompts, _ = rows()
    mine = replica_rows(ROWS, grid)
    sampling = Sampling(max_new_tokens=9, stop_ids=frozenset([EOS]), seed=5)
    rollouts = MegatronEngine(model, grid).generate([prompts[i] for i in mine], mine, sampling=sampling, step=0)
    scores = score(router, rollouts)
    for student_log_prob, teacher_log_prob in zip(rollouts.log_probs, scores.log_probs, strict=True):
        torch.testing.assert_close(student_log_prob, teacher_log_prob, rtol=0, atol=2e-5)
    student = Student(
        model, grid, loss=LossConfig(), optimizer=OptimizerConfig(distributed=False), precision=PrecisionConfig()
    )
    selected = select(rollouts, scores, [], router.names, micro_batch_size=1, grid=grid)
    part = rebalance(selected.rows, prompts, router.target, grid=grid, memory=HostMemory())
    student.accumulate_gradients(part, tokens=student.count_tokens(part, Reducer(grid.pg.dp)))
    if mine:
        assert selected.metrics["teacher/twin/reverse_kl"].result == pytest.approx(0, abs=1e-5)
    for key, gradient in whole_gradients(student, grid).items():
        assert gradient.abs().max() < 1e-4, key
