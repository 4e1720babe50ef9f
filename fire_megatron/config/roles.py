"""The roles of a recipe and which teacher takes which label."""

from __future__ import annotations

from fire_megatron.config.schema import Recipe, RoleConfig


def roles(recipe: Recipe) -> dict[str, RoleConfig]:
    """Every role by its key (``student``, ``teachers.math``): the student first, teachers by name."""
    return {"student": recipe.student} | {f"teachers.{name}": t for name, t in sorted(recipe.teachers.items())}


def routes(recipe: Recipe) -> dict[str, str]:
    """Label -> name of the teacher that takes it; a teacher without labels takes its own name."""
    return {label: name for name, teacher in recipe.teachers.items() for label in teacher.labels or (name,)}
