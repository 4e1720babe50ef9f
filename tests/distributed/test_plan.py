"""What a plan says, against what a real run of the same recipe allocates and sends, on every rank."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import replace

import plan_ranks
import pytest
import torch
import torch.distributed as dist
from processes import command, environment
from roles import share
from tiny_run import make_inputs, tiny_recipe, write_recipe

from fire_megatron.config.load import load_recipe
from fire_megatron.config.roles import resolved
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Target, TrainingRows
from fire_megatron.plan.trace import Trace, Tracing, storage_bytes
from fire_megatron.platform import launch
from fire_megatron.platform.host import HostMemory
from fire_megatron.teachers.messages import split_columns
from fire_megatron.train.rebalance import rebalance
from fire_megatron.train.setup import Setup

pytestmark = pytest.mark.world_size(4)

PROMPT, RESPONSE = 12, 5
CASES = {
    "tp2-pp2-bf16-topk": {
        "student__parallel": {"tensor": 2, "pipeline": 2},
        "student__precision": {"dtype": "bfloat16"},
        "loss__estimator": "topk",
        "loss__top_k": 8,
    },
    "tp2-dp2-moving": {"student__parallel": {"tensor": 2}, "optimizer__mini_batches": 2},
    "pp2-dp2-tokens": {"student__parallel": {"pipeline": 2}, "optimizer__micro_batch_tokens": 40},
    "cp2-dp2": {"student__parallel": {"context": 2}, "teachers__math__parallel": {"pipeline": 2}},
    "tp4-shared-key-heads": {"student__parallel": {"tensor": 4}},
    "pp4-full-recompute": {
        "student__parallel": {"pipeline": 4},
        "loss__estimator": "full",
        "student__megatron": {"recompute_granularity": "selective"},
    },
}


@pytest.fixture(scope="module")
def plans(world, folder):
    """Recipe and plan of each case: two ranks make half of them each in a process of its own, and all wait outside of
    collectives, since that may take longer than these may."""
    inputs = share(make_inputs(folder, num_hidden_layers=4, hidden_size=64) if world.is_main else None)
    for name, changes in CASES.items() if world.is_main else ():
        common = {"rollout__prompts_per_step": 16, "loss__hooks": [], "rollout__max_new_tokens": RESPONSE}
        if "optimizer__micro_batch_tokens" not in changes:
            common["optimizer__micro_batch_size"] = 2
        write_recipe(folder / f"{name}.yaml", tiny_recipe(inputs, folder / name, **common, **changes))
    dist.barrier()
    makers = [list(CASES)[maker::2] for maker in range(2)]
    mine = makers[world.rank] if world.rank < len(makers) else []
    words = command(plan_ranks.__file__, 4, PROMPT, RESPONSE, *(folder / f"{name}.yaml" for name in mine))
    if mine:
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
        part = folder / f"{world.rank}.part"
        part.write_text(done.stdout if done.returncode == 0 else json.dumps(done.stderr[-3000:]))
        part.rename(folder / f"{world.rank}.json")
    deadline, results = time.monotonic() + 320, [folder / f"{maker}.json" for maker in range(len(makers))]
    while not all(result.exists() for result in results) and time.monotonic() < deadline:
        time.sleep(0.1)
    plans = {}
    for names, result in zip(makers, results, strict=True):
        found = json.loads(result.read_text())
        assert isinstance(found, list), found
        plans |= dict(zip(names, found, strict=True))
    return {name: (load_recipe(folder / f"{name}.yaml"), plans[name]) for name in CASES}


def traced(action):
    """What an action did, and what it returned."""
    with Tracing() as tracing:
        result = action()
    return tracing.trace, result


def measured(recipe, world):
    """The real step of this rank, phase by phase, with rows of one length."""
    watch = launch.watch(world, roles="", timeout=60)
    run = Setup(resolved(recipe, world.device.kind), world, watch, lambda text: None).run
    student, grid, engine = run.student, run.grid, run.engine
    sampling = replace(run.sampling, stop_ids=frozenset())
    total = recipe.rollout.prompts_per_step
    mine = grid.own_rows(total)
    prompts = [Prompt(i, "math", tuple((i + j) % 50 + 3 for j in range(PROMPT)), "") for i in mine]
    phases: dict[str, Trace] = {}
    engine.keep_cache = True  # to be measured
    phases["sampling"], rollouts = traced(lambda: engine.generate(prompts, mine, sampling=sampling, step=0))
    kv_cache = engine._decoder.cache.nbytes
    engine._decoder = None
    for name, teacher in run.router.pool.teachers.items():
        rows = total // 2
        responses = [torch.arange(RESPONSE) + 3] * rows
        phases[f"scoring {name}"], _ = traced(
            lambda t=teacher, r=responses, n=rows: t.score([torch.arange(PROMPT) + 3] * n, r)
        )
    count = len(rollouts)
    target = Target(("math",))
    rows = TrainingRows(
        rollouts, (target,) * count, rollouts.log_probs, tuple(torch.ones(RESPONSE) for _ in range(count))
    )
    # Rows of one length would stay where they are, so each replica is given those that the one before is to train on.
    data, context = grid.layout.data, grid.layout.context
    holder = [context * ((row + 1) % data) + row // data % context for row in range(total)]
    ids = tuple(row for row in range(total) if holder[row] == grid.row_replica)
    rows = replace(rows, rollouts=replace(rows.rollouts, row_ids=ids))
    batch = [Prompt(i, "math", prompts[0].token_ids, "") for i in range(total)]
    phases["exchange"], shared = traced(
        lambda: rebalance(rows, batch, lambda prompt: target, grid=grid, memory=HostMemory())
    )
    shared = with_states(shared, run)
    count = recipe.optimizer.mini_batches
    parts = [shared.take(range(i, len(shared), count)) for i in range(count)]

    def gradients(part):
        old = student.log_probs(part) if count > 1 else None
        student.accumulate_gradients(part, tokens=100.0, old=old)

    # The first update makes what lasts, Adam's state, and megatron-core 0.19 asks the ranks something once.
    first = [traced(action)[0] for action in (lambda: gradients(parts[0]), student.update)]
    traces = [traced(action)[0] for part in parts for action in (lambda part=part: gradients(part), student.update)]
    phases["update"] = Trace.total(*((1, trace) for trace in traces))
    for trace in (*first, *phases.values()):
        assert all(len(collective.ranks) > 1 for collective in trace.calls), "a communicator for nobody else"
    weights = storage_bytes(student.weights())
    memory = {
        "weights": weights,
        "gradients": storage_bytes(student.gradients()),
        "optimizer": storage_bytes(student.memory()) - weights,
        "parameters": sum(p.numel() for p in student.model.parameters()),
    }
    return memory, kv_cache, phases


def with_states(rows, run):
    """Rows with what their teacher would have sent to this rank."""
    info = run.router.pool.infos["math"]
    if info.state_kind.name == "none":
        return rows
    whole = torch.zeros(RESPONSE, info.state_width, dtype=info.state_dtype)
    mine = split_columns(whole, run.grid.layout.tensor)[run.grid.tp_rank]
    return replace(rows, states=({"math": mine},) * len(rows))


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_does(plans, world, name):
    recipe, plan = plans[name]
    memory, kv_cache, phases = measured(recipe, world)
    mine = plan[world.rank]
    print("measured", {phase: plan_ranks.plain(trace) for phase, trace in phases.items()}, "planned", mine)
    assert {key: mine["roles"]["student"][key] for key in memory} == memory
    assert mine["kv_cache"] == kv_cache
    for phase, trace in phases.items():
        assert mine["phases"][phase]["bytes"] == plan_ranks.plain(trace)["bytes"], phase
    assert mine["phases"]["update"]["peak"] == pytest.approx(phases["update"].peak, rel=0.15)
