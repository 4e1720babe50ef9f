"""The plan of a run: every kind of rank, what it needs, whether that fits, and what a step takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fire_megatron.config.checks import found_elsewhere
from fire_megatron.config.errors import RecipeError
from fire_megatron.config.hf_config import ModelShape
from fire_megatron.config.roles import resolved, roles
from fire_megatron.config.rules.facts import Machine
from fire_megatron.config.schema import Recipe
from fire_megatron.parallel.grid import Layout
from fire_megatron.plan.hardware import COMMUNICATOR_GIB, CONTEXT_GIB, FRAGMENTATION, Gpu
from fire_megatron.plan.rank import plan_rank, planned_role
from fire_megatron.plan.rank_plan import RankPlan
from fire_megatron.plan.timing import StepTime, step_time
from fire_megatron.plan.workload import Workload
from fire_megatron.platform.device import Device
from fire_megatron.train.inputs import check_models, check_settings, read_inputs, role_layout

Say = Callable[[str], None]
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """A checked recipe and what it is planned for."""

    recipe: Recipe
    shapes: Mapping[str, ModelShape]
    folders: Mapping[str, Path]
    """Where each role's architecture was read, by recipe path."""
    workload: Workload
    world_size: int
    kind: str
    """``cuda`` or ``cpu``."""
    gpu: Gpu | None
    gpus_per_node: int
    notes: tuple[str, ...]
    """What was read, and what could not be checked on this machine."""

    @property
    def layouts(self) -> dict[str, Layout]:
        """Of each role, by recipe path."""
        return {path: role_layout(role, self.world_size) for path, role in roles(self.recipe).items()}


@dataclass(frozen=True)
class RankKind:
    """Ranks that are alike: the same stages of the same roles."""

    ranks: tuple[int, ...]
    plan: RankPlan
    """Of the first of them."""
    peaks: Mapping[str, int]
    """Most bytes in use in each phase."""
    capacity: int | None
    """Bytes that a GPU has for it; None where no GPU was named."""

    @property
    def peak(self) -> int:
        """Most bytes in use."""
        return max(self.peaks.values())

    @property
    def busiest(self) -> str:
        """The phase of the peak."""
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much."""
        return self.capacity is None or self.peak <= self.capacity


@dataclass(frozen=True)
class Plan:
    """Everything that was found."""

    job: Job
    kinds: tuple[RankKind, ...]
    time: StepTime | None
    """None where no GPU was named."""


def make_job(
    recipe: Recipe,
    *,
    world_size: int,
    gpu: Gpu | None = None,
    gpus_per_node: int = 8,
    models: Path | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
) -> Job:
    """Check a recipe as its run would.

    Args:
        recipe: as loaded.
        world_size: ranks of the run.
        gpu: which GPU; None plans without a limit and without times.
        gpus_per_node: ranks of a node.
        models: folder with ``NAME/config.json`` for checkpoints that are not on this machine.
        prompt_tokens: of every prompt; None takes the longest allowed.
        response_tokens: of every answer; None takes the longest allowed.

    Raises:
        UserError: what the run would end with.
    """
    elsewhere = found_elsewhere(recipe, models)
    kind = "cpu" if recipe.run.device == "cpu" and gpu is None else "cuda"
    machine = Machine(kind, None, lambda fp8: None if gpu is None else _no_fp8(gpu, fp8))
    _, facts = check_settings(recipe, machine=machine, num_ranks=world_size, elsewhere=elsewhere)
    limits = {"prompt": ("data.max_prompt_tokens", prompt_tokens, recipe.data.max_prompt_tokens)}
    limits["response"] = ("rollout.max_new_tokens", response_tokens, recipe.rollout.max_new_tokens)
    for name, (key, value, most) in limits.items():
        if value is not None and not 1 <= value <= most:
            raise RecipeError(f"--{name}-tokens: {value} is not from 1 to {most}, which is {key}; change one of them")
    recipe = resolved(recipe, kind)
    check_models(local_recipe(recipe), facts, device=Device(kind))
    counts: dict[str, int] | None = None
    if elsewhere:
        notes = [f"{path}.checkpoint: not on this machine; architecture of {at}" for path, at in elsewhere.items()]
        notes.append("not checked: weights, tokenizers, prompt files, whether run.dir can be written")
    else:
        inputs = read_inputs(facts)
        notes, counts = list(inputs.notes), {}
        for prompt in inputs.prompts:
            counts[prompt.label] = counts.get(prompt.label, 0) + 1
    load = Workload.of(recipe, prompt_tokens=prompt_tokens, response_tokens=response_tokens, counts=counts)
    folders = {path: elsewhere.get(path, Path(role.checkpoint)) for path, role in roles(recipe).items()}
    return Job(recipe, facts.shapes, folders, load, world_size, kind, gpu, gpus_per_node, tuple(notes))


def local_recipe(recipe: Recipe) -> Recipe:
    """The recipe with layers that any machine can build: of Transformer Engine's only the parameters matter here."""
    teachers = {name: planned_role(teacher) for name, teacher in recipe.teachers.items()}
    return recipe.replace(student=planned_role(recipe.student), teachers=teachers)


def _no_fp8(gpu: Gpu, recipe: str) -> str | None:
    """Why a GPU has no such FP8 recipe; None when it has."""
    if gpu.fp8_tflops is None:
        return f"{gpu.name} has no FP8"
    return f"mxfp8 needs Blackwell, and {gpu.name} is not" if recipe == "mxfp8" and not gpu.mxfp8 else None


