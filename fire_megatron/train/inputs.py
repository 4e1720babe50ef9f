"""What a run reads besides weights, and every check that can be made before a model is built."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from fire_megatron.checkpoint.whole import open_whole
from fire_megatron.config.checks import ask, check_recipe
from fire_megatron.config.errors import DataError, RecipeError, UserError
from fire_megatron.config.hf_config import ModelShape, used_vocabulary
from fire_megatron.config.kinds import MOST
from fire_megatron.config.roles import longest_row, roles, routes
from fire_megatron.config.rope import BY_LENGTH
from fire_megatron.config.rules.facts import Facts, Machine
from fire_megatron.config.rules.training import sampling_notes, without_effect
from fire_megatron.config.schema import Recipe, RoleConfig
from fire_megatron.config.spans import parse_span
from fire_megatron.data.chat_time import chat_time
from fire_megatron.data.encoder import Encoder
from fire_megatron.data.prompts import read_prompts
from fire_megatron.data.records import Prompt
from fire_megatron.data.tokenizer import Tokenizer, load_tokenizer, missing_stops, stop_ids
from fire_megatron.evaluation.benchmarks import BenchmarkTask, read_benchmark
from fire_megatron.evaluation.judge import require_math_verify
from fire_megatron.fire.hooks import Hook, build_hooks, registered_hooks
from fire_megatron.models.build import check_megatron_fields, resolve_layer_spec, this_machine, transformer_config
from fire_megatron.parallel.grid import Layout
from fire_megatron.platform.device import Device
from fire_megatron.platform.launch import World
from fire_megatron.platform.watch import tick


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
    benchmarks: tuple[BenchmarkTask, ...] = ()


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


def check_settings(
    recipe: Recipe, *, machine: Machine, num_ranks: int, elsewhere: Mapping[str, Path] | None = None
) -> tuple[list[Hook], Facts]:
    """Ask the rule book, and megatron-core for its part, once the user's modules are imported.

    Args:
        recipe: as loaded.
        machine: that the run computes on.
        num_ranks: ranks of the run.
        elsewhere: by recipe path, a folder with the architecture of a checkpoint that is not on this machine.

    Returns:
        The hooks, and all that is known so far, with the architecture of every role.

    Raises:
        RecipeError: a module that cannot be imported, or settings that cannot be.
    """
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
    known = {"machine": machine, "hooks": registered_hooks()}
    facts = check_recipe(recipe, world_size=num_ranks, elsewhere=elsewhere, **known)
    hooks = build_hooks(recipe.loss.hooks)
    facts = replace(facts, scopes=[getattr(hook, "scope", "global") for hook in hooks])
    ask(facts)
    for path, role in roles(recipe).items():
        check_megatron_fields(path, role.megatron)
    return hooks, facts


def read_inputs(facts: Facts, now: datetime | None = None) -> Inputs:
    """Read tokenizers, prompts and benchmarks.

    Args:
        facts: all rules have been asked.
        now: the time that chat templates are told; None is the present.

    Raises:
        UserError: anything in them that the recipe cannot train on.
    """
    with chat_time(now or datetime.now()):
        return _read_inputs(facts)


def _read_inputs(facts: Facts) -> Inputs:
    recipe, shapes = facts.recipe, facts.shapes
    tokenizer = load_tokenizer(recipe.student.checkpoint)
    teachers = {f"teachers.{name}": load_tokenizer(teacher.checkpoint) for name, teacher in recipe.teachers.items()}
    prints = {path: each.fingerprint() for path, each in (teachers | {"student": tokenizer}).items()}
    facts = replace(facts, tokenizer=tokenizer, fingerprints=prints)
    ask(facts)
    route = routes(recipe)
    views = {
        name: Encoder(recipe.data, tokenizer, options, key=f"teachers.{name}.chat_template_kwargs")
        for name, teacher in recipe.teachers.items()
        if (options := teacher.chat_template_kwargs) is not None
    }
    common = {"views": views, "each_row": tick}
    prompts, report = read_prompts(recipe.data, recipe.data.train, tokenizer, set(route), **common)
    mixed = [prompt.label for prompt in prompts if len({route[label] for label, _ in prompt.shares}) > 1]
    ask(replace(facts, mixed=mixed))
    notes = [
        *without_effect(facts),
        *_vocabulary_notes(shapes),
        *_rotary_notes(recipe, shapes),
        f"data.train: {report}",
    ]
    held_out: list[Prompt] = []
    if recipe.evaluation.prompts:
        common["options"] = recipe.evaluation.chat_template_kwargs
        held_out, report = read_prompts(recipe.data, recipe.evaluation.prompts, tokenizer, set(route), **common)
        held_out = _limit_by_label(held_out, recipe.evaluation.num_prompts)
        notes.append(f"evaluation.prompts: {report}; {len(held_out)} used")
    ends = stop_ids(tokenizer, recipe.rollout.stop_tokens, "rollout.stop_tokens")
    endings = {path: teacher.eos_ids for path, teacher in teachers.items()}
    if recipe.data.chat_template != "off":
        endings["the chat template"] = (tokenizer.turn_end(),)
    notes += filter(None, [missing_stops(tokenizer, ends, endings, "rollout.stop_tokens")])
    benchmarks = _read_benchmarks(recipe, shapes["student"], tokenizer, ends)
    notes += [f"benchmark {task.name}: {len(task.prompts)} problems" for task in benchmarks]
    return Inputs(tokenizer, prompts, held_out, ends, route, tuple(notes), benchmarks)


def _limit_by_label(prompts: list[Prompt], limit: int) -> list[Prompt]:
    seen: dict[str, int] = {}
    kept = []
    for prompt in prompts:
        seen[prompt.label] = seen.get(prompt.label, 0) + 1
        if not limit or seen[prompt.label] <= limit:
            kept.append(prompt)
    return kept


def check_models(recipe: Recipe, facts: Facts, *, device: Device) -> None:
    """Try every role's configuration, and look at the files of its weights; none is read.

    Args:
        recipe: that of the facts, or one whose models are the same and can be built here.
        facts: all rules have been asked.
        device: where the run computes.

    Raises:
        UserError: a model that cannot be built so, or is not whole.
    """
    assert facts.world_size is not None
    for path, role in roles(recipe).items():
        try:
            transformer_config(facts.shapes[path], role, role_layout(role, facts.world_size), device=device)
            if path not in facts.elsewhere:
                open_whole(role.checkpoint, facts.shapes[path])
        except UserError as error:
            raise type(error)(f"{path}: {error}") from error


def _vocabulary_notes(shapes: Mapping[str, ModelShape]) -> list[str]:
    sizes = {path: shape.vocab_size for path, shape in shapes.items()}
    if len(set(sizes.values())) == 1:
        return []
    listed = ", ".join(f"{path} {size}" for path, size in sizes.items())
    used = used_vocabulary(shapes)
    return [f"vocabularies differ in unused entries at the end ({listed}): the first {used} are used"]


def _rotary_notes(recipe: Recipe, shapes: Mapping[str, ModelShape]) -> list[str]:
    """Where angles depend on a row's length, and rows may be longer than before the scaling."""
    notes, longest = [], longest_row(recipe)
    for path, shape in shapes.items():
        scaling = shape.rope_scaling or {}
        if scaling.get("rope_type") in BY_LENGTH and longest > scaling["original_max_position_embeddings"]:
            notes.append(
                f"{path}: its {scaling['rope_type']} scaling has other rotary angles for rows of more than "
                f"{scaling['original_max_position_embeddings']:.0f} tokens, and this run's may have {longest}: all "
                f"rows have the angles of {longest} tokens, so that sampling and scoring agree"
            )
    return notes


