"""Kept rows on their way to who trains on them: an even share for each replica, the same wherever rows come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from roles import layouts

from fire_megatron.data.packing import balance
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts, Target, TrainingRows
from fire_megatron.plan.trace import Tracing
from fire_megatron.platform.host import HostMemory
from fire_megatron.train.rebalance import TOKEN_BYTES, rebalance

ROWS = 21


def whole_batch():
    """All rows of a global batch and their prompts; some rows of one length, one of a single token."""
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(i, ("math", "code")[i % 2], (1,) * (2 + i % 5), str(i)) for i in range(ROWS)]
    sizes = [1 + (7 * i) % 11 for i in range(ROWS)]
    floats = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(4)]
    floats[0][3][0] = float("nan")  # whose bits are to arrive
    rollouts = Rollouts(
        row_ids=tuple(range(ROWS)),
        prompts=tuple(prompts),
        responses=tuple(torch.randint(0, 300_000, (n,), generator=generator) for n in sizes),
        log_probs=tuple(floats[0]),
        entropies=tuple(floats[1]),
        truncated=tuple(i % 3 == 0 for i in range(ROWS)),
        weight_version=7,
    )
    return prompts, TrainingRows(rollouts, tuple(map(target, prompts)), tuple(floats[2]), tuple(floats[3]))


def target(prompt):
    return Target((prompt.label,))


def values(rows):
    """Everything in rows, floats as their bits."""
    rollouts = rows.rollouts
    floats = zip(rollouts.log_probs, rollouts.entropies, rows.teacher_log_probs, rows.weights, strict=True)
    return {
        "ids": (rollouts.row_ids, rollouts.prompts, rollouts.truncated, rollouts.weight_version, rows.targets),
        "responses": [response.tolist() for response in rollouts.responses],
        "floats": [[column.view(torch.int32).tolist() for column in columns] for columns in floats],
    }


HELD = {
    "in turn": lambda row, replicas: row % replicas,
    "all by the last": lambda row, replicas: replicas - 1,
    "by nobody": lambda row, replicas: replicas,
}


@pytest.mark.parametrize("held", HELD)
def test_every_replica_gets_its_share_wherever_rows_come_from(world, factory, held):
    prompts, whole = whole_batch()
    kept = [row for row in range(ROWS) if row % 4 != 1]  # what a filter leaves
    for layout in layouts(world.size, pipelines=(1, 2), contexts=(1, 2)):
        grid = factory.grid(layout)
        holder = {row: HELD[held](row, grid.row_replicas) for row in kept}
        mine = [row for row in kept if holder[row] == grid.row_replica]
        there = [row for row in kept if holder[row] < grid.row_replicas]
        share = [there[i] for i in balance([whole.rollouts.lengths[i] for i in there], layout.data)[grid.dp_rank]]
        with Tracing() as tracing:
            got = rebalance(whole.take(mine), prompts, target, grid=grid, memory=HostMemory())
        expected = mine if grid.row_replicas == 1 else share
        assert values(got) == values(whole.take(expected)), layout
        came = sum(len(whole.rollouts.responses[row]) for row in share if row not in mine)
        sizes = {c.operation: n for c, n in tracing.trace.bytes.items()}
        if grid.row_replicas == 1:
            assert not sizes
            continue
        assert sizes.get("receive", 0) == TOKEN_BYTES * came, "what stays does not travel"
        # Three numbers a row, padded to the rank with most rows, and how many there are.
        most = max(sum(holder[row] == rank for row in there) for rank in range(grid.row_replicas))
        assert sizes.get("all-gather", 0) == grid.row_replicas * 8 * (3 * most + 1)


def test_states_are_not_brought_along(world, factory):
    prompts, whole = whole_batch()
    grid = factory.grid(layouts(world.size)[0])
    rows = replace(whole.take([grid.row_replica]), states=({},))
    with pytest.raises(AssertionError, match="states are brought"):
        rebalance(rows, prompts, target, grid=grid, memory=HostMemory())
    dist.barrier()
