"""The kept rows of all replicas, shared out evenly for the update.

Of all rows every rank knows whose they are and how long. The rows themselves go from where they were sampled straight
to who trains on them, and only where that is another rank.

Shapes: R_i response tokens of row i.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from fire_megatron.data.packing import balance
from fire_megatron.data.records import Prompt
from fire_megatron.data.rollouts import Rollouts, Target, TrainingRows
from fire_megatron.parallel.collectives import all_gather_flat
from fire_megatron.parallel.exchange import exchange
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.host import HostMemory

TOKEN_BYTES = 20
"""That travel of a response token: its id, and the student's log-probability and entropy, the teacher's log-probability
and the weight, four bytes each."""


class Header(NamedTuple):
    """What all ranks know of a row."""

    row_id: int
    tokens: int
    """R."""
    truncated: int


def rebalance(
    rows: TrainingRows,
    prompts: Sequence[Prompt],
    target: Callable[[Prompt], Target],
    *,
    grid: ModelGrid,
    memory: HostMemory,
) -> TrainingRows:
    """Share the kept rows of all replicas evenly by tokens, so that dropped rows cost no replica anything.

    The share depends only on the set of kept rows, not on where they were sampled. The context-parallel ranks of a
    replica get the same rows, which they compute together. What the teachers keep of the rows is brought afterwards
    (:meth:`fire_megatron.teachers.router.TeacherRouter.attach`), straight to where it is needed. Collective over
    ``grid.row_group``: a ragged gather of three numbers a row, and messages from rank to rank.

    Args:
        rows: this rank's.
        prompts: of the whole global batch by row id, which every rank has.
        target: whom the answers to a prompt learn from.
        grid: the student's.
        memory: lends the memory for rows that come from elsewhere.

    Returns:
        This replica's share, by row id; there until the memory is taken back.
    """
    if grid.row_group.size() == 1:
        return rows
    return share_out(rows, all_headers(rows, grid=grid), prompts, target, grid=grid, memory=memory)


def all_headers(rows: TrainingRows, *, grid: ModelGrid) -> list[list[Header]]:
    """The headers of every rank's rows, in the order of ``grid.row_group``."""
    rollouts = rows.rollouts
    mine = [
        Header(row, len(response), truncated)
        for row, response, truncated in zip(rollouts.row_ids, rollouts.responses, rollouts.truncated, strict=True)
    ]
    table = torch.tensor(mine, dtype=torch.int64).flatten().to(compute_device())
    gathered = all_gather_flat(table, group=grid.row_group)
    parts = torch.cat(gathered).cpu().split([len(part) for part in gathered])
    return [[Header(*entry) for entry in part.view(-1, 3).tolist()] for part in parts]


def share_out(
    rows: TrainingRows,
    headers: Sequence[Sequence[Header]],
    prompts: Sequence[Prompt],
    target: Callable[[Prompt], Target],
    *,
    grid: ModelGrid,
    memory: HostMemory,
) -> TrainingRows:
    """What :func:`rebalance` does once all headers are known on all ranks."""
    assert rows.states is None, "states are brought to where rows are trained on"
    me, context = grid.row_replica, grid.layout.context
    source = {header.row_id: rank for rank, part in enumerate(headers) for header in part}
    known = sorted(itertools.chain(*headers))
    lengths = [len(prompts[header.row_id].token_ids) + header.tokens for header in known]
    shares = [[known[i] for i in share] for share in balance(lengths, grid.layout.data)]
    tables = _tables(rows)
    outgoing: dict[int, list[torch.Tensor]] = defaultdict(list)
    for rank in range(len(headers)):
        for header in shares[rank // context] if rank != me else ():
            if source[header.row_id] == me:
                outgoing[rank].append(tables[header.row_id])
    incoming: dict[int, list[Header]] = defaultdict(list)
    mine = shares[me // context]
    for header in mine:
        if source[header.row_id] != me:
            incoming[source[header.row_id]].append(header)
    received = exchange(
        outgoing,
        {rank: sum(_COLUMNS * header.tokens for header in part) for rank, part in incoming.items()},
        dtype=torch.int32,
        group=grid.row_group,
        memory=memory,
    )
    for rank, part in incoming.items():
        pieces = received[rank].split([_COLUMNS * header.tokens for header in part])
        tables |= {header.row_id: piece.view(_COLUMNS, -1) for header, piece in zip(part, pieces, strict=True)}
    return _training_rows(mine, tables, prompts, target, rows.rollouts.weight_version)


_COLUMNS = TOKEN_BYTES // 4


def _tables(rows: TrainingRows) -> dict[int, torch.Tensor]:
    """Row id -> [_COLUMNS, R] int32, floats as their bits."""
    floats = zip(rows.rollouts.log_probs, rows.rollouts.entropies, rows.teacher_log_probs, rows.weights, strict=True)
    return {
        row_id: torch.stack((response.int(), *(column.view(torch.int32) for column in columns)))
        for row_id, response, columns in zip(rows.rollouts.row_ids, rows.rollouts.responses, floats, strict=True)
    }


def _training_rows(
    headers: Sequence[Header],
    tables: Mapping[int, torch.Tensor],
    prompts: Sequence[Prompt],
    target: Callable[[Prompt], Target],
    weight_version: int,
) -> TrainingRows:
    mine = [prompts[header.row_id] for header in headers]
    responses = tuple(tables[header.row_id][0].long() for header in headers)
    columns = [[tables[header.row_id][i].view(torch.float32) for header in headers] for i in range(1, _COLUMNS)]
    log_probs, entropies, teacher_log_probs, weights = map(tuple, columns)
    rollouts = Rollouts(
        row_ids=tuple(header.row_id for header in headers),
        prompts=tuple(mine),
        responses=responses,
        log_probs=log_probs,
        entropies=entropies,
        truncated=tuple(bool(header.truncated) for header in headers),
        weight_version=weight_version,
    )
    return TrainingRows(rollouts, tuple(target(prompt) for prompt in mine), teacher_log_probs, weights)
