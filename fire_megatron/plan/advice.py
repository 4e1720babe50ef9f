"""What would help where a run does not fit: settings are tried, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import UserError
from fire_megatron.config.load import recipe_from_dict, recipe_to_dict
from fire_megatron.config.overrides import apply_overrides
from fire_megatron.config.roles import roles
from fire_megatron.config.schema import Recipe
from fire_megatron.plan.plan import Job, Kind, Plan, like_ranks, plan_kind
from fire_megatron.plan.rank import planned_role
from fire_megatron.platform import Device
from fire_megatron.train.inputs import check_roles

_MOST = 8
"""Settings that are tried for a kind of rank."""


@dataclass(frozen=True)
class Advice:
    """A change to the recipe and what it does to the fullest rank."""

    ranks: str
    """Ranks that do not fit."""
    change: str
    """Overrides, as on the command line."""
    before: int
    """Peak bytes."""
    after: int
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def advise(plan: Plan, say: Callable[[str], None] = lambda text: None) -> list[Advice]:
    """Try settings on the fullest rank that does not fit; those that help, what fits first.

    Args:
        plan: as made.
        say: told of progress.
    """
    misfits = [kind for kind in plan.kinds if not kind.fits]
    if not misfits:
        return []
    worst = max(misfits, key=lambda kind: kind.peak)
    found = []
    for change in list(dict.fromkeys(_candidates(plan.job.recipe, worst)))[:_MOST]:
        say(f"trying {change}")
        tried = _tried(plan.job, worst, change)
        if tried is not None and tried.peak < worst.peak:
            found.append(Advice(str(worst.ranks[0]), change, worst.peak, tried.peak, tried.fits))
    return sorted(found, key=lambda advice: (not advice.fits, advice.after))


def _tried(job: Job, kind: Kind, change: str) -> Kind | None:
    """The same rank under a changed recipe; None where the change is not allowed or the rank holds nothing then."""
    values = recipe_to_dict(job.recipe)
    try:
        apply_overrides(values, change.split(" "), Recipe)
        recipe = recipe_from_dict(values)
        local = replace(
            recipe,
            student=planned_role(recipe.student),
            teachers={name: planned_role(teacher) for name, teacher in recipe.teachers.items()},
        )
        check_recipe(recipe, world_size=job.world_size, elsewhere=job.folders)  # the files have been checked
        check_roles(local, device=Device(job.kind), num_ranks=job.world_size, elsewhere=job.folders)
    except UserError:
        return None
    changed = replace(job, recipe=recipe)
    for ranks in like_ranks(changed):
        if kind.ranks[0] in ranks:
            return plan_kind(changed, (kind.ranks[0], *ranks))
    return None


def _candidates(recipe: Recipe, kind: Kind) -> Iterator[str]:
    """Changes that may help in the phase of the peak, the cheapest in speed first."""
    phase, held = kind.busiest, kind.plan.roles
    for path in held:
        at_work = phase == f"scoring {path.partition('.')[2]}" or (
            path == "student" and not phase.startswith("scoring")
        )
        if not at_work and not roles(recipe)[path].offload:
            yield f"{path}.offload=true"
    if phase == "sampling":
        rows = recipe.rollout.batch_size or kind.plan.phases[phase].rows
        for part in (2, 4, 8):
            if rows >= part:
                yield f"rollout.batch_size={rows // part}"
    if phase == "update":
        yield from _update_candidates(recipe)
    if phase.startswith("scoring"):
        name = phase.partition(" ")[2]
        yield f"teachers.{name}.micro_batch_tokens={max(1, recipe.teachers[name].micro_batch_tokens // 2)}"
        layout = recipe.teachers[name].parallel
        yield from (f"teachers.{name}.parallel.{key}={2 * getattr(layout, key)}" for key in ("tensor", "pipeline"))
        return
    layout = recipe.student.parallel
    yield f"student.parallel.tensor={2 * layout.tensor}"
    yield f"student.parallel.pipeline={2 * layout.pipeline}"
    if phase == "update":
        yield f"student.parallel.context={2 * layout.context}"


def _update_candidates(recipe: Recipe) -> Iterator[str]:
    optimizer, recompute = recipe.optimizer, recipe.student.megatron.get("recompute_granularity")
    if not optimizer.distributed:
        yield "optimizer.distributed=true"
    if optimizer.micro_batch_tokens:
        yield f"optimizer.micro_batch_tokens={max(1, optimizer.micro_batch_tokens // 2)}"
    elif optimizer.micro_batch_size > 1:
        yield f"optimizer.micro_batch_size={optimizer.micro_batch_size // 2}"
    if recompute is None:
        yield "student.megatron.recompute_granularity=selective"
    if recompute != "full":
        yield (
            "student.megatron.recompute_granularity=full student.megatron.recompute_method=uniform "
            "student.megatron.recompute_num_layers=1"
        )
