"""What would help where a run does not fit: settings are tried, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fire_megatron.config.checks import check_recipe
from fire_megatron.config.errors import UserError
from fire_megatron.config.load import recipe_from_dict, recipe_to_dict
from fire_megatron.config.overrides import apply_overrides
from fire_megatron.config.roles import roles
from fire_megatron.config.schema import Recipe
from fire_megatron.plan.plan import (
    Job,
    Plan,
    RankKind,
    like_ranks,
    local_recipe,
    plan_rank_kind,
)
from fire_megatron.platform.device import Device
from fire_megatron.train.inputs import check_models

_ROUNDS = 4
"""Changes made one after the other."""
_TRIES = 5
"""Changes that are tried for each of them."""


@dataclass(frozen=True)
class Advice:
    """A change to the recipe, made after the ones before it, and what it does to the fullest rank."""

    rank: int
    change: str
    """Overrides, as on the command line."""
    before: int
    """Peak bytes."""
    after: int
    fits: bool


def advise(plan: Plan, say: Callable[[str], None] = lambda text: None) -> list[Advice]:
    """Changes that help the fullest rank that does not fit, each tried on it. Of those that are tried in a round, the
    first is taken that brings the fullest phase into the memory, else the one that helps most.

    Args:
        plan: as made.
        say: told of progress.
    """
    misfits = [kind for kind in plan.kinds if not kind.fits]
    job, found = plan.job, []
    kind = max(misfits, key=lambda kind: kind.peak, default=None)
    while kind is not None and not kind.fits and len(found) < _ROUNDS:
        best: tuple[int, str, Job, RankKind] | None = None
        for change in list(_candidates(job.recipe, kind))[:_TRIES]:
            say(f"trying {change}")
            changed = _changed(job, change)
            tried = None if changed is None else _same_rank(changed, kind)
            if changed is None or tried is None:
                continue
            peak = tried.peaks.get(kind.busiest, 0)
            if peak < kind.peak and (best is None or peak < best[0]):
                best = peak, change, changed, tried
            if best is not None and best[0] <= (kind.capacity or 0):
                break
        if best is None:
            break
        _, change, job, tried = best
        found.append(Advice(kind.ranks[0], change, kind.peak, tried.peak, tried.fits))
        kind = tried
    return found


def _changed(job: Job, change: str) -> Job | None:
    """The job with a changed recipe; None where that is not allowed."""
    values = recipe_to_dict(job.recipe)
    try:
        apply_overrides(values, change.split(" "), Recipe)
        recipe = recipe_from_dict(values)
        facts = check_recipe(recipe, world_size=job.world_size, elsewhere=job.folders)  # the files have been checked
        check_models(local_recipe(recipe), facts, device=Device(job.kind))
    except UserError:
        return None
    return replace(job, recipe=recipe)


def _same_rank(job: Job, kind: RankKind) -> RankKind | None:
    """The kind of a kind's first rank in another job."""
    return next((plan_rank_kind(job, ranks) for ranks in like_ranks(job) if kind.ranks[0] in ranks), None)


def _candidates(recipe: Recipe, kind: RankKind) -> Iterator[str]:
    """Changes that may help in the phase of the peak, the cheapest in speed first."""
    phase, held = kind.busiest, kind.plan.roles
    working = kind.plan.roles[kind.plan.worker(phase)].key
    if phase != "sampling" and any(other.kept for other in kind.plan.phases.values()):
        yield "rollout.keep_cache=false"
    idle = [path for path, memory in held.items() if memory.key != working and not roles(recipe)[path].offload]
    if idle:
        yield " ".join(f"{path}.offload=true" for path in idle)
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
        yield from (
            f"teachers.{name}.parallel.{key}={2 * getattr(layout, key)}" for key in ("expert", "tensor", "pipeline")
        )
        return
    layout = recipe.student.parallel
    yield f"student.parallel.expert={2 * layout.expert}"
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
            + (" student.megatron.recompute_modules=null" if recipe.student.megatron.get("recompute_modules") else "")
        )
