"""The rule book: all rules of ``config/rules/``, asked together with what is known.

Whoever asks gets every problem at once. A command asks before it imports torch, with what the recipe and the
checkpoints' JSON files tell; a run asks again on every rank when it knows the machine, the hooks, the tokenizers and
the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fire_megatron.config.checkpoints import read_marker
from fire_megatron.config.errors import CheckpointError, RecipeProblem, RecipeProblems
from fire_megatron.config.hf_config import ModelShape, read_hf_config
from fire_megatron.config.roles import roles
from fire_megatron.config.rules import data, layout, megatron, model, precision, recomputation, training
from fire_megatron.config.rules.facts import Facts, Role
from fire_megatron.config.schema import Recipe

ROLE_RULES: tuple[Callable[[Role], Iterator[RecipeProblem]], ...] = (
    layout.tensor,
    layout.pipeline,
    layout.context,
    layout.copies,
    layout.experts,
    model.layer_spec,
    model.vocabulary,
    precision.fp8,
    megatron.overrides,
    recomputation.recomputation,
)
"""On one model."""
RECIPE_RULES: tuple[Callable[[Facts], Iterator[RecipeProblem]], ...] = (
    data.labels,
    data.files,
    data.benchmarks,
    data.chat_template,
    data.mixtures,
    model.checkpoints,
    model.positions,
    model.tokenizers,
    model.top_k,
    layout.spans,
    layout.sharing,
    precision.fp8_optimizer,
    training.hook_names,
    training.trackers,
    training.micro_batches,
    training.counts,
    training.label_key,
    data.writable,
    data.home,
)
"""On several sections, or on what they name."""


def ask(facts: Facts) -> None:
    """Ask every rule.

    Raises:
        RecipeProblems: every problem found.
    """
    problems = [problem for rule in RECIPE_RULES for problem in rule(facts)]
    problems += [problem for role in facts.roles.values() for problem in role_problems(role)]
    if problems:
        raise RecipeProblems(problems)


def role_problems(role: Role) -> Iterator[RecipeProblem]:
    """What the rules on one model find."""
    for rule in ROLE_RULES:
        yield from rule(role)


def check_recipe(
    recipe: Recipe, *, world_size: int | None, elsewhere: Mapping[str, Path] | None = None, **known: Any
) -> Facts:
    """Read the JSON files of the recipe's checkpoints, no weights, and ask every rule.

    Args: as the fields of :class:`Facts`; with ``elsewhere``, files of this machine are not checked.

    Returns:
        What is known then.

    Raises:
        RecipeProblems: every problem found.
    """
    shapes: dict[str, ModelShape] = {}
    unreadable = {}
    for key, role in roles(recipe).items():
        try:
            shapes[key] = read_hf_config((elsewhere or {}).get(key, role.checkpoint))
        except CheckpointError as error:
            unreadable[key] = str(error)
    facts = Facts(recipe, world_size, shapes, unreadable, elsewhere or {}, **known)
    ask(facts)
    return facts


def found_elsewhere(recipe: Recipe, models: Path | None) -> dict[str, Path]:
    """Folders with the architectures of checkpoints that are not here, by recipe path."""
    found = {}
    for path, role in roles(recipe).items():
        folder = Path(role.checkpoint)
        if read_marker(folder) is not None:
            continue
        candidates = [folder, *([models / folder.name] if models is not None else [])]
        for candidate in candidates:
            if (candidate / "config.json").is_file():
                found[path] = candidate
                break
    return found
