"""Student and teachers on ranks of their own, or sharing some: the same scores, loss and gradients as one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import VOCABULARY
from roles import (
    Spec,
    hf_response_logits,
    load_role,
    log_prob_and_entropy,
    parallel_config,
    reference,
    share,
    whole_gradients,
)
from steps import ROUTE, ROWS, rollouts_of, rows, write_checkpoints

from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import OptimizerConfig, PrecisionConfig, StudentConfig, TeacherConfig
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts
from fire_megatron.evaluation.heldout import replica_rows
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.metrics.values import reduce_metrics
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.grid import GridFactory, Layout
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform import launch
from fire_megatron.platform.host import HostMemory
from fire_megatron.platform.offload import Offload
from fire_megatron.teachers.heads import teacher_heads
from fire_megatron.teachers.messages import StateKind
from fire_megatron.teachers.pool import TeacherPool
from fire_megatron.teachers.router import TeacherRouter
from fire_megatron.teachers.teacher import Teacher, TeacherInfo
from fire_megatron.teachers.transfer import Transfer
from fire_megatron.train.rebalance import rebalance
from fire_megatron.train.select import select
from fire_megatron.train.student import Student

pytestmark = pytest.mark.world_size(4)


def at(first, ranks, **sizes):
    return Layout(first_rank=first, num_ranks=ranks, **sizes)


STUDENTS = {
    "TP2": at(0, 2, tensor=2),
    "PP2": at(0, 2, pipeline=2),
    "TP1 DP2": at(0, 2),
    "CP2": at(0, 2, context=2),
}
TEACHERS = {
    "colocated TP2": {"math": at(0, 2, tensor=2), "code": at(0, 2, tensor=2)},
    "PP2 on its own span": {"math": at(2, 2, pipeline=2), "code": at(2, 2, pipeline=2)},
    "CP2 on its own span": {"math": at(2, 2, context=2), "code": at(2, 2)},
    "one rank each": {"math": at(2, 1), "code": at(3, 1)},
    "one rank each of the student's": {"math": at(1, 1), "code": at(0, 1)},
    "spans that overlap": {"math": at(1, 2, tensor=2), "code": at(0, 4, pipeline=2)},
}
LOSSES = {
    "sampled": LossConfig(),
    "full": LossConfig(estimator="full", divergence="jensen_shannon", beta=0.3, teacher_temperature=1.5),
    "topk": LossConfig(estimator="topk", top_k=7, divergence="forward_kl"),
}


class Cast:
    """A student and two teachers on their spans, on every rank of the world."""

    def __init__(self, folder, world, factory, student, teachers, loss, *, mixed=False, offload=False):
        """Builds what this rank holds; collective."""
        self.loss, self.mixed, self.grid = loss, mixed, factory.grid(student)
        grids = {name: factory.grid(layout) for name, layout in teachers.items()}
        role = StudentConfig(checkpoint=str(folder / "student"), parallel=parallel_config(student), vocab_multiple=4)
        self.model = load_role(folder / "student", role, self.grid, world) if self.grid.is_member else None
        shapes = {name: read_hf_config(folder / name) for name in teachers}
        configs, models, members, infos = {}, {}, {}, {}
        kind = StateKind.of(loss)
        for name, grid in grids.items():
            configs[name] = TeacherConfig(
                checkpoint=str(folder / name), parallel=parallel_config(grid.layout), vocab_multiple=4
            )
            infos[name] = TeacherInfo(name, grid.layout, shapes[name].hidden, torch.float32, VOCABULARY, kind, offload)
            if grid.is_member:
                models[name] = load_role(folder / name, configs[name], grid, world)
                models[name].used_vocab_size = VOCABULARY
                away = Offload(models[name].parameters, constant=True) if offload else None
                members[name] = Teacher(models[name], grid, micro_batch_tokens=24, state_kind=kind, offload=away)
        heads = {}
        if self.model is not None:
            self.model.used_vocab_size = VOCABULARY
            if loss.estimator == "full":
                heads = teacher_heads(configs, shapes, {} if offload else models, self.model)
        for teacher in members.values() if offload else ():
            teacher.offload.leave()
        self.pool = TeacherPool(infos, members, student_grid=self.grid, factory=factory)
        self.control = Control(launch.store(), speaks=world.rank == student.first_rank)
        self.student = self.router = None
        if self.model is not None:
            self.student = Student(
                self.model,
                self.grid,
                loss=loss,
                optimizer=OptimizerConfig(micro_batch_size=2, distributed=False),
                precision=PrecisionConfig(),
                heads=heads,
            )
            self.router = TeacherRouter(
                self.pool,
                ROUTE,
                student_grid=self.grid,
                prompts=rows(mixed)[0],
                mixture=loss.mixture,
                control=self.control,
                timeout=60,
                offload=Offload(self.student.memory, constant=False) if offload else None,
                group_size=2,
            )

    def run(self, work):
        """``work()`` on the student's ranks, while the others serve; its result on rank 0, to all."""
        box = [None]
        if self.router is not None:
            box = [work()]
            self.router.announce(do="stop", error=None)
        else:
            transfer = Transfer(self.pool, self.grid, self.control)
            assert self.pool.obey(self.control, transfer.serve, idle=int) is None
        dist.barrier()
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def score(self, rollouts, total):
        """Scores of this replica's rollouts, sent in groups as an engine would."""
        session = self.router.open(rollouts.prompts, rollouts.row_ids, total=total, keep_states=True)
        if self.pool.remote:
            for start in range(0, len(rollouts), session.group_size):
                part = range(start, min(start + session.group_size, len(rollouts)))
                session.send([rollouts.row_ids[i] for i in part], [rollouts.responses[i] for i in part])
        else:
            session.send(rollouts.row_ids, rollouts.responses)
        return session.finish(rollouts)

    def gathered(self, scores, rollouts):
        """(log-probs, entropies) by row, of all replicas, on all of the student's ranks."""
        own = {r: (lp, h) for r, lp, h in zip(rollouts.row_ids, scores.log_probs, scores.entropies, strict=True)}
        parts = [None] * self.grid.span.size()
        dist.all_gather_object(parts, own, group=self.grid.span)
        return {row: pair for part in parts for row, pair in part.items()}

    def step(self):
        """Scores, metrics and whole gradients of a step."""
        rollouts = rollouts_of(replica_rows(ROWS, self.grid), self.mixed)
        scores = self.score(rollouts, ROWS)
        selected = select(
            rollouts, scores, build_hooks(self.loss.hooks), self.router.names, micro_batch_size=2, grid=self.grid
        )
        kept = rebalance(selected.rows, rows(self.mixed)[0], self.router.target, grid=self.grid, memory=HostMemory())
        part, traffic = self.router.attach(kept, scores.kept)
        tokens = self.student.count_tokens(part, Reducer(self.grid.pg.dp))
        metrics = self.student.accumulate_gradients(part, tokens=tokens)
        metrics = reduce_metrics(traffic | metrics, group=self.grid.span)
        return self.gathered(scores, rollouts), metrics, whole_gradients(self.student, self.grid)


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    folder = Path(share(str(tmp_path_factory.mktemp("models"))))
    if world.is_main:
        write_checkpoints(folder)
    dist.barrier()
    return folder


