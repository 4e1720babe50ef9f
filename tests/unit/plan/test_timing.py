"""Seconds from bytes and operations, worked out by hand."""

from __future__ import annotations

import pytest

from fire_megatron.config.schema import Recipe
from fire_megatron.config.section import build
from fire_megatron.plan.hardware import (
    BANDWIDTH,
    GPUS,
    GRAPH_LAUNCH_S,
    HOST_GB_S,
    HOST_NODE_GB_S,
    LATENCY_S,
    LAUNCH_S,
    LOOK_S,
    PRODUCTS,
)
from fire_megatron.plan.rank_plan import Decode, Phase, RankPlan, RoleMemory
from fire_megatron.plan.timing import seconds, step_time
from fire_megatron.plan.trace import Collective, Trace
from fire_megatron.plan.workload import Workload

H100 = GPUS["h100"]
GB = 10**9


@pytest.mark.parametrize(
    ("operation", "ranks", "expected"),
    [
        ("all-reduce", range(8), 2 * 7 / 8 / 450),
        ("all-gather", range(8), 7 / 8 / 450),
        ("all-reduce", range(16), 2 * 15 / 16 / 400),  # by the eight adapters of a node
        ("all-gather", range(0, 64, 8), 7 / 8 / 50),  # by one
        ("all-to-all", range(16), 15 / 16 / 50),
        ("send", (7, 8), 1 / 50),
        ("receive", (7, 8), 0.0),
        ("all-reduce", (3,), 0.0),
    ],
)
def test_collectives(operation, ranks, expected):
    ranks = tuple(ranks)
    latency = 0.0 if expected == 0 else LATENCY_S["node" if ranks[0] // 8 == ranks[-1] // 8 else "network"]
    got = seconds(Collective(operation, ranks), GB, 1, H100, 8)
    assert got == pytest.approx(expected / BANDWIDTH + latency)


def recipe(**teachers) -> Recipe:
    role = {"checkpoint": "x", "precision": {"dtype": "bf16"}}
    return build(
        Recipe,
        {
            "run": {"name": "n", "dir": "d", "steps": 1},
            "student": role,
            "teachers": {name: role | options for name, options in teachers.items()},
            "data": {"train": [{"path": "p"}]},
            "rollout": {"prompts_per_step": 8, "max_new_tokens": 8},
        },
    )


def phase(time: float, pieces: int = 8) -> Phase:
    """One whose products take so long."""
    return Phase(Trace(flops=int(time * H100.bf16_tflops * 1e12 * PRODUCTS)), pieces=pieces)


def prompts(time: float) -> Phase:
    """Sampling that is all prompts."""
    flops = int(time * H100.bf16_tflops * 1e12 * PRODUCTS)
    return Phase(Trace(flops=flops), pieces=0, decode=Decode(operators=0, flops=0, graphs=False, prompt_flops=flops))


def rank(number: int, **phases: Phase) -> RankPlan:
    named = {name.replace("_", " "): value for name, value in phases.items()}
    paths = {RankPlan.worker(name) for name in named}
    roles = {path: RoleMemory(1, 0, key=path) for path in paths}
    return RankPlan(number, roles, named, 0, {path: {} for path in paths})


def timed(config: Recipe, *plans: RankPlan, gpus_per_node: int = 8):
    return step_time(config, Workload.of(config), plans, H100, gpus_per_node, row_replicas=1)


def test_teachers_on_the_students_ranks_take_turns():
    together = rank(0, sampling=prompts(10), scoring_a=phase(3), scoring_b=phase(4), update=phase(5))
    time = timed(recipe(a={}, b={}), together)
    assert time.exposed == pytest.approx(7)
    assert time.total == pytest.approx(22)


def test_teachers_elsewhere_score_while_the_student_samples():
    student = rank(0, sampling=prompts(10), update=phase(5))
    apart = timed(recipe(a={}, b={}), student, rank(1, scoring_a=phase(8)), rank(2, scoring_b=phase(4)))
    assert apart.exposed == pytest.approx(2), "the last quarter of the slower"
    together = timed(recipe(a={}, b={}), student, rank(1, scoring_a=phase(50), scoring_b=phase(50)))
    assert together.exposed == pytest.approx(100 - 7.5)
    away = timed(recipe(a={"offload": True}, b={}), student, rank(1, scoring_a=phase(8), scoring_b=phase(4)))
    assert away.exposed == pytest.approx(12)


def test_a_pipeline_waits():
    config = recipe(a={})
    config = config.replace(student=config.student.replace(parallel=config.student.parallel.replace(pipeline=4)))
    time = timed(config, rank(0, sampling=prompts(1), scoring_a=phase(0), update=phase(8, pieces=8)))
    assert time.bubble == pytest.approx(3 / 11)
    assert time.update == pytest.approx(11)
    assert time.sampling == pytest.approx(4), "a token passes all stages"


def test_weights_on_the_host_come_and_go():
    config = recipe(a={})
    config = config.replace(student=config.student.replace(offload=True))
    plan = rank(0, sampling=prompts(0), scoring_a=phase(0), update=phase(1))
    plan.roles["student"] = RoleMemory(1, weights=int(HOST_GB_S * GB), optimizer=0, key="student")
    extra = HOST_GB_S / H100.memory_gb_s / BANDWIDTH
    assert timed(config, plan, gpus_per_node=1).update == pytest.approx(1 + 2 + extra)
    shared = HOST_GB_S / (HOST_NODE_GB_S / 8)
    assert shared > 1 and timed(config, plan).update == pytest.approx(1 + 2 * shared + extra), "all GPUs of a node copy"


def test_a_decode_step():
    """100 of them: reading weights, arithmetic, launches, and the host's looks."""
    config = recipe(a={})

    def sampling(sync_every: int = 0, *, operators: int = 0, flops: int = 0, graphs: bool = False) -> float:
        decode = Decode(operators=operators, flops=flops, graphs=graphs)
        plan = rank(0, sampling=Phase(Trace(), pieces=100, decode=decode), update=phase(0))
        plan.roles["student"] = RoleMemory(1, weights=7 * GB, key="student")
        rollout = config.rollout.replace(sync_every=sync_every)
        return timed(config.replace(rollout=rollout), plan).sampling

    reading, looks = 100 * 7 / (H100.memory_gb_s * BANDWIDTH), 100 / 16 * LOOK_S
    assert sampling() == pytest.approx(reading + looks)
    assert sampling(sync_every=100) == pytest.approx(reading + LOOK_S)
    assert sampling(operators=2000) == pytest.approx(100 * 2000 * LAUNCH_S + looks)
    assert sampling(operators=2000, graphs=True) == pytest.approx(reading + 100 * 2000 * GRAPH_LAUNCH_S + looks)
    products = int(0.01 * H100.bf16_tflops * 1e12 * PRODUCTS)
    assert sampling(flops=products) == pytest.approx(100 * 0.01 + looks)


def test_groups_that_communicate_are_counted_once():
    def of(*groups: tuple[int, ...]) -> Phase:
        trace = Trace()
        for ranks in groups:
            for operation in ("all-reduce", "all-gather"):
                trace.calls[Collective(operation, ranks)] = trace.bytes[Collective(operation, ranks)] = 1
        return Phase(trace, pieces=1)

    plan = RankPlan(
        0, {}, {"sampling": of((0, 1), (0,)), "update": of((0, 1), (0, 2))}, 0, {"student": {(0, 1, 2, 3): ""}}
    )
    assert plan.communicators == 4, "two of the model, one of the role, one of the run"


def test_rows_of_several_teachers_count_for_each():
    shares = Workload.of(recipe(a={}, b={}), counts={"a": 1, "a+b": 3}).shares
    assert shares == {"a": 1.0, "b": 0.75}