def make_plan(job: Job, say: Say = lambda text: None) -> Plan:
    """Build and run every kind of rank.

    Args:
        job: from :func:`make_job`.
        say: told of progress.
    """
    kinds = []
    alike = like_ranks(job)
    for number, ranks in enumerate(alike, 1):
        say(f"rank {ranks[0]}, for {len(ranks)} alike ({number} of {len(alike)})")
        kinds.append(plan_rank_kind(job, ranks))
    time = None
    if job.gpu is not None:
        plans, replicas = [kind.plan for kind in kinds], job.layouts["student"].row_replicas
        time = step_time(job.recipe, job.workload, plans, job.gpu, job.gpus_per_node, row_replicas=replicas)
    return Plan(job, tuple(kinds), time)


def like_ranks(job: Job) -> list[tuple[int, ...]]:
    """All ranks, those together that hold the same stages of the same roles."""
    by_stage: dict[tuple, list[int]] = {}
    layouts = job.layouts
    for rank in range(job.world_size):
        key = tuple(
            (path, (rank - layout.first_rank) // (layout.num_ranks // layout.pipeline))
            for path, layout in layouts.items()
            if rank in layout.ranks
        )
        by_stage.setdefault(key, []).append(rank)
    return [tuple(ranks) for ranks in by_stage.values()]


def plan_rank_kind(job: Job, ranks: Sequence[int]) -> RankKind:
    """The first of some ranks that are alike, for all of them."""
    plan = plan_rank(job.recipe, job.shapes, job.workload, rank=ranks[0], world_size=job.world_size, kind=job.kind)
    peaks = {name: _peak(job.recipe, plan, name) for name in plan.phases}
    capacity = None
    if job.gpu is not None:
        capacity = int((job.gpu.memory_gib - CONTEXT_GIB - plan.communicators * COMMUNICATOR_GIB) * GIB)
    return RankKind(tuple(ranks), plan, peaks, capacity)


def resident(recipe: Recipe, plan: RankPlan, phase: str) -> dict[str, int]:
    """Bytes of each role that are on the device all through a phase; of roles that share a model, the first has it."""
    held: dict[str, int] = {}
    away = {memory.key for path, memory in plan.roles.items() if roles(recipe)[path].offload}
    working = {plan.roles[plan.worker(phase)].key}
    for path, memory in plan.roles.items():
        if memory.key not in away or memory.key in working:
            held[path] = memory.bytes
            working.discard(memory.key)
            away.add(memory.key)  # counted
        elif memory.heads:  # which do not wait on the host
            held[path] = memory.heads
    return held


def on_host(recipe: Recipe, plan: RankPlan) -> int:
    """Bytes of pinned host memory that this rank's roles wait in; a node has that of all of its GPUs."""
    waiting = {
        memory.key: memory.weights + memory.optimizer
        for path, memory in plan.roles.items()
        if roles(recipe)[path].offload
    }
    return sum(waiting.values())


def held(recipe: Recipe, plan: RankPlan, phase: str) -> int:
    """Bytes on the device all through a phase: roles, buffers, and keys and values that sampling leaves behind."""
    kept = sum(other.kept for name, other in plan.phases.items() if name != phase)
    return plan.scratch + kept + sum(resident(recipe, plan, phase).values())


def _peak(recipe: Recipe, plan: RankPlan, phase: str) -> int:
    moving = plan.phases[phase].trace.peak
    if phase != "sampling":  # which computes in precision.dtype
        moving += plan.roles[plan.worker(phase)].fp8_copies
    return held(recipe, plan, phase) + int(moving * (1 + FRAGMENTATION))


def span_text(ranks: Sequence[int]) -> str:
    """``0-7, 16-23``."""
    spans = [[rank for _, rank in span] for _, span in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def as_json(plan: Plan, advice: Sequence[Any]) -> str:
    """The plan for programs, and what :func:`fire_megatron.plan.advice.advise` made of it."""
    job = plan.job
    return json.dumps(
        {
            "name": job.recipe.run.name,
            "world_size": job.world_size,
            "gpu": None if job.gpu is None else asdict(job.gpu),
            "gpus_per_node": job.gpus_per_node,
            "workload": asdict(job.workload),
            "notes": list(job.notes),
            "fits": all(kind.fits for kind in plan.kinds),
            "roles": {
                path: {"ranks": span_text(layout.ranks), "data": layout.data, **asdict(layout)}
                for path, layout in job.layouts.items()
            },
            "kinds": [_kind_json(kind) | {"host_bytes": on_host(job.recipe, kind.plan)} for kind in plan.kinds],
            "seconds": None if plan.time is None else asdict(plan.time) | {"total": plan.time.total},
            "advice": list(map(asdict, advice)),
        },
        indent=1,
    )


def _kind_json(kind: RankKind) -> dict[str, Any]:
    phases = {}
    for name, phase in kind.plan.phases.items():
        trace = phase.trace
        phases[name] = {
            "peak_bytes": kind.peaks[name],
            "moving_bytes": trace.peak,
            "kv_cache_bytes": phase.kv_cache,
            "kept_bytes": phase.kept,
            "loss_bytes": phase.loss,
            "flops": trace.flops,
            "pieces": phase.pieces,
            "collectives": [
                {
                    "operation": c.operation,
                    "group": kind.plan.group(name, c),
                    "ranks": len(c.ranks),
                    "bytes": size,
                    "calls": calls,
                }
                for c, size, calls in trace.messages()
            ],
        }
    return {
        "ranks": span_text(kind.ranks),
        "count": len(kind.ranks),
        "fits": kind.fits,
        "peak_bytes": kind.peak,
        "scratch_bytes": kind.plan.scratch,
        "capacity_bytes": kind.capacity,
        "communicators": kind.plan.communicators,
        "roles": {path: asdict(memory) | {"bytes": memory.bytes} for path, memory in kind.plan.roles.items()},
        "phases": phases,
    }
