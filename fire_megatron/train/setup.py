"""From a recipe to the objects of a run. Everything that can be wrong is found before a model is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from fire_megatron.checkpoint.load import load_weights
from fire_megatron.config.errors import RecipeError, UserError
from fire_megatron.config.roles import roles
from fire_megatron.config.schema import Recipe, RoleConfig, RolloutConfig
from fire_megatron.config.spans import Span
from fire_megatron.data.order import PromptOrder
from fire_megatron.evaluation.heldout import HeldOut
from fire_megatron.fire.hooks import Hook
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.models.build import (
    DTYPES,
    build_model,
)
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.hf_config import ModelShape
from fire_megatron.parallel.collectives import raise_on_any
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.platform import Offload, Watch, World, launch
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.teachers.heads import teacher_heads
from fire_megatron.teachers.pool import TeacherPool
from fire_megatron.teachers.router import TeacherRouter
from fire_megatron.teachers.states import StateKind
from fire_megatron.teachers.teacher import Teacher, TeacherInfo
from fire_megatron.teachers.transfer import Transfer
from fire_megatron.train.inputs import Inputs, check, role_layout, used_vocabulary
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


@dataclass(frozen=True)
class Run:
    """A run ready to begin, on any of its ranks."""

    grid: ModelGrid
    """The student's."""
    inputs: Inputs
    pool: TeacherPool
    transfer: Transfer
    control: Control | None
    """Between the student and ranks without it; None where all ranks hold the student."""
    student: StudentRun | None
    """None on ranks that hold none of it."""


