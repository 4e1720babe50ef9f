"""From a recipe to the objects of a run. Everything that can be wrong is found before a model is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from fire_megatron.checkpoint.load import load_weights
from fire_megatron.checkpoint.saving import Saver
from fire_megatron.config.errors import RecipeError, UserError
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.config.roles import keeps_cache, resolved, roles
from fire_megatron.config.schema import Recipe, RoleConfig, RolloutConfig
from fire_megatron.config.spans import Span
from fire_megatron.data.order import PromptOrder
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import TrainingRows
from fire_megatron.evaluation.during import Exam
from fire_megatron.evaluation.heldout import HeldOut
from fire_megatron.fire.hooks import Hook
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.models.build import build_model, model_dtype, resolve_layer_spec
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.collectives import everywhere, raise_on_any
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.platform import launch
from fire_megatron.platform.device import Device, compute_device, device_kind, reset_peak_memory
from fire_megatron.platform.host import HostMemory
from fire_megatron.platform.launch import World
from fire_megatron.platform.offload import Offload
from fire_megatron.platform.watch import Watch
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.teachers.heads import teacher_heads
from fire_megatron.teachers.pool import TeacherPool
from fire_megatron.teachers.router import TeacherRouter
from fire_megatron.teachers.states import StateKind
from fire_megatron.teachers.teacher import Teacher, TeacherInfo
from fire_megatron.train.inputs import Inputs, check, role_layout, used_vocabulary
from fire_megatron.train.rebalance import rebalance
from fire_megatron.train.student import Student

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class StudentRun:
    """What the ranks of the student step with."""

    recipe: Recipe
    grid: ModelGrid
    inputs: Inputs
    student: Student
    engine: MegatronEngine
    router: TeacherRouter
    hooks: list[Hook]
    order: PromptOrder
    held_out: HeldOut | None
    exams: list[Exam]
    saver: Saver
    waiting: dist.ProcessGroup | None
    """Of the student's ranks, on the host, for what may take as long as a replica samples; None for a single one."""
    memory: HostMemory = field(default_factory=HostMemory)
    """Of the rows of a step that come from other replicas."""

    def prompts(self, step: int) -> list[Prompt]:
        """Of every row of a step's global batch, by row id."""
        repeats = self.recipe.rollout.samples_per_prompt
        return [self.inputs.prompts[i] for i in self.order.batch(step) for _ in range(repeats)]

    def shared(self, parts: Iterable[TrainingRows], step: int) -> list[TrainingRows]:
        """This replica's even share of each of a step's mini-batches, of which every replica brings its part. Those of
        the step before are no longer there. Collective over ``grid.row_group``."""
        self.memory.reset()
        prompts, target = self.prompts(step), self.router.target
        return [rebalance(part, prompts, target, grid=self.grid, memory=self.memory) for part in parts]


@dataclass(frozen=True)
class Run:
    """A run ready to begin, on any of its ranks."""

    grid: ModelGrid
    """The student's."""
    inputs: Inputs
    pool: TeacherPool
    control: Control | None
    """Between the student and ranks without it; None where all ranks hold the student."""
    student: StudentRun | None
    """None on ranks that hold none of it."""


def _loaded(
    path: str, shape: ModelShape, role: RoleConfig, grid: ModelGrid, world: World, used_vocab_size: int
) -> FireGPT:
    """This rank's part of a role. Collective over the role's ranks; what any of them finds wrong, all of them raise."""
    model, problem = None, None
    try:
        # FP8 weights of a model that only scores need neither a transposed copy nor what they were made from.
        with torch.set_grad_enabled(path == "student"):
            model = build_model(shape, role, grid, device=world.device)
    except UserError as error:
        problem = str(error)
    except torch.OutOfMemoryError:
        raise  # which no setting of megatron-core's is to blame for
    except Exception as error:  # megatron-core checks some fields only where it uses them
        if not role.megatron:
            raise
        problem = (
            f"{path}.megatron: megatron-core cannot build the model with {dict(role.megatron)}: "
            f"{str(error) or type(error).__name__}; remove what it names"
        )
    raise_on_any(problem, RecipeError, group=grid.span)
    assert model is not None
    model.used_vocab_size = used_vocab_size
    load_weights(model, Path(role.checkpoint), grid=grid)
    return model


@dataclass(frozen=True)
class _Loaded:
    """This rank's part of a model, and where it waits if it leaves the device while it is idle."""

    model: FireGPT
    offload: Offload | None


