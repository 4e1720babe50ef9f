"""Run by tests/distributed/test_plan.py: what the plan says of every rank of a recipe's run, as JSON. A plan has a
simulated world of its own, so a process with a real one cannot make it."""

import json
import sys

from fire_megatron.config.hf_config import read_hf_config
from fire_megatron.config.load import load_recipe
from fire_megatron.config.roles import roles
from fire_megatron.plan.rank import plan_rank
from fire_megatron.plan.trace import Trace
from fire_megatron.plan.workload import Workload


def plain(trace: Trace) -> dict:
    """As JSON has it."""
    moved = {f"{c.operation} {list(c.ranks)}": n for c, n in sorted(trace.bytes.items(), key=str) if n}
    return {"bytes": moved, "peak": trace.peak}


def main() -> None:
    """Arguments: world size, prompt tokens, response tokens, then recipes."""
    world_size, prompt, response, *paths = sys.argv[1:]
    found = []
    for path in paths:
        recipe = load_recipe(path)
        shapes = {key: read_hf_config(role.checkpoint) for key, role in roles(recipe).items()}
        load = Workload.of(recipe, prompt_tokens=int(prompt), response_tokens=int(response))
        plans = [
            plan_rank(recipe, shapes, load, rank=rank, world_size=int(world_size), kind="cpu")
            for rank in range(int(world_size))
        ]
        found.append(
            [
                {
                    "roles": {key: memory.__dict__ for key, memory in plan.roles.items()},
                    "phases": {name: plain(phase.trace) for name, phase in plan.phases.items()},
                    "kv_cache": plan.phases["sampling"].kv_cache,
                }
                for plan in plans
            ]
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
