"""An estimate of a step's seconds from what the ranks compute and send. Rough on purpose: every assumption is printed.

A phase takes the longest of its arithmetic, its memory traffic and its kernel launches, and then its communication,
which nothing hides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fire_megatron.config.schema import Recipe, RoleConfig
from fire_megatron.plan.hardware import (
    BANDWIDTH,
    COMMUNICATOR_GIB,
    CONTEXT_GIB,
    FRAGMENTATION,
    GRAPH_LAUNCH_S,
    HOST_GB_S,
    HOST_NODE_GB_S,
    LATENCY_S,
    LAUNCH_S,
    LOOK_S,
    PRODUCTS,
    Gpu,
    host_gb_s,
)
from fire_megatron.plan.rank_plan import Phase, RankPlan
from fire_megatron.plan.trace import Collective, Trace
from fire_megatron.plan.workload import Workload
from fire_megatron.rollout.engine import SYNC_EVERY

_RINGS = ("all-reduce", "all-gather", "reduce-scatter")
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
    a_node = Counter(rank // gpus_per_node for rank in ranks)
    place = "node" if len(a_node) == 1 else "network"
    # A ring leaves a node by as many adapters as it has ranks there.
    adapters = min(a_node.values()) if collective.operation in _RINGS else 1
    link = gpu.nvlink_gb_s if place == "node" else min(gpu.nvlink_gb_s, adapters * gpu.network_gb_s)
    point_to_point = collective.operation in ("send", "receive", "broadcast")
    passes = 1.0 if point_to_point else _PASSES.get(collective.operation, 1.0) * (1 - 1 / len(ranks))
    if collective.operation == "receive":
        return 0.0  # the other end of a send
    return size * passes / (link * 1e9 * BANDWIDTH) + calls * LATENCY_S[place]


def _work(trace: Trace, role: RoleConfig, gpu: Gpu, *, fp8: bool = True) -> float:
    """Seconds of arithmetic and launches."""
    peak = gpu.fp32_tflops if role.precision.dtype == "float32" else gpu.bf16_tflops
    if fp8 and role.precision.fp8 is not None and gpu.fp8_tflops:
        peak = gpu.fp8_tflops * 0.8  # attention and the output layer stay in bfloat16
    return max(trace.flops / (peak * 1e12 * PRODUCTS), trace.operators * LAUNCH_S)


def _decoding(plan: RankPlan, phase: Phase, recipe: Recipe, load: Workload, gpu: Gpu) -> float:
    """Seconds of all decode steps, without collectives: each takes the longer of its arithmetic and of reading the
    weights and the keys and values that are there on average. The host's launches hide that or are hidden by it; in a
    CUDA graph each operator adds to it. Then there are the host's looks."""
    assert phase.decode is not None
    filled = (load.prompt_tokens + load.response_tokens / 2) / (load.prompt_tokens + recipe.rollout.max_new_tokens)
    read = (plan.roles["student"].weights + phase.kv_cache * filled) / (gpu.memory_gb_s * 1e9 * BANDWIDTH)
    looks = phase.pieces / (recipe.rollout.sync_every or SYNC_EVERY["cuda"])
    peak = gpu.fp32_tflops if recipe.student.precision.dtype == "float32" else gpu.bf16_tflops
    arithmetic = phase.decode.flops / (peak * 1e12 * PRODUCTS)
    work, operators = max(arithmetic, read), phase.decode.operators
    step = work + operators * GRAPH_LAUNCH_S if phase.decode.graphs else max(work, operators * LAUNCH_S)
    return phase.pieces * step + looks * LOOK_S


def step_time(
    recipe: Recipe, load: Workload, plans: Sequence[RankPlan], gpu: Gpu, gpus_per_node: int, *, row_replicas: int
) -> StepTime:
    """Of the slowest ranks.

    Args:
        recipe: what the ranks were planned for.
        load: a step.
        plans: one of each kind of rank.
        gpu: which GPU.
        gpus_per_node: ranks of a node.
        row_replicas: replicas of the student that sample rows of their own.
    """
    sampling = exchange = update = bubble = 0.0
    scoring: dict[str, float] = {}
    host = host_gb_s(gpus_per_node) * 1e9
    for plan in plans:
        for name, phase in plan.phases.items():
            spent = communication(phase.trace, gpu, gpus_per_node)
            if name == "sampling":
                sampling = max(sampling, _sampling(recipe, load, plan, phase, gpu, gpus_per_node))
            elif name == "exchange":
                exchange = max(exchange, spent)
            elif name == "update":
                seconds_here, waiting = _update(recipe, plan, phase, gpu, host)
                update, bubble = max(update, seconds_here + spent), max(bubble, waiting)
            else:
                teacher = name.partition(" ")[2]
                role = recipe.teachers[teacher]
                work = _work(phase.trace, role, gpu) * (1 + (role.parallel.pipeline - 1) / max(phase.pieces, 1))
                moved = plan.roles[plan.worker(name)].weights / host if role.offload else 0.0
                scoring[teacher] = max(scoring.get(teacher, 0.0), work + spent + moved)
    exposed = max([0.0, *(_exposed(recipe, load, plan, sampling, scoring, row_replicas) for plan in plans)])
    return StepTime(sampling, exposed, scoring, update, exchange, bubble)


