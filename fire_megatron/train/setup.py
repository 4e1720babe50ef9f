"""From a recipe to the objects of a run. Everything that can be wrong is found before a model is built."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from fire_megatron.checkpoint.load import load_weights
from fire_megatron.checkpoint.whole import open_whole
from fire_megatron.config.errors import RecipeError, UserError
from fire_megatron.config.roles import roles, routes
from fire_megatron.config.schema import Recipe, RoleConfig, RolloutConfig
from fire_megatron.config.spans import Span, parse_span
from fire_megatron.data.order import PromptOrder
from fire_megatron.data.prompts import read_prompts
from fire_megatron.data.records import Prompt
from fire_megatron.data.tokenizer import Tokenizer, load_tokenizer
from fire_megatron.evaluation.heldout import HeldOut
from fire_megatron.fire.hooks import Hook, build_hooks
from fire_megatron.losses.fused import OutputLayer
from fire_megatron.models.build import (
    DTYPES,
    build_model,
    check_megatron_overrides,
    resolve_layer_spec,
    transformer_config,
)
from fire_megatron.models.gpt import FireGPT
from fire_megatron.models.hf_config import ModelShape, read_hf_config
from fire_megatron.parallel.collectives import raise_on_any
from fire_megatron.parallel.control import Control
from fire_megatron.parallel.grid import GridFactory, Layout, ModelGrid
from fire_megatron.platform import Device, Offload, Watch, World, launch
from fire_megatron.rollout.engine import MegatronEngine
from fire_megatron.teachers.heads import teacher_heads
from fire_megatron.teachers.pool import TeacherPool
from fire_megatron.teachers.router import TeacherRouter
from fire_megatron.teachers.states import StateKind
from fire_megatron.teachers.teacher import Teacher, TeacherInfo
from fire_megatron.teachers.transfer import Transfer
from fire_megatron.train.student import Student

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides weights."""

    tokenizer: Tokenizer
    prompts: list[Prompt]
    held_out: list[Prompt]
    stop_ids: tuple[int, ...]
    route: dict[str, str]
    notes: tuple[str, ...]
    """What was read, for people."""


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


def role_layout(role: RoleConfig, num_ranks: int) -> Layout:
    """A role's layout over its ranks in a world of so many."""
    parallel, span = role.parallel, parse_span(role.ranks, num_ranks)
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        expert=parallel.expert,
        first_rank=span.first,
        num_ranks=span.count,
    )


def rank_roles(recipe: Recipe, world: World) -> str:
    """The roles that this rank holds, for people: ``student and teachers.math``."""
    held = [path for path, role in roles(recipe).items() if world.rank in parse_span(role.ranks, world.size).ranks]
    return " and ".join(held)