def _read_benchmarks(
    recipe: Recipe, shape: ModelShape, tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> tuple[BenchmarkTask, ...]:
    """Raises DataError: a benchmark that cannot be answered, or nothing to judge answers with."""
    configs = recipe.evaluation.benchmarks
    if not configs:
        return ()
    require_math_verify()
    benchmarks = [read_benchmark(config) for config in configs]
    unlimited = recipe.data.replace(max_prompt_tokens=MOST, too_long="error")
    options = recipe.evaluation.chat_template_kwargs
    section = "data" if options is None else "evaluation"
    encode = Encoder(unlimited, tokenizer, options, key=f"{section}.chat_template_kwargs")
    common = {"positions": shape.max_positions, "seed": recipe.evaluation.seed, "stop_ids": stop_ids}
    read = []
    for i, (config, benchmark) in enumerate(zip(configs, benchmarks, strict=True)):
        try:
            read.append(BenchmarkTask.of(benchmark, config, encode, **common))
        except DataError as error:
            key = f"evaluation.benchmarks.{i}.max_new_tokens"
            raise DataError(f"{key}: {config.max_new_tokens}: {error}") from error
    return tuple(read)


def _engine_notes(recipe: Recipe, device: Device) -> list[str]:
    """What Transformer Engine does to a format without being asked."""
    wide = [
        path
        for path, role in roles(recipe).items()
        if role.precision.dtype == "float32" and resolve_layer_spec(role.layer_spec, device) == "te"
    ]
    if not wide:
        return []
    return [
        f"{', '.join(wide)}: precision.dtype is float32, and Transformer Engine multiplies float32 as TF32 (10 bits "
        "after the point in place of 23); layer_spec=local multiplies in float32, bfloat16 is faster"
    ]


def check(
    recipe: Recipe, *, device: Device, num_ranks: int, now: datetime | None = None
) -> tuple[list[Hook], dict[str, ModelShape], Inputs]:
    """Everything that can be checked before a model is built, on this process alone.

    Args:
        recipe: as loaded and checked by config/.
        device: where the run computes.
        num_ranks: ranks of the run.
        now: see :func:`read_inputs`.

    Returns:
        The hooks, the architecture of each role by recipe path, and what the run reads besides weights.

    Raises:
        UserError: recipe, data, layout or checkpoint are not usable.
    """
    hooks, facts = check_settings(recipe, machine=this_machine(device), num_ranks=num_ranks)
    check_models(recipe, facts, device=device)
    inputs = read_inputs(facts, now)
    notes = (*sampling_notes(recipe), *_engine_notes(recipe, device), *inputs.notes)
    return hooks, dict(facts.shapes), replace(inputs, notes=notes)