def on_all_ranks(action: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Run something that may find a user's mistake; if any rank does, every rank raises."""
    problem, result = None, None
    try:
        result = action(*args, **kwargs)
    except UserError as error:
        problem = error
    raise_on_any(str(problem) if problem else None, type(problem) if problem else UserError, group=dist.group.WORLD)
    return result  # type: ignore[return-value]


def _loaded(
    path: str, shape: ModelShape, role: RoleConfig, grid: ModelGrid, world: World, used_vocab_size: int
) -> FireGPT:
    try:
        model = build_model(shape, role, grid, device=world.device)
    except Exception as error:  # megatron-core checks some fields only where it uses them
        if not role.megatron or isinstance(error, UserError):
            raise
        raise RecipeError(
            f"{path}.megatron: megatron-core cannot build the model with {dict(role.megatron)}: "
            f"{str(error) or type(error).__name__}; remove what it names"
        ) from error
    model.used_vocab_size = used_vocab_size
    load_weights(model, Path(role.checkpoint), grid=grid)
    return model


def _load_models(
    recipe: Recipe, shapes: Mapping[str, ModelShape], grids: Mapping[str, ModelGrid], world: World, say: Say
) -> dict[str, FireGPT]:
    """This rank's parts of the roles that it holds; teachers alike in all that makes a model share one.

    Raises:
        UserError: on every rank, if any cannot load one of its own.
    """
    models: dict[str, FireGPT] = {}
    made: dict[tuple[str, ...], FireGPT] = {}
    problem: UserError | None = None
    for path, role in roles(recipe).items():
        say(f"loading {path} from {role.checkpoint} on {_place(grids[path].layout)}")
        if not grids[path].is_member:
            continue
        alike = model_key(role) if path != "student" else ("student",)  # whose weights change
        try:
            if alike not in made:
                made[alike] = _loaded(path, shapes[path], role, grids[path], world, used_vocabulary(shapes))
            models[path] = made[alike]
        except UserError as error:  # the role's other ranks find the same; other roles may still wait for this rank
            problem = problem or error
    on_all_ranks(_reraise, problem)
    return models


def _place(layout: Layout) -> str:
    """``ranks 2-3 (pipeline 2)``."""
    sizes = {name: getattr(layout, name) for name in ("tensor", "pipeline", "context", "expert", "data")}
    split = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return str(Span(layout.first_rank, layout.num_ranks)) + (f" ({split})" if split else "")


def model_key(role: RoleConfig) -> tuple[str, ...]:
    """What two teachers have in common that share one model."""
    alike = replace(role, checkpoint=str(Path(role.checkpoint).resolve()))
    return tuple(repr(getattr(alike, field.name)) for field in fields(RoleConfig))


def _reraise(problem: UserError | None) -> None:
    if problem is not None:
        raise problem


def _pool(
    recipe: Recipe,
    shapes: Mapping[str, ModelShape],
    grids: Mapping[str, ModelGrid],
    models: Mapping[str, FireGPT],
    factory: GridFactory,
    watch: Watch,
) -> TeacherPool:
    """The teachers; those whose weights wait on the host are sent there."""
    infos, teachers = {}, {}
    offloads: dict[int, Offload] = {}
    for name, config in recipe.teachers.items():
        path, kind = f"teachers.{name}", StateKind.of(recipe.loss)
        infos[name] = TeacherInfo(
            name,
            grids[path].layout,
            shapes[path].hidden,
            DTYPES[config.precision.dtype],
            used_vocabulary(shapes),
            kind,
            config.offload,
        )
        if path not in models:
            continue
        model = models[path]
        if config.offload:
            offloads.setdefault(id(model), Offload(model.parameters, constant=True))
        teachers[name] = Teacher(
            name,
            model,
            grids[path],
            micro_batch_tokens=config.micro_batch_tokens,
            state_kind=kind,
            offload=offloads.get(id(model)),
        )
    for offload in offloads.values():
        offload.leave()
    return TeacherPool(infos, teachers, student_grid=grids["student"], factory=factory, doing=watch.doing)


def prepare(recipe: Recipe, world: World, watch: Watch, say: Say) -> Run:
    """Build a run. Collective: every rank of the world calls it alike, and all of them raise if one does.

    Raises:
        UserError: recipe, data, layout or checkpoint are not usable; no model has been built yet in most cases.
    """
    factory = GridFactory(timeout=recipe.run.collective_timeout)
    hooks, shapes, inputs = on_all_ranks(check, recipe, device=world.device, num_ranks=world.size)
    for note in inputs.notes:
        say(note)
    grids = {path: factory.grid(role_layout(role, world.size)) for path, role in roles(recipe).items()}
    grid = grids["student"]
    models = _load_models(recipe, shapes, grids, world, say)
    heads = on_all_ranks(_heads, recipe, shapes, models)
    pool = _pool(recipe, shapes, grids, models, factory, watch)
    control = Control(launch.store()) if grid.layout.num_ranks < world.size else None
    student = None
    if grid.is_member:
        student = _student_run(recipe, grid, inputs, hooks, models["student"], heads, pool, control, watch)
    return Run(grid, inputs, pool, Transfer(pool, grid, control), control, student)


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
        offload=Offload(student.memory, constant=False) if recipe.student.offload else None,
        group_size=recipe.rollout.group_size,
    )
    engine = MegatronEngine(model, grid, recipe.rollout, stop_ids=inputs.stop_ids, seed=recipe.run.seed)
    order = PromptOrder(
        len(inputs.prompts), recipe.rollout.prompts_per_step, seed=recipe.run.seed, shuffle=recipe.data.shuffle
    )
    held_out = _held_out(recipe, inputs, model, router, grid)
    return StudentRun(recipe, grid, inputs, student, engine, router, hooks, order, held_out)


def _heads(recipe: Recipe, shapes: Mapping[str, ModelShape], models: Mapping[str, FireGPT]) -> dict[str, OutputLayer]:
    """The teachers' output weights, where the loss forms their logits."""
    if recipe.loss.estimator != "full" or "student" not in models:
        return {}
    named = {name: shapes[f"teachers.{name}"] for name in recipe.teachers}
    # A teacher whose weights are away while the student learns cannot lend them.
    lent = {
        name: models[f"teachers.{name}"]
        for name, config in recipe.teachers.items()
        if f"teachers.{name}" in models and not config.offload
    }
    return teacher_heads(recipe.teachers, named, lent, models["student"])


def _held_out(recipe: Recipe, inputs: Inputs, model: FireGPT, router: TeacherRouter, grid: ModelGrid) -> HeldOut | None:
    if not inputs.held_out:
        return None
    config: RolloutConfig = replace(
        recipe.rollout, max_new_tokens=recipe.evaluation.max_new_tokens, temperature=1.0, top_p=1.0
    )
    engine = MegatronEngine(model, grid, config, stop_ids=inputs.stop_ids, seed=recipe.evaluation.seed)
    return HeldOut(inputs.held_out, engine, router, grid)
