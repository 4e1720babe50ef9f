"""What a run reads besides weights, and all that can be wrong with it before a model is built."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fire_megatron.checkpoint.whole import open_whole
from fire_megatron.config.errors import DataError, RecipeError, UserError
from fire_megatron.config.evaluation import NAME
from fire_megatron.config.hf_config import ModelShape, read_hf_config
from fire_megatron.config.roles import roles, routes
from fire_megatron.config.schema import Recipe, RoleConfig
from fire_megatron.config.spans import parse_span
from fire_megatron.data.encoder import Encoder
from fire_megatron.data.prompts import read_prompts
from fire_megatron.data.records import Prompt
from fire_megatron.data.tokenizer import Tokenizer, load_tokenizer, stop_ids
from fire_megatron.evaluation.benchmarks import Benchmark, encode_problems, read_benchmarks
from fire_megatron.evaluation.judge import require_math_verify
from fire_megatron.fire.hooks import Hook, build_hooks
from fire_megatron.models.build import (
    check_megatron_overrides,
    resolve_layer_spec,
    transformer_config,
)
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
    benchmarks: tuple[tuple[Benchmark, list[Prompt]], ...] = ()
    """With their problems as prompts."""


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


def load_plugins(recipe: Recipe) -> list[Hook]:
    """Import the user's modules and build the hooks.

    Raises:
        RecipeError: a module that cannot be imported, or a hook that does not exist or fit.
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
    hooks, tokens = build_hooks(recipe.loss.hooks), recipe.optimizer.micro_batch_tokens
    for i, hook in enumerate(hooks if tokens else ()):
        if getattr(hook, "scope", "global") == "microbatch":
            raise RecipeError(
                f"loss.hooks.{i} ({recipe.loss.hooks[i].name}): its scope is 'microbatch', micro-batches of "
                f"optimizer.micro_batch_size answers, and optimizer.micro_batch_tokens is {tokens}; set "
                "micro_batch_size instead"
            )
    return hooks


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
    prompts, report = read_prompts(recipe.data, recipe.data.train, tokenizer, set(route), each_row=tick)
    notes = [f"data.train: {report}"]
    if recipe.loss.estimator == "topk":
        _refuse_mixtures(prompts, route)
    held_out: list[Prompt] = []
    if recipe.evaluation.prompts:
        held_out, report = read_prompts(recipe.data, recipe.evaluation.prompts, tokenizer, set(route), each_row=tick)
        held_out = _limit_by_label(held_out, recipe.evaluation.num_prompts)
        notes.append(f"evaluation.prompts: {report}; {len(held_out)} used")
    return Inputs(
        tokenizer,
        prompts,
        held_out,
        stop_ids(tokenizer, recipe.rollout.stop_tokens, "rollout.stop_tokens"),
        route,
        tuple(notes),
    )


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


def check_roles(
    recipe: Recipe, *, device: Device, num_ranks: int, elsewhere: Mapping[str, Path] | None = None
) -> dict[str, ModelShape]:
    """Read every role's architecture, try its configuration and look at its files; no weights are read.

    Args:
        recipe: as loaded and checked by config/.
        device: where the run computes.
        num_ranks: ranks of the run.
        elsewhere: by recipe path, a folder with the architecture of a checkpoint that is not on this machine.

    Raises:
        UserError: a model that cannot be built so, or is not whole.
    """
    elsewhere = elsewhere or {}
    shapes = {}
    for path, role in roles(recipe).items():
        shape = read_hf_config(elsewhere.get(path, role.checkpoint))
        check_megatron_overrides(path, role.megatron)
        resolve_layer_spec(role.layer_spec, device, role=path)
        try:
            transformer_config(shape, role, role_layout(role, num_ranks), device=device)
            if path not in elsewhere:
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


def _read_benchmarks(
    recipe: Recipe, shape: ModelShape, tokenizer: Tokenizer
) -> tuple[tuple[Benchmark, list[Prompt]], ...]:
    """Raises DataError: a benchmark that cannot be answered, or nothing to judge answers with."""
    configs = recipe.evaluation.benchmarks
    if not configs:
        return ()
    require_math_verify()
    benchmarks = read_benchmarks([(config.path, config.name, config.limit) for config in configs])
    encode = Encoder(replace(recipe.data, max_prompt_tokens=sys.maxsize, too_long="error"), tokenizer)
    read = []
    for i, (config, benchmark) in enumerate(zip(configs, benchmarks, strict=True)):
        key = f"evaluation.benchmarks.{i}"
        if not NAME.accepts(benchmark.name) or benchmark.name in recipe.teachers:
            why = "is a teacher's" if benchmark.name in recipe.teachers else f"is not of {NAME}"
            raise DataError(f"{key}.name: {benchmark.name!r} {why}; give another name")
        try:
            prompts = encode_problems(benchmark, encode, room=shape.max_positions - config.max_new_tokens)
        except DataError as error:
            raise DataError(f"{key}.max_new_tokens: {config.max_new_tokens}: {error}") from error
        read.append((benchmark, prompts))
    return tuple(read)


def _engine_notes(recipe: Recipe, device: Device) -> list[str]:
    """What Transformer Engine does to a format without being asked."""
    wide = [
        path
        for path, role in roles(recipe).items()
        if role.precision.dtype == "float32" and resolve_layer_spec(role.layer_spec, device, role=path) == "te"
    ]
    if not wide:
        return []
    return [
        f"{', '.join(wide)}: precision.dtype is float32, and Transformer Engine multiplies float32 as TF32 (10 bits "
        "after the point in place of 23); layer_spec=local multiplies in float32, bfloat16 is faster"
    ]


def recipe_checkpoint(recipe: Recipe, path: str) -> str:
    """Checkpoint folder of the role at a recipe path."""
    return roles(recipe)[path].checkpoint


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
    hooks = load_plugins(recipe)
    shapes, inputs = check_roles(recipe, device=device, num_ranks=num_ranks), read_inputs(recipe)
    notes = _engine_notes(recipe, device) + _check_vocabularies(recipe, shapes, inputs.tokenizer)
    benchmarks = _read_benchmarks(recipe, shapes["student"], inputs.tokenizer)
    notes += [f"benchmark {benchmark.name}: {len(problems)} problems" for benchmark, problems in benchmarks]
    return hooks, shapes, replace(inputs, notes=(*notes, *inputs.notes), benchmarks=benchmarks)
