"""From a recipe to the objects of a run. Everything that can be wrong is found before a model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import torch.distributed as dist

from fire_megatron.checkpoint.saving import Saver
from fire_megatron.config.checkpoints import checkpoint_folder
from fire_megatron.config.roles import keeps_cache, resolved, roles
from fire_megatron.config.schema import Recipe
from fire_megatron.data.order import PromptOrder
from fire_megatron.evaluation.heldout import HeldOut
from fire_megatron.evaluation.runner import BenchmarkRunner
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.models.build import model_dtype
from fire_megatron.parallel.collectives import on_all_ranks
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.grid import GridFactory
from fire_megatron.platform import launch
from fire_megatron.platform.device import compute_device, reset_peak_memory
from fire_megatron.platform.launch import World
from fire_megatron.platform.offload import Offload
from fire_megatron.platform.watch import Watch
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.rollout.sampling import Sampling
from fire_megatron.teachers.heads import teacher_heads
from fire_megatron.teachers.messages import StateKind
from fire_megatron.teachers.pool import TeacherPool
from fire_megatron.teachers.router import TeacherRouter
from fire_megatron.teachers.teacher import Teacher, TeacherInfo
from fire_megatron.train.fruitless import Fruitless
from fire_megatron.train.guard import UpdateGuard
from fire_megatron.train.inputs import check, role_layout
from fire_megatron.train.interrupt import StopRequest
from fire_megatron.train.models import RoleModels
from fire_megatron.train.phases import Phases
from fire_megatron.train.run import Run
from fire_megatron.train.student import Student


class Setup:
    """A run ready to begin, on any of its ranks: what it reads, where its roles are, and this rank's parts."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        watch: Watch,
        say: Callable[[str], None],
        stop: StopRequest | None = None,
        *,
        begun: datetime | None = None,
    ) -> None:
        """Build it. Collective: every rank of the world calls it alike, and all of them raise if one does.

        Args:
            recipe: as loaded and checked by config/, its formats named.
            world: this process's place.
            watch: its signs of life.
            say: tells people.
            stop: hears signals.
            begun: when the run was, the same on every rank: what chat templates are told of the time.

        Raises:
            UserError: recipe, data, layout or checkpoint are not usable; no model has been built yet in most cases.
        """
        assert recipe == resolved(recipe, world.device.kind), "formats are named by whoever begins a run"
        self.recipe, self.world, self.watch = recipe, world, watch
        self.factory = GridFactory(timeout=recipe.run.collective_timeout)
        self.hooks, self.shapes, self.inputs = on_all_ranks(
            check, recipe, device=world.device, num_ranks=world.size, now=begun, group=dist.group.WORLD
        )
        for note in self.inputs.notes:
            say(note)
        self.grids = {path: self.factory.grid(role_layout(role, world.size)) for path, role in roles(recipe).items()}
        self.grid = self.grids["student"]
        self.models = RoleModels(recipe, self.shapes, self.grids, world.device)
        self.loaded = self.models.load(watch.doing, say)
        self.heads = on_all_ranks(self._heads, group=dist.group.WORLD)
        self.pool = self._pool()
        apart = self.grid.layout.num_ranks < world.size
        self.control = Control(launch.store(), speaks=world.rank == self.grid.layout.first_rank) if apart else None
        """Between the student and ranks without it; None where all ranks hold the student."""
        ranks = self.grid.layout.ranks
        self._saving = self.factory.cpu_group(ranks, purpose="saving") if recipe.checkpoint.async_save else None
        waits = self.grid.row_replicas > 1 or recipe.evaluation.benchmarks
        self._waiting = self.factory.cpu_group(ranks, purpose="waiting") if waits else None
        self.run = self._run(stop or StopRequest()) if self.grid.is_member else None
        """None on ranks that hold none of the student."""
        reset_peak_memory(world.device)

    def _heads(self) -> dict[str, OutputLayer]:
        """The teachers' output weights, where the loss forms their logits."""
        if self.recipe.loss.estimator != "full" or not self.grid.is_member:
            return {}
        paths = {name: f"teachers.{name}" for name in self.recipe.teachers}
        held = {name: self.loaded[path] for name, path in paths.items() if path in self.loaded}
        # A teacher whose weights are away while the student learns cannot lend them.
        lent = {name: loaded.model for name, loaded in held.items() if loaded.offload is None}
        shapes = {name: self.shapes[path] for name, path in paths.items()}
        return teacher_heads(self.recipe.teachers, shapes, lent, self.loaded["student"].model)

    def _pool(self) -> TeacherPool:
        """Every teacher, and this rank's parts."""
        infos, teachers, kind = {}, {}, StateKind.of(self.recipe.loss)
        for name, config in self.recipe.teachers.items():
            path = f"teachers.{name}"
            infos[name] = TeacherInfo(
                name,
                self.grids[path].layout,
                self.shapes[path].hidden,
                model_dtype(config.precision, self.world.device.kind),
                self.models.used_vocab_size,
                kind,
                self.models.waits_on_host(path),
            )
            if path in self.loaded:
                loaded, size = self.loaded[path], config.micro_batch_tokens
                teachers[name] = Teacher(
                    loaded.model, self.grids[path], micro_batch_tokens=size, state_kind=kind, offload=loaded.offload
                )
        return TeacherPool(infos, teachers, student_grid=self.grid, factory=self.factory, doing=self.watch.doing)

    def _run(self, stop: StopRequest) -> Run:
        recipe, grid, inputs = self.recipe, self.grid, self.inputs
        model = self.loaded["student"].model
        student = Student(
            model,
            grid,
            loss=recipe.loss,
            optimizer=recipe.optimizer,
            precision=recipe.student.precision,
            heads=self.heads,
        )
        engine = MegatronEngine(
            model,
            grid,
            sync_every=recipe.rollout.sync_every,
            cuda_graphs=recipe.rollout.cuda_graphs,
            keep_cache=keeps_cache(recipe, on_gpu=compute_device().type == "cuda"),
        )
        router = self._router(student)
        sampling = Sampling.of(recipe.rollout, seed=recipe.run.seed, stop_ids=inputs.stop_ids)
        order = PromptOrder(
            len(inputs.prompts), recipe.rollout.prompts_per_step, seed=recipe.run.seed, shuffle=recipe.data.shuffle
        )
        return Run(
            recipe=recipe,
            grid=grid,
            inputs=inputs,
            student=student,
            engine=engine,
            sampling=sampling,
            router=router,
            hooks=self.hooks,
            order=order,
            held_out=self._held_out(engine, sampling, router),
            benchmarks=self._benchmarks(),
            saver=self._saver(),
            guard=UpdateGuard(recipe.optimizer.guard),
            fruitless=Fruitless(recipe.optimizer.guard.max_skipped),
            phases=Phases(self.watch, self.world.device),
            stop=stop,
            control=self.control,
            waiting=self._waiting if grid.row_replicas > 1 else None,
        )

    def _router(self, student: Student) -> TeacherRouter:
        recipe, offload = self.recipe, None
        if recipe.student.offload:
            offload = Offload(student.memory, constant=False, scratch=student.gradients)
        return TeacherRouter(
            self.pool,
            self.inputs.route,
            student_grid=self.grid,
            prompts=[*self.inputs.prompts, *self.inputs.held_out],
            mixture=recipe.loss.mixture,
            control=self.control,
            watch=self.watch,
            timeout=recipe.run.collective_timeout,
            offload=offload,
            group_size=recipe.rollout.group_size,
        )

    def _saver(self) -> Saver:
        return Saver(
            checkpoint_folder(self.recipe),
            source=Path(self.recipe.student.checkpoint),
            keep=self.recipe.checkpoint.keep,
            grid=self.grid,
            background=self._saving,
            holding=self.watch.unbroken,
        )

    def _held_out(self, engine: MegatronEngine, sampling: Sampling, router: TeacherRouter) -> HeldOut | None:
        if not self.inputs.held_out:
            return None
        own = self.recipe.evaluation
        sampling = replace(sampling, max_new_tokens=own.max_new_tokens, temperature=1.0, top_p=1.0, seed=own.seed)
        return HeldOut(self.inputs.held_out, engine, sampling, router, self.grid)

    def _benchmarks(self) -> BenchmarkRunner | None:
        if not self.inputs.benchmarks:
            return None
        assert self._waiting is not None
        wait = partial(self.watch.patiently, "waiting for the other ranks' evaluation")
        return BenchmarkRunner(self.inputs.benchmarks, self.inputs.tokenizer, self.grid, self._waiting, wait)
