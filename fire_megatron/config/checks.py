"""Checks that take several sections of a recipe, or the checkpoints' small JSON files. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import RecipeError
from fire_megatron.config.schema import Recipe, RoleConfig

MARKER = "fire_checkpoint.json"
"""File that tells a converted checkpoint from a Hugging Face folder."""


def roles(recipe: Recipe) -> dict[str, RoleConfig]:
    """Recipe path -> section of every role, the student first."""
    return {"student": recipe.student} | {f"teachers.{name}": t for name, t in sorted(recipe.teachers.items())}


def routes(recipe: Recipe) -> dict[str, str]:
    """Label -> name of the teacher that takes it. A teacher without labels takes its own name."""
    return {label: name for name, teacher in recipe.teachers.items() for label in teacher.labels or (name,)}


def _read_config(folder: Path) -> dict[str, Any] | None:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _heads(config: dict[str, Any]) -> tuple[Any, Any]:
    heads = config.get("num_attention_heads")
    return heads, config.get("num_key_value_heads") or heads


def _labels(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    owner: dict[str, str] = {}
    for name, teacher in recipe.teachers.items():
        for label in teacher.labels or (name,):
            if label in owner:
                yield (
                    f"teachers.{name}.labels: {label!r} is already taken by teachers.{owner[label]}; "
                    "a label belongs to one teacher"
                )
            owner.setdefault(label, name)
    for section, sources in (("data.train", recipe.data.train), ("evaluation.prompts", recipe.evaluation.prompts)):
        for index, source in enumerate(sources):
            if source.label is not None and source.label not in owner:
                yield (
                    f"{section}.{index}.label: {source.label!r} has no teacher; add it to a teacher's labels, "
                    f"or use one of: {', '.join(sorted(owner))}"
                )


def _files(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    for section, sources in (("data.train", recipe.data.train), ("evaluation.prompts", recipe.evaluation.prompts)):
        for index, source in enumerate(sources):
            if not Path(source.path).is_file():
                yield f"{section}.{index}.path: no file {source.path!r} (looked in {os.getcwd()})"


def _layouts(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    for path, role in roles(recipe).items():
        layout = role.parallel
        ranks = layout.tensor * layout.pipeline * layout.context
        if world_size is not None and world_size % ranks:
            yield (
                f"{path}.parallel: tensor={layout.tensor} x pipeline={layout.pipeline} x context={layout.context} "
                f"needs a multiple of {ranks} ranks and the run has {world_size}; change the layout or start "
                f"{-(-world_size // ranks) * ranks} processes"
            )


def _checkpoints(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    for path, role in roles(recipe).items():
        folder = Path(role.checkpoint)
        if not folder.is_dir():
            yield f"{path}.checkpoint: no folder {role.checkpoint!r} (looked in {os.getcwd()})"
        elif not (folder / MARKER).is_file():
            if any(folder.glob("*.safetensors")):
                yield (
                    f"{path}.checkpoint: {role.checkpoint} is a Hugging Face folder; convert it with "
                    f"`python tools/convert.py hf-to-megatron --hf {role.checkpoint} --out {role.checkpoint}-megatron` "
                    "and name the result"
                )
            else:
                yield (
                    f"{path}.checkpoint: {role.checkpoint} is no converted checkpoint ({MARKER} is missing); "
                    "make one with tools/convert.py hf-to-megatron"
                )
        elif _read_config(folder) is None:
            yield f"{path}.checkpoint: {folder / 'config.json'} is missing or not JSON; convert the model again"


def _shapes(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    configs = {path: _read_config(Path(role.checkpoint)) for path, role in roles(recipe).items()}
    vocabulary = (configs["student"] or {}).get("vocab_size")
    for path, role in roles(recipe).items():
        config = configs[path]
        if config is None:
            continue
        layout, (heads, kv_heads) = role.parallel, _heads(config)
        for name, count in (("attention heads", heads), ("key/value heads", kv_heads)):
            if isinstance(count, int) and count % layout.tensor:
                fits = [n for n in range(1, kv_heads + 1) if not kv_heads % n and not heads % n]
                yield (
                    f"{path}.parallel.tensor: {layout.tensor} does not divide the {count} {name} of {role.checkpoint}; "
                    f"use one of {', '.join(map(str, fits))}"
                )
                break
        layers = config.get("num_hidden_layers")
        if isinstance(layers, int) and layout.pipeline > layers:
            yield f"{path}.parallel.pipeline: {layout.pipeline} stages for the {layers} layers of {role.checkpoint}; use fewer"
        theirs = config.get("vocab_size")
        if path != "student" and None not in (vocabulary, theirs) and theirs != vocabulary:
            yield (
                f"{path}.checkpoint: vocabulary of {theirs} ({role.checkpoint}) differs from the student's {vocabulary} "
                f"({recipe.student.checkpoint}); a teacher must share the student's vocabulary"
            )


def _folders(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    for key, name in (("run.dir", recipe.run.dir), ("checkpoint.dir", recipe.checkpoint.dir)):
        if name is None:
            continue
        folder = Path(name).absolute()
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if not existing.is_dir():
            yield f"{key}: {existing} is a file, not a folder; choose another"
        elif not os.access(existing, os.W_OK):
            yield f"{key}: {existing} cannot be written to; choose another folder or change its permissions"


def _hooks(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    from fire_megatron.config.schema import BUILT_IN_HOOKS

    for index, hook in enumerate(recipe.loss.hooks):
        if hook.name not in BUILT_IN_HOOKS and not recipe.run.plugins:
            yield (
                f"loss.hooks.{index}.name: no hook {hook.name!r}; built in are {', '.join(BUILT_IN_HOOKS)}, "
                "and one of your own needs its module in run.plugins"
            )


def _schedule(recipe: Recipe, world_size: int | None) -> Iterator[str]:
    if recipe.optimizer.warmup_steps > recipe.run.steps:
        yield (
            f"optimizer.warmup_steps: {recipe.optimizer.warmup_steps} is more than run.steps={recipe.run.steps}; "
            "the learning rate would never be reached"
        )
    rows = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
    if recipe.optimizer.mini_batches > rows:
        yield f"optimizer.mini_batches: {recipe.optimizer.mini_batches} is more than the {rows} rows of a step; use fewer"


_CHECKS: tuple[Callable[[Recipe, int | None], Iterator[str]], ...] = (
    _labels, _files, _layouts, _checkpoints, _shapes, _folders, _hooks, _schedule,
)  # fmt: skip


def check_recipe(recipe: Recipe, *, world_size: int | None) -> None:
    """Check everything that can be known without torch.

    Args:
        recipe: loaded recipe.
        world_size: ranks of the run; None leaves the checks that need it out.

    Raises:
        RecipeError: all problems found, a line each.
    """
    problems = [problem for check in _CHECKS for problem in check(recipe, world_size)]
    if problems:
        raise RecipeError("\n".join(problems))