def _load_models(
    recipe: Recipe,
    shapes: Mapping[str, ModelShape],
    grids: Mapping[str, ModelGrid],
    keys: Mapping[str, Hashable],
    world: World,
    watch: Watch,
    say: Say,
) -> dict[str, _Loaded]:
    """This rank's parts of the roles that it holds, by recipe path; roles of one key share a model. Teachers that wait
    on the host go there as soon as they are loaded, and the student comes last: they never have to fit together.

    Raises:
        UserError: on every rank, if any cannot load one of its own.
    """
    by_key: dict[Hashable, _Loaded] = {}
    problem: UserError | None = None
    used = used_vocabulary(shapes)
    away = _offloaded(recipe, keys)
    for path, role in sorted(roles(recipe).items(), key=lambda item: item[0] == "student"):
        watch.doing(f"loading {path}")
        say(f"loading {path} from {role.checkpoint} on {_place(grids[path].layout)}")
        if not grids[path].is_member or keys[path] in by_key:
            continue
        try:
            model = _loaded(path, shapes[path], role, grids[path], world, used)
        except UserError as error:  # the role's other ranks raise too; other roles may still wait for this one
            problem = problem or error
            continue
        offload = Offload(model.parameters, constant=True) if path != "student" and keys[path] in away else None
        if offload:
            offload.leave()
        by_key[keys[path]] = _Loaded(model, offload)
    everywhere(_reraise, problem)
    return {path: by_key[keys[path]] for path in roles(recipe) if keys[path] in by_key}


def _place(layout: Layout) -> str:
    """``ranks 2-3 (pipeline 2)``."""
    sizes = {name: getattr(layout, name) for name in ("tensor", "pipeline", "context", "expert", "data")}
    split = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return str(Span(layout.first_rank, layout.num_ranks)) + (f" ({split})" if split else "")


def model_keys(recipe: Recipe, grids: Mapping[str, ModelGrid], device: Device) -> dict[str, Hashable]:
    """By recipe path: equal for teachers that can share one model, the same checkpoint in the same form on the same
    ranks. The student's weights change, so it shares with nobody."""
    keys: dict[str, Hashable] = {}
    for path, role in roles(recipe).items():
        layout = grids[path].layout
        sequence = layout.tensor > 1 if role.parallel.sequence is None else role.parallel.sequence
        keys[path] = (
            path if path == "student" else Path(role.checkpoint).resolve(),
            layout,
            sequence,
            role.precision,
            resolve_layer_spec(role.layer_spec, device),
            role.vocab_multiple,
            json.dumps(role.megatron, sort_keys=True),
        )
    return keys


def _offloaded(recipe: Recipe, keys: Mapping[str, Hashable]) -> set[Hashable]:
    """Models that wait on the host: one name of a shared model that says so is enough."""
    return {keys[path] for path, role in roles(recipe).items() if role.offload}


def _reraise(problem: UserError | None) -> None:
    if problem is not None:
        raise problem


def _pool(
    recipe: Recipe,
    shapes: Mapping[str, ModelShape],
    grids: Mapping[str, ModelGrid],
    keys: Mapping[str, Hashable],
    loaded: Mapping[str, _Loaded],
    factory: GridFactory,
    watch: Watch,
) -> TeacherPool:
    """Every teacher, and this rank's parts."""
    infos, teachers = {}, {}
    kind, away = StateKind.of(recipe.loss), _offloaded(recipe, keys)
    for name, config in recipe.teachers.items():
        path = f"teachers.{name}"
        infos[name] = TeacherInfo(
            name,
            grids[path].layout,
            shapes[path].hidden,
            model_dtype(config.precision, device_kind(compute_device())),
            used_vocabulary(shapes),
            kind,
            keys[path] in away,
        )
        if path in loaded:
            teachers[name] = Teacher(
                name,
                loaded[path].model,
                grids[path],
                micro_batch_tokens=config.micro_batch_tokens,
                state_kind=kind,
                offload=loaded[path].offload,
            )
            assert teachers[name].info == infos[name]
    return TeacherPool(infos, teachers, student_grid=grids["student"], factory=factory, doing=watch.doing)


def checkpoint_folder(recipe: Recipe) -> Path:
    """Where the run's checkpoints are."""
    return Path(recipe.checkpoint.dir or Path(recipe.run.dir) / "checkpoints")


