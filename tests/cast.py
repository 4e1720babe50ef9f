"""A student and two teachers in any layouts, on the same ranks or on others, and a step of theirs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from models import VOCABULARY
from roles import load_role, parallel_config, whole_gradients
from steps import ROUTE, ROWS, TEACHERS, rollouts_of, rows

from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.loss import LossConfig
from fire_megatron.config.schema import OptimizerConfig, PrecisionConfig, StudentConfig, TeacherConfig
from fire_megatron.data.packing import fill_by_tokens
from fire_megatron.fire.hooks import build_hooks
from fire_megatron.metrics.values import reduce_metrics
from fire_megatron.parallel.control import Control
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

ESTIMATORS = {
    "sampled": LossConfig(),
    "sampled, temperature": LossConfig(temperature=0.7, chunk_tokens=5),
    "full": LossConfig(
        estimator="full", divergence="jensen_shannon", beta=0.3, temperature=1.2, teacher_temperature=1.5
    ),
    "full, log_probs": LossConfig(estimator="full", mixture="log_probs", student_temperature=0.8, chunk_tokens=5),
    "topk": LossConfig(estimator="topk", top_k=7, divergence="forward_kl", chunk_tokens=5),
}


class Cast:
    """A student and two teachers on their spans, on every rank of the world."""

    def __init__(
        self, folder, world, factory, student, teachers, loss, *, mixed=False, offload=False, name="student",
        sequence=None, micro_batch_size=2, micro_batch_tokens=0,
    ):  # fmt: skip
        """Builds what this rank holds; collective.

        Args:
            folder: of :func:`steps.write_checkpoints`, where the student's checkpoint is ``name``.
            student: layout.
            teachers: layouts by name, or one of both.
            mixed: whether some rows learn from both teachers.
            micro_batch_tokens: packs rows by tokens, where it is not 0.
        """
        teachers = teachers if isinstance(teachers, dict) else dict.fromkeys(TEACHERS, teachers)
        self.loss, self.mixed, self.grid = loss, mixed, factory.grid(student)
        self.budget, self.micro_batch_size = micro_batch_tokens, micro_batch_size
        grids = {name: factory.grid(layout) for name, layout in teachers.items()}
        path, parallel = folder / name, parallel_config(student, sequence=sequence)
        role = StudentConfig(checkpoint=str(path), parallel=parallel, vocab_multiple=4)
        self.model = load_role(path, role, self.grid, world) if self.grid.is_member else None
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
            self._student(heads, micro_batch_tokens, micro_batch_size, offload)

    def _student(self, heads, micro_batch_tokens, micro_batch_size, offload):
        # distributed=False leaves each whole gradient in main_grad on every data-parallel rank, to be compared.
        settings = OptimizerConfig(
            micro_batch_size=1 if micro_batch_tokens else micro_batch_size,
            micro_batch_tokens=micro_batch_tokens,
            distributed=False,
        )
        self.student = Student(
            self.model, self.grid, loss=self.loss, optimizer=settings, precision=PrecisionConfig(), heads=heads
        )
        self.router = TeacherRouter(
            self.pool,
            ROUTE,
            student_grid=self.grid,
            prompts=rows(self.mixed)[0],
            mixture=self.loss.mixture,
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
        scoring = self.router.open(
            rollouts.prompts, rollouts.row_ids, total=total, keep_states=True, temperature=self.loss.temperature
        )
        size = scoring.group_size if self.pool.remote else max(len(rollouts), 1)
        for start in range(0, len(rollouts), size):
            scoring.send(rollouts.row_ids[start : start + size], rollouts.responses[start : start + size])
        return scoring.finish(rollouts)

    def gathered(self, scores, rollouts):
        """(log-probs, entropies) by row, of all replicas, on all of the student's ranks."""
        own = {r: (lp, h) for r, lp, h in zip(rollouts.row_ids, scores.log_probs, scores.entropies, strict=True)}
        parts = [None] * self.grid.span.size()
        dist.all_gather_object(parts, own, group=self.grid.span)
        return {row: pair for part in parts for row, pair in part.items()}

    def step(self, count=ROWS, rollouts=None):
        """Scores, metrics and whole gradients of a step, the same on all of the student's ranks; of the first rows of
        :func:`steps.rows`, or of rollouts that were sampled."""
        rollouts = rollouts or rollouts_of(self.grid.own_rows(count), self.mixed)
        scores = self.score(rollouts, count)
        hooks = build_hooks(self.loss.hooks)
        selected = select(
            rollouts, scores, hooks, self.router.names, micro_batch_size=self.micro_batch_size, grid=self.grid
        )
        kept = rebalance(selected.rows, rows(self.mixed)[0], self.router.target, grid=self.grid, memory=HostMemory())
        part, traffic = self.router.attach(kept, scores.kept)
        if self.budget:
            packed = [sorted(pack.rows) for pack in self.student.packs(part)]
            expected = fill_by_tokens(range(len(part)), part.rollouts.lengths, self.budget) or [[]]
            assert packed == [sorted(batch) for batch in expected]
        tokens = self.student.count_tokens(part, Reducer(self.grid.pg.dp))
        metrics = self.student.accumulate_gradients(part, tokens=tokens)
        if self.grid.tp_rank == 0 and self.grid.is_first_stage:  # each row once, as in the trainer
            metrics = selected.metrics | metrics
        metrics = reduce_metrics(traffic | metrics, group=self.grid.span)
        return self.gathered(scores, rollouts), metrics, whole_gradients(self.student, self.grid)


def assert_same_gradients(ours, expected, case):
    """Whole gradients by checkpoint key, to 1e-5 of a tensor's largest."""
    assert ours.keys() == expected.keys(), case
    for key, gradient in ours.items():
        scale = expected[key].abs().max()
        assert scale > 0 and (gradient - expected[key]).abs().max() <= 1e-5 * scale, f"{case}: {key}"