def _sampling(recipe: Recipe, load: Workload, plan: RankPlan, phase: Phase, gpu: Gpu, gpus_per_node: int) -> float:
    """A token goes through all stages before the next one; what one stage takes, all of them take."""
    stages = recipe.student.parallel.pipeline
    assert phase.decode is not None
    prompts = Trace(flops=phase.decode.prompt_flops, operators=phase.decode.prompt_operators)
    work = _work(prompts, recipe.student, gpu, fp8=False) + _decoding(plan, phase, recipe, load, gpu)
    return stages * (work + communication(phase.trace, gpu, gpus_per_node))


def _update(recipe: Recipe, plan: RankPlan, phase: Phase, gpu: Gpu, host: float) -> tuple[float, float]:
    """Seconds without collectives, and the part of its products that stages wait."""
    stages, updates, memory = recipe.student.parallel.pipeline, recipe.optimizer.mini_batches, plan.roles["student"]
    waiting = (stages - 1) / (phase.pieces / updates + stages - 1)
    traffic = updates * (2 * memory.optimizer + memory.gradients + memory.weights)
    work = _work(phase.trace, recipe.student, gpu) / (1 - waiting) + traffic / (gpu.memory_gb_s * 1e9 * BANDWIDTH)
    if recipe.student.offload:  # away while teachers score, and back
        work += 2 * (memory.weights + memory.optimizer) / host
    return work, waiting


def _exposed(
    recipe: Recipe,
    load: Workload,
    plan: RankPlan,
    sampling: float,
    scoring: Mapping[str, float],
    row_replicas: int,
) -> float:
    """Scoring by a rank's teachers that sampling does not hide. They take turns: on the student's ranks when sampling
    is done, elsewhere while it runs, except for the last group of answers (all of them, where weights come and go)."""
    here = [name.partition(" ")[2] for name in plan.phases if name.startswith("scoring")]
    time = sum(scoring[name] for name in here)
    if "student" in plan.roles or any(recipe.teachers[name].offload for name in here):
        return time
    groups = 4  # router: a quarter of a replica's answers at a time, unless rollout.group_size says otherwise
    if recipe.rollout.group_size:
        groups = max(1, -(-load.rows // row_replicas) // recipe.rollout.group_size)
    return max(time / groups, time - sampling * (1 - 1 / groups))


def assumptions(gpu: Gpu, gpus_per_node: int) -> list[str]:
    """What the estimates rest on, for people."""
    return [
        f"{gpu.name}: {gpu.memory_gib:g} GiB at {gpu.memory_gb_s:g} GB/s, {gpu.bf16_tflops:g} TFLOP/s in bfloat16, "
        f"{gpu.nvlink_gb_s:g} GB/s NVLink, {gpu.network_gb_s:g} GB/s network a GPU, {gpus_per_node} GPUs a node",
        f"memory: {CONTEXT_GIB:g} GiB for CUDA and libraries, {COMMUNICATOR_GIB:g} GiB for each group that a rank "
        f"communicates in, {FRAGMENTATION:.0%} of what comes and goes for fragmentation",
        f"time: products at {PRODUCTS:.0%} of the peak, memory and links at {BANDWIDTH:.0%}, {LAUNCH_S * 1e6:g} us a "
        f"kernel launch ({GRAPH_LAUNCH_S * 1e6:g} us in a CUDA graph), {LOOK_S * 1e3:g} ms each time that the host "
        "looks at what was sampled, collectives hidden by nothing",
        f"offload: {HOST_GB_S:g} GB/s between a GPU and the host, {HOST_NODE_GB_S:g} GB/s for all GPUs of a node",
        "all rows are as long as said; experts get equal numbers of tokens; the filter drops its percentile",
        "activations are those of unfused layers with fused attention and norms; Transformer Engine's take less",
    ]