def prepare(recipe: Recipe, world: World, watch: Watch, say: Say) -> Run:
    """Build a run. Collective: every rank of the world calls it alike, and all of them raise if one does.

    Raises:
        UserError: recipe, data, layout or checkpoint are not usable; no model has been built yet in most cases.
    """
    assert recipe == resolved(recipe, world.device.kind), "formats are named by whoever begins a run"
    factory = GridFactory(timeout=recipe.run.collective_timeout)
    hooks, shapes, inputs = everywhere(check, recipe, device=world.device, num_ranks=world.size)
    for note in inputs.notes:
        say(note)
    grids = {path: factory.grid(role_layout(role, world.size)) for path, role in roles(recipe).items()}
    grid = grids["student"]
    keys = model_keys(recipe, grids, world.device)
    loaded = _load_models(recipe, shapes, grids, keys, world, watch, say)
    heads = everywhere(_heads, recipe, shapes, loaded)
    pool = _pool(recipe, shapes, grids, keys, loaded, factory, watch)
    control = (
        Control(launch.store(), speaks=world.rank == grid.layout.first_rank)
        if grid.layout.num_ranks < world.size
        else None
    )
    saving = factory.cpu_group(grid.layout.ranks, purpose="saving") if recipe.checkpoint.async_save else None
    several = grid.layout.row_replicas > 1
    waiting = (
        factory.cpu_group(grid.layout.ranks, purpose="waiting") if several or recipe.evaluation.benchmarks else None
    )
    student = None
    if grid.is_member:
        saver = Saver(
            checkpoint_folder(recipe),
            source=Path(recipe.student.checkpoint),
            keep=recipe.checkpoint.keep,
            grid=grid,
            background=saving,
            holding=watch.unbroken,
        )
        model = loaded["student"].model
        student = _student_run(recipe, grid, inputs, hooks, model, heads, pool, control, watch, saver, waiting)
    reset_peak_memory(world.device)
    return Run(grid, inputs, pool, control, student)


def _student_run(
    recipe: Recipe,
    grid: ModelGrid,
    inputs: Inputs,
    hooks: list[Hook],
    model: FireGPT,
    heads: dict[str, OutputLayer],
    pool: TeacherPool,
    control: Control | None,
    watch: Watch,
    saver: Saver,
    waiting: dist.ProcessGroup | None,
) -> StudentRun:
    student = Student(
        model, grid, loss=recipe.loss, optimizer=recipe.optimizer, precision=recipe.student.precision, heads=heads
    )
    router = TeacherRouter(
        pool,
        inputs.route,
        student_grid=grid,
        prompts=[*inputs.prompts, *inputs.held_out],
        mixture=recipe.loss.mixture,
        control=control,
        watch=watch,
        timeout=recipe.run.collective_timeout,
        offload=Offload(student.memory, constant=False, scratch=student.gradients) if recipe.student.offload else None,
        group_size=recipe.rollout.group_size,
    )
    engine = MegatronEngine(
        model,
        grid,
        recipe.rollout,
        stop_ids=inputs.stop_ids,
        seed=recipe.run.seed,
        keep_cache=keeps_cache(recipe, on_gpu=compute_device().type == "cuda"),
    )
    order = PromptOrder(
        len(inputs.prompts), recipe.rollout.prompts_per_step, seed=recipe.run.seed, shuffle=recipe.data.shuffle
    )
    held_out, exams = (
        _held_out(recipe, inputs, model, router, grid),
        _exams(recipe, inputs, model, grid, waiting, watch),
    )
    together = waiting if grid.row_replicas > 1 else None
    return StudentRun(recipe, grid, inputs, student, engine, router, hooks, order, held_out, exams, saver, together)


def _heads(recipe: Recipe, shapes: Mapping[str, ModelShape], loaded: Mapping[str, _Loaded]) -> dict[str, OutputLayer]:
    """The teachers' output weights, where the loss forms their logits."""
    if recipe.loss.estimator != "full" or "student" not in loaded:
        return {}
    paths = {name: f"teachers.{name}" for name in recipe.teachers}
    # A teacher whose weights are away while the student learns cannot lend them.
    lent = {name: loaded[path].model for name, path in paths.items() if path in loaded and loaded[path].offload is None}
    named = {name: shapes[path] for name, path in paths.items()}
    return teacher_heads(recipe.teachers, named, lent, loaded["student"].model)


def _held_out(recipe: Recipe, inputs: Inputs, model: FireGPT, router: TeacherRouter, grid: ModelGrid) -> HeldOut | None:
    if not inputs.held_out:
        return None
    config: RolloutConfig = replace(
        recipe.rollout, max_new_tokens=recipe.evaluation.max_new_tokens, temperature=1.0, top_p=1.0
    )
    engine = MegatronEngine(model, grid, config, stop_ids=inputs.stop_ids, seed=recipe.evaluation.seed)
    return HeldOut(inputs.held_out, engine, router, grid)


def _exams(
    recipe: Recipe,
    inputs: Inputs,
    model: FireGPT,
    grid: ModelGrid,
    waiting: dist.ProcessGroup | None,
    watch: Watch,
) -> list[Exam]:
    exams = []
    wait = partial(watch.patiently, "waiting for the other ranks' evaluation")
    for config, (benchmark, prompts) in zip(recipe.evaluation.benchmarks, inputs.benchmarks, strict=True):
        rollout = replace(
            recipe.rollout,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            batch_size=config.batch_size,
        )
        engine = MegatronEngine(model, grid, rollout, stop_ids=inputs.stop_ids, seed=recipe.evaluation.seed)
        exams.append(Exam(benchmark, prompts, config.samples, engine, grid, inputs.tokenizer, waiting, wait))
    return exams
