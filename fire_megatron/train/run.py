"""What the ranks of the student step with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch.distributed as dist

from fire_megatron.checkpoint.saving import Saver
from fire_megatron.config.schema import Recipe
from fire_megatron.data.order import PromptOrder
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import TrainingRows
from fire_megatron.evaluation.heldout import HeldOut
from fire_megatron.evaluation.runner import BenchmarkRunner
from fire_megatron.fire.hooks import Hook
from fire_megatron.parallel.collectives import wait_for_all
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.host import HostMemory
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.router import TeacherRouter
from fire_megatron.train.fruitless import Fruitless
from fire_megatron.train.guard import UpdateGuard
from fire_megatron.train.inputs import Inputs
from fire_megatron.train.interrupt import Stopped, StopRequest
from fire_megatron.train.phases import Phases
from fire_megatron.train.rebalance import rebalance
from fire_megatron.train.student import Student


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, on a rank of the student."""

    recipe: Recipe
    grid: ModelGrid
    """The student's."""
    inputs: Inputs
    student: Student
    engine: MegatronEngine
    sampling: Sampling
    """Of a step."""
    router: TeacherRouter
    hooks: list[Hook]
    order: PromptOrder
    held_out: HeldOut | None
    benchmarks: BenchmarkRunner | None
    saver: Saver
    guard: UpdateGuard
    fruitless: Fruitless
    phases: Phases
    stop: StopRequest
    control: Control | None
    """To ranks that hold none of the student; None where there are none."""
    waiting: dist.ProcessGroup | None
    """Of the student's ranks, on the host, for what may take as long as a replica samples; None for a single one."""
    memory: HostMemory = field(default_factory=HostMemory)
    """Of the rows of a step that come from other replicas."""

    def prompts(self, step: int) -> list[Prompt]:
        """Of every row of a step's global batch, by row id."""
        repeats = self.recipe.rollout.samples_per_prompt
        return [self.inputs.prompts[i] for i in self.order.batch(step) for _ in range(repeats)]

    @property
    def rows_per_step(self) -> int:
        """Answers of a step's global batch."""
        return self.recipe.rollout.prompts_per_step * self.recipe.rollout.samples_per_prompt

    def own_rows(self, step: int) -> dict[int, Prompt]:
        """Row id -> prompt of what this replica samples in a step."""
        prompts = self.prompts(step)
        return {row: prompts[row] for row in self.grid.own_rows(len(prompts))}

    def shared_out(self, parts: Iterable[TrainingRows], step: int) -> list[TrainingRows]:
        """This replica's even share of each of a step's mini-batches, of which every replica brings its part. Those of
        the step before are no longer there. Collective over ``grid.row_group``."""
        self.memory.reset()
        prompts, target = self.prompts(step), self.router.target
        return [rebalance(part, prompts, target, grid=self.grid, memory=self.memory) for part in parts]

    def wait_for_replicas(self) -> None:
        """Until all have sampled, however long some take: devices wait for one another only so long."""
        with self.phases("rollout_wait"), self.phases.watch.patiently("waiting for the other replicas' samples"):
            if self.waiting is not None:
                wait_for_all(group=self.waiting)

    def asked_to_stop(self) -> bool:
        """Whether the run was, on any of its ranks, or has to, since a step cannot be saved. Collective over the
        student's ranks, which get the same answer."""
        if self.control is not None and self.stop.signal_name is None:
            passed_on = self.control.asked_to_stop()
            if passed_on:
                self.stop.signal_name = f"{passed_on} to a rank without the student"
        return self.stop.agreed(self.saver.failed, group=self.grid.span)

    def leave_if_asked(self, first: Callable[[], object] = lambda: None) -> None:
        """Give up the step in progress where the run was asked to stop. Collective as :meth:`asked_to_stop`.

        Args:
            first: is called before, to leave nobody waiting.

        Raises:
            Stopped: on every rank of the student.
        """
        if self.asked_to_stop():
            first()
            raise Stopped
