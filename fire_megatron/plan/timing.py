"""An estimate of a step's seconds from what the ranks compute and send. Rough on purpose: every assumption is printed.

A phase takes the longest of its arithmetic, its memory traffic and its kernel launches, and then its communication,
which nothing hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fire_megatron.config.schema import Recipe, RoleConfig
from fire_megatron.plan.gpus import (
    BANDWIDTH,
    FRAGMENTATION,
    HOST_GB_S,
    LATENCY_S,
    LAUNCH_S,
    PRODUCTS,
    RESERVED_GIB,
    Gpu,
)
from fire_megatron.plan.records import Phase, RankPlan
from fire_megatron.plan.trace import Collective, Trace

_PASSES = {"all-reduce": 2.0}
"""How often a ring sends a message around, less one part of n: NCCL's bus bandwidth."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    sampling: float
    exposed: float
    """Scoring that sampling does not hide."""
    scoring: Mapping[str, float]
    """By teacher, whether hidden or not."""
    update: float
    exchange: float
    bubble: float
    """Part of the update's arithmetic that pipeline stages wait."""

    @property
    def total(self) -> float:
        """Of a step."""
        return self.sampling + self.exposed + self.exchange + self.update


def communication(trace: Trace, gpu: Gpu, gpus_per_node: int) -> float:
    """Seconds of all of its collectives."""
    return sum(seconds(c, trace.bytes[c], trace.calls[c], gpu, gpus_per_node) for c in trace.calls)


def seconds(collective: Collective, size: int, calls: int, gpu: Gpu, gpus_per_node: int) -> float:
    """Of so many bytes in so many calls."""
    ranks = collective.ranks
    if len(ranks) < 2:
        return 0.0
    within = ranks[0] // gpus_per_node == ranks[-1] // gpus_per_node
    link, place = (gpu.nvlink_gb_s, "node") if within else (gpu.network_gb_s, "network")
    point_to_point = collective.operation in ("send", "receive", "broadcast")
    passes = 1.0 if point_to_point else _PASSES.get(collective.operation, 1.0) * (1 - 1 / len(ranks))
    if collective.operation == "receive":
        return 0.0  # the other end of a send
    return size * passes / (link * 1e9 * BANDWIDTH) + calls * LATENCY_S[place]


def _work(trace: Trace, role: RoleConfig, gpu: Gpu) -> float:
    """Seconds of arithmetic and launches."""
    peak = gpu.bf16_tflops
    if role.precision.dtype == "float32":
        peak /= 8  # float32 on the matrix units goes by way of TF32 only where torch is told to
    elif role.precision.fp8 is not None and gpu.fp8_tflops:
        peak = gpu.fp8_tflops * 0.8  # attention and the output layer stay in bfloat16
    return max(trace.flops / (peak * 1e12 * PRODUCTS), trace.operators * LAUNCH_S)


def _decode_traffic(plan: RankPlan, phase: Phase, recipe: Recipe, gpu: Gpu) -> float:
    """Seconds to read the weights and, on average, half of the key/value cache in every decode step."""
    return phase.pieces * (plan.roles["student"].weights + phase.kv_cache / 2) / (gpu.memory_gb_s * 1e9 * BANDWIDTH)


def step_time(recipe: Recipe, plans: Sequence[RankPlan], gpu: Gpu, gpus_per_node: int) -> StepTime:
    """Of the slowest ranks.

    Args:
        recipe: what the ranks were planned for.
        plans: one of each kind of rank.
        gpu: which GPU.
        gpus_per_node: ranks of a node.
    """
    stages = recipe.student.parallel.pipeline
    sampling = exchange = update = bubble = 0.0
    scoring: dict[str, float] = {}
    apart: dict[str, bool] = {}
    for plan in plans:
        for name, phase in plan.phases.items():
            spent = communication(phase.trace, gpu, gpus_per_node)
            if name == "sampling":
                # A token goes through all stages before the next one; a stage's time is this one's.
                work = max(_work(phase.trace, recipe.student, gpu), _decode_traffic(plan, phase, recipe, gpu))
                sampling = max(sampling, stages * work + spent)
            elif name == "exchange":
                exchange = max(exchange, spent)
            elif name == "update":
                waiting = (stages - 1) / (phase.pieces / recipe.optimizer.mini_batches + stages - 1)
                memory = plan.roles["student"]
                traffic = (2 * memory.optimizer + memory.gradients + memory.weights) / (
                    gpu.memory_gb_s * 1e9 * BANDWIDTH
                )
                work = _work(phase.trace, recipe.student, gpu) / (1 - waiting)
                update = max(update, work + spent + traffic * recipe.optimizer.mini_batches)
                bubble = max(bubble, waiting)
            else:
                teacher = name.partition(" ")[2]
                role = recipe.teachers[teacher]
                depth = role.parallel.pipeline
                work = _work(phase.trace, role, gpu) * (1 + (depth - 1) / max(phase.pieces, 1))
                moved = plan.roles[f"teachers.{teacher}"].weights / (HOST_GB_S * 1e9) if role.offload else 0.0
                scoring[teacher] = max(scoring.get(teacher, 0.0), work + spent + moved)
                apart[teacher] = apart.get(teacher, True) and "student" not in plan.roles
    return StepTime(sampling, _exposed(recipe, sampling, scoring, apart), scoring, update, exchange, bubble)


def _exposed(recipe: Recipe, sampling: float, scoring: Mapping[str, float], apart: Mapping[str, bool]) -> float:
    """Teachers on the student's ranks score one after the other when sampling is done, those on others while it runs,
    except for the last group of answers."""
    groups = 4  # router: a quarter of the answers at a time, unless rollout.group_size says otherwise
    if recipe.rollout.group_size:
        answers = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
        groups = max(1, answers // recipe.rollout.group_size)
    together = sum(time for name, time in scoring.items() if not apart[name])
    alone = [max(time / groups, time - sampling * (1 - 1 / groups)) for name, time in scoring.items() if apart[name]]
    return max([together, *alone])


def assumptions(gpu: Gpu, gpus_per_node: int) -> list[str]:
    """What the estimates rest on, for people."""
    return [
        f"{gpu.name}: {gpu.memory_gib:g} GiB at {gpu.memory_gb_s:g} GB/s, {gpu.bf16_tflops:g} TFLOP/s in bfloat16, "
        f"{gpu.nvlink_gb_s:g} GB/s NVLink, {gpu.network_gb_s:g} GB/s network a GPU, {gpus_per_node} GPUs a node",
        f"memory: {RESERVED_GIB:g} GiB for CUDA, NCCL and libraries, {FRAGMENTATION:.0%} of what comes and goes for "
        "fragmentation",
        f"time: products at {PRODUCTS:.0%} of the peak, memory and links at {BANDWIDTH:.0%}, {LAUNCH_S * 1e6:g} us a "
        "kernel launch, collectives hidden by nothing",
        "all rows are as long as said; experts get equal numbers of tokens; the filter drops its percentile",
        "activations are those of unfused layers with fused attention and norms; Transformer Engine's take less",
    ]