def on_all_ranks(action: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Run something that may find a user's mistake; if any rank does, every rank raises."""
    problem, result = None, None
    try:
        result = action(*args, **kwargs)
    except UserError as error:
        problem = error
    raise_on_any(str(problem) if problem else None, type(problem) if problem else UserError, group=dist.group.WORLD)
    return result  # type: ignore[return-value]


def _load_plugins(recipe: Recipe) -> list[Hook]:
    for module in recipe.run.plugins:
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except Exception as error:  # a module of the user's may raise anything
            raise RecipeError(
                f"run.plugins: cannot import {module!r} ({type(error).__name__}: {error}); correct the name, or put "
                "its folder on PYTHONPATH"
            ) from error
    hooks, tokens = build_hooks(recipe.loss.hooks), recipe.optimizer.micro_batch_tokens
    for i, hook in enumerate(hooks if tokens else ()):
        if getattr(hook, "scope", "global") == "microbatch":
            raise RecipeError(
                f"loss.hooks.{i} ({recipe.loss.hooks[i].name}): its scope is 'microbatch', micro-batches of "
                f"optimizer.micro_batch_size answers, and optimizer.micro_batch_tokens is {tokens}; set "
                "micro_batch_size instead"
            )
    return hooks


def _stop_ids(tokenizer: Tokenizer, recipe: Recipe) -> tuple[int, ...]:
    ids = list(tokenizer.eos_ids)
    for text in recipe.rollout.stop_tokens:
        pieces = tokenizer.encode_piece(text)
        if len(pieces) != 1:
            raise RecipeError(
                f"rollout.stop_tokens: {text!r} is {len(pieces)} tokens for the student's tokenizer; "
                "a stop token must be one"
            )
        ids.append(pieces[0])
    return tuple(dict.fromkeys(ids))


def read_inputs(recipe: Recipe) -> Inputs:
    """Read tokenizer and prompts and check them against the teachers.

    Raises:
        UserError: anything in them that the recipe cannot train on.
    """
    tokenizer = load_tokenizer(recipe.student.checkpoint)
    route = routes(recipe)
    for name, teacher in recipe.teachers.items():
        theirs = load_tokenizer(teacher.checkpoint)
        if theirs.fingerprint() != tokenizer.fingerprint():
            raise RecipeError(
                f"teachers.{name}.checkpoint: its tokenizer differs from the student's ({teacher.checkpoint} against "
                f"{recipe.student.checkpoint}); log-probabilities can only be compared token by token when both "
                "use one vocabulary"
            )
    prompts, report = read_prompts(recipe.data, recipe.data.train, tokenizer, set(route))
    notes = [f"data.train: {report}"]
    if recipe.loss.estimator == "topk":
        _refuse_mixtures(prompts, route)
    held_out: list[Prompt] = []
    if recipe.evaluation.prompts:
        held_out, report = read_prompts(recipe.data, recipe.evaluation.prompts, tokenizer, set(route))
        held_out = _limit_by_label(held_out, recipe.evaluation.num_prompts)
        notes.append(f"evaluation.prompts: {report}; {len(held_out)} used")
    return Inputs(tokenizer, prompts, held_out, _stop_ids(tokenizer, recipe), route, tuple(notes))


def _refuse_mixtures(prompts: Sequence[Prompt], route: Mapping[str, str]) -> None:
    mixed = [prompt for prompt in prompts if len({route[label] for label, _ in prompt.shares}) > 1]
    if mixed:
        raise RecipeError(
            f"loss.estimator: topk takes one teacher a row, but rows name several, whose top-k tokens are not the same "
            f"({len(mixed)} of {len(prompts)}, the first: {mixed[0].label}); use full, or give these rows one label"
        )


def _limit_by_label(prompts: list[Prompt], limit: int) -> list[Prompt]:
    seen: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        seen[prompt.label] = seen.get(prompt.label, 0) + 1
        if not limit or seen[prompt.label] <= limit:
            kept.append(prompt)
    return kept


def _check_roles(recipe: Recipe, device: Device, num_ranks: int) -> dict[str, ModelShape]:
    """Read every role's architecture, try its configuration and look at its files; no weights are read."""
    shapes = {}
    for path, role in roles(recipe).items():
        shape = read_hf_config(role.checkpoint)
        check_megatron_overrides(path, role.megatron)
        resolve_layer_spec(role.layer_spec, device, role=path)
        try:
            transformer_config(shape, role, role_layout(role, num_ranks), device=device)
            open_whole(role.checkpoint, shape)
        except UserError as error:
            raise type(error)(f"{path}: {error}") from error
        shapes[path] = shape
    longest = recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens
    for path, shape in shapes.items():
        if longest > shape.max_positions:
            raise RecipeError(
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds the {shape.max_positions} "
                f"positions of {path} ({recipe_checkpoint(recipe, path)}); lower one of them"
            )
    return shapes


def used_vocabulary(shapes: Mapping[str, ModelShape]) -> int:
    """Entries that the softmax of every role runs over: models of one family pad their vocabularies differently."""
    return min(shape.vocab_size for shape in shapes.values())


def _check_vocabularies(recipe: Recipe, shapes: Mapping[str, ModelShape], tokenizer: Tokenizer) -> list[str]:
    """Returns notes. Raises RecipeError when a model lacks entries of the tokenizer, which all roles share."""
    sizes = {path: shape.vocab_size for path, shape in shapes.items()}
    used = used_vocabulary(shapes)
    if tokenizer.vocab_size > used:
        path = min(sizes, key=sizes.__getitem__)
        raise RecipeError(
            f"{path}.checkpoint: its vocabulary of {used} does not hold the tokenizer's {tokenizer.vocab_size} tokens; "
            f"student and teachers must share one, so give a checkpoint of the same family as the others"
        )
    if recipe.loss.estimator == "topk" and recipe.loss.top_k > used:
        raise RecipeError(f"loss.top_k: {recipe.loss.top_k} exceeds the vocabulary of {used}; lower it")
    if len(set(sizes.values())) == 1:
        return []
    listed = ", ".join(f"{path} {size}" for path, size in sizes.items())
    return [f"vocabularies differ in unused entries at the end ({listed}): the first {used} are used"]


def recipe_checkpoint(recipe: Recipe, path: str) -> str:
    """Checkpoint folder of the role at a recipe path."""
    return roles(recipe)[path].checkpoint


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


def check(recipe: Recipe, *, device: Device, num_ranks: int) -> tuple[list[Hook], dict[str, ModelShape], Inputs]:
    """Everything that can be checked before a model is built, on this process alone.

    Args:
        recipe: as loaded and checked by config/.
        device: where the run computes.
        num_ranks: ranks of the run.

    Returns:
        The hooks, the architecture of each role by recipe path, and what the run reads besides weights.

    Raises:
        UserError: recipe, data, layout or checkpoint are not usable.
    """
    hooks = _load_plugins(recipe)
    shapes, inputs = _check_roles(recipe, device, num_ranks), read_inputs(recipe)
    notes = _check_vocabularies(recipe, shapes, inputs.tokenizer)
    return hooks, shapes, replace(inputs, notes=(*notes, *inputs.notes))


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
