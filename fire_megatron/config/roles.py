"""The roles of a recipe and which teacher takes which label."""

from __future__ import annotations

from fire_megatron.config.schema import Recipe, RoleConfig


def roles(recipe: Recipe) -> dict[str, RoleConfig]:
    """Every role by its key (``student``, ``teachers.math``): the student first, teachers by name."""
    return {"student": recipe.student} | {f"teachers.{name}": t for name, t in sorted(recipe.teachers.items())}


def resolved(recipe: Recipe, kind: str) -> Recipe:
    """The recipe as it is on a device of kind ``cpu`` or ``cuda``: formats that it leaves open are named."""
    student = recipe.student.replace(precision=recipe.student.precision.on(kind))
    teachers = {name: t.replace(precision=t.precision.on(kind)) for name, t in recipe.teachers.items()}
    return recipe.replace(student=student, teachers=teachers)


def routes(recipe: Recipe) -> dict[str, str]:
    """Label -> name of the teacher that takes it; a teacher without labels takes its own name."""
    return {label: name for name, teacher in recipe.teachers.items() for label in teacher.labels or (name,)}


def longest_row(recipe: Recipe) -> int:
    """Tokens of the longest prompt and answer that may be sampled for training or for the held-out divergence."""
    evaluation = recipe.evaluation.max_new_tokens if recipe.evaluation.prompts else 0
    return recipe.data.max_prompt_tokens + max(recipe.rollout.max_new_tokens, evaluation)


def keeps_cache(recipe: Recipe, *, on_gpu: bool) -> bool:
    """Whether the sampling memory for keys and values stays from step to step (``rollout.keep_cache``): unless it says
    so itself, on a GPU where nobody has asked to make room for others."""
    asked = recipe.rollout.keep_cache
    return (on_gpu and not any(role.offload for role in roles(recipe).values())) if asked is None else asked