@pytest.fixture(scope="module")
def factory(world):
    return GridFactory(timeout=60)


@pytest.fixture(scope="module")
def alone(checkpoints, world, factory):
    """The step of each loss by one process that holds everything."""
    one = at(0, 1)
    made = {}
    for name, loss in LOSSES.items():
        cast = Cast(checkpoints, world, factory, one, {"math": one, "code": one}, loss, mixed=name == "full")
        made[name] = cast.run(cast.step)
    return made


CASES = [(s, t, n) for s in STUDENTS for t in TEACHERS for n in LOSSES if s != "CP2" or n == "sampled"]


@pytest.mark.parametrize(("student", "teachers", "loss"), CASES)
def test_a_step_equals_that_of_a_single_process(checkpoints, world, factory, alone, student, teachers, loss):
    cast = Cast(
        checkpoints, world, factory, STUDENTS[student], TEACHERS[teachers], LOSSES[loss], mixed=loss == "full",
        offload=student == "PP2",
    )  # fmt: skip
    # What the first left must not show in the second, which brings states where there are any.
    for _ in range(2 if loss == "full" else 1):
        scores, metrics, gradients = cast.run(cast.step)
        expected_scores, expected_metrics, expected_gradients = alone[loss]
        assert scores.keys() == expected_scores.keys() == set(range(ROWS))
        for row, pair in scores.items():
            for got, want in zip(pair, expected_scores[row], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert abs(metrics["loss"]) > 1e-3
        assert metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            scale = expected_gradients[key].abs().max()
            assert scale > 0 and (gradient - expected_gradients[key]).abs().max() <= 1e-5 * scale, key


SPECS = {
    "math": Spec("qwen3", seed=1, changes=(("num_hidden_layers", 5),)),
    "code": Spec("llama", seed=2, changes=(("hidden_size", 96), ("num_hidden_layers", 2), ("vocab_size", 320))),
}
ROUTER_LAYOUTS = (
    (at(0, 1), {"math": at(1, 3), "code": at(1, 2)}),
    (at(0, 2), {"math": at(2, 2), "code": at(2, 2)}),
    (at(0, 3), {"math": at(3, 1), "code": at(0, 4)}),
    (at(0, 2, tensor=2), {"math": at(2, 2), "code": at(0, 4, tensor=2)}),
    (at(0, 4), {"math": at(0, 4), "code": at(0, 2)}),
    (at(0, 2, context=2), {"math": at(1, 2, context=2), "code": at(0, 4, context=2)}),
)


@pytest.fixture(scope="module")
def casts(checkpoints, world, factory):
    return [Cast(checkpoints, world, factory, s, t, LossConfig()) for s, t in ROUTER_LAYOUTS]


@given(
    layout=st.integers(0, len(ROUTER_LAYOUTS) - 1),
    described=st.lists(st.tuples(st.sampled_from(sorted(ROUTE)), st.integers(1, 9), st.integers(0, 30)), max_size=14),
    shuffle=st.randoms(use_true_random=False),
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same examples on all ranks
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_each_row_is_scored_once_by_its_teacher_in_order_and_evenly(casts, monkeypatch, layout, described, shuffle):
    cast = casts[layout]
    generator = torch.Generator().manual_seed(len(described))

    def draw(n):
        return torch.randint(6, VOCABULARY, (n,), generator=generator)

    whole = [(label, draw(p), draw(r)) for label, p, r in described]
    order = list(range(len(whole)))
    shuffle.shuffle(order)
    loads = {}
    computed = {name: [] for name in ROUTE}
    named = {id(teacher): name for name, teacher in cast.pool.teachers.items()}
    real = Teacher._score_share

    def listening(teacher, prompts, responses, lengths, share, *rest):
        name = named[id(teacher)]
        computed[name] += [(tuple(prompts[i].tolist()), tuple(responses[i].tolist())) for i in share]
        loads[name] = loads.get(name, 0) + sum(lengths[i] for i in share)
        return real(teacher, prompts, responses, lengths, share, *rest)

    def work():
        mine = [order[i] for i in replica_rows(len(whole), cast.grid)]
        rollouts = Rollouts(
            row_ids=tuple(mine),
            prompts=tuple(Prompt(i, whole[i][0], tuple(whole[i][1].tolist()), "") for i in mine),
            responses=tuple(whole[i][2] for i in mine),
            log_probs=tuple(torch.zeros(len(whole[i][2])) for i in mine),
            entropies=tuple(torch.zeros(len(whole[i][2])) for i in mine),
            truncated=tuple(False for _ in mine),
            weight_version=0,
        )
        scores = cast.score(rollouts, len(whole))
        assert scores.teachers == tuple(ROUTE[whole[i][0]] for i in mine)
        return cast.gathered(scores, rollouts)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "_score_share", listening)
        scores = cast.run(work)
    assert sorted(scores) == list(range(len(whole)))
    for row, (log_probs, entropies) in scores.items():
        label, prompt, response = whole[row]
        logits = hf_response_logits(reference(SPECS[ROUTE[label]]), prompt, response)[:, :VOCABULARY]
        expected = log_prob_and_entropy(logits, response)
        torch.testing.assert_close(log_probs.double(), expected[0], rtol=0, atol=5e-5)
        torch.testing.assert_close(entropies.double(), expected[1], rtol=0, atol=5e-5)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (computed, loads))
    for name in ROUTE:
        info = cast.pool.infos[name].layout
        replicas = [info.last_stage_of(replica, 0) for replica in range(info.data)]
        rows_of = [row for rank in replicas for row in everyone[rank][0][name]]
        wanted = [(tuple(p.tolist()), tuple(r.tolist())) for label, p, r in whole if ROUTE[label] == name]
        assert sorted(rows_of) == sorted(wanted)
        tokens = [everyone[rank][1].get(name, 0) for rank in replicas]
        longest = max((len(p) + len(r) for p, r in wanted), default=0)
        assert max(tokens) - min(tokens) <= longest


def test_an_abandoned_session_leaves_the_teachers_free(checkpoints, world, factory):
    cast = Cast(checkpoints, world, factory, at(0, 2), {"math": at(2, 1), "code": at(3, 1)}, LossConfig())

    def work():
        rollouts = rollouts_of(replica_rows(ROWS, cast.grid))
        session = cast.router.open(rollouts.prompts, rollouts.row_ids, total=ROWS)
        session.send(rollouts.row_ids[:2], rollouts.responses[:2])
        session.drain()
        return cast.gathered(cast.score(rollouts, ROWS), rollouts)

    one = at(0, 1)
    single = Cast(checkpoints, world, factory, one, {"math": one, "code": one}, LossConfig())
    expected = single.run(lambda: single.gathered(single.score(r := rollouts_of(range(ROWS)), ROWS), r))
    scores = cast.run(work)
    assert scores.keys() == expected.keys()
    for row, pair in scores.items():
        torch.testing.assert_close(pair, expected[row], rtol=1e-5, atol=1e-5)
