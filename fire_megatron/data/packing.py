"""Rows into packs: balanced over replicas, cut into micro-batches, laid end to end without padding.

Shapes: T tokens of a pack, N response tokens of a pack, R response tokens of a row.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fire_megatron.parallel.collectives import all_gather_stacked
from fire_megatron.platform.host import upload


@dataclass(frozen=True)
class Pack:
    """One micro-batch: rows laid end to end, each attending only to itself and starting at position 0.

    Under context parallelism a pack is this rank's part: two chunks of every row (:func:`zigzag`). T and N count this
    rank's tokens then, and whatever says "whole" those of all context ranks together.
    """

    token_ids: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64, position within the row."""
    cu_seqlens: torch.Tensor
    """[rows + 1] int32 on CPU, boundaries of the whole rows; a last extra row holds padding tokens where there are
    any."""
    max_seqlen: int
    """Of the whole rows."""
    select: torch.Tensor
    """[N] int64, the positions whose next token is a response token, row by row."""
    targets: torch.Tensor
    """[N] int64, those response tokens."""
    rows: tuple[int, ...]
    """Indices of the rows in the batch that the pack was cut from."""
    response_lengths: tuple[int, ...]
    """R of each row, whole."""
    real_lengths: tuple[int, ...]
    """Tokens of each row, prompt and response, without padding."""
    context: ContextPart | None = None
    """Which part of the rows this is; None when it is all of them."""

    def __post_init__(self) -> None:
        ranks = self.context.ranks if self.context else 1
        assert self.token_ids.shape == self.position_ids.shape == (1, int(self.cu_seqlens[-1]) // ranks)
        assert self.select.shape == self.targets.shape == (sum(self.local_lengths),)
        assert len(self.rows) == len(self.response_lengths) == len(self.local_lengths)

    @property
    def local_lengths(self) -> tuple[int, ...]:
        """This rank's response tokens of each row; N is their sum."""
        return self.context.lengths if self.context else self.response_lengths

    @property
    def padding(self) -> torch.Tensor:
        """[1, T] bool, which tokens are padding, on the pack's device."""
        sizes = self.cu_seqlens.diff() // (self.context.ranks if self.context else 1)
        ends = torch.tensor([*self.real_lengths, 0])[: len(sizes)]  # the last extra row is padding from its start
        ends = torch.repeat_interleave(ends, sizes)
        return self.position_ids >= upload([ends], dtype=ends.dtype, device=self.position_ids.device)


@dataclass(frozen=True)
class ContextPart:
    """One context rank's part of the rows of a pack, and what puts the parts together again."""

    rank: int
    shares: tuple[torch.Tensor, ...]
    """By context rank, [N of the rank] int64 on CPU, ascending: where its response tokens stand among all of the
    pack's, laid end to end."""
    lengths: tuple[int, ...]
    """This rank's response tokens of each row."""
    order: torch.Tensor
    """[whole T] int64: for each token of the whole pack, its place in the context ranks' parts laid end to end."""

    @property
    def ranks(self) -> int:
        """Context-parallel ranks."""
        return len(self.shares)

    @property
    def places(self) -> torch.Tensor:
        """[N] this rank's share."""
        return self.shares[self.rank]


def zigzag(starts: Sequence[int], ranks: int, rank: int) -> torch.Tensor:
    """The tokens of a context rank: of every row's ``2 * ranks`` equal chunks the ones numbered ``rank`` and
    ``2 * ranks - 1 - rank``, so that under a causal mask all ranks have the same work. Transformer Engine's layout.

    Args:
        starts: [rows + 1] boundaries of the rows, whose lengths ``2 * ranks`` divides.

    Returns:
        [T / ranks] int64 indices into the whole pack, row by row.
    """
    parts = [torch.zeros(0, dtype=torch.int64)]
    for start, end in itertools.pairwise(starts):
        chunk = (end - start) // (2 * ranks)
        assert chunk * 2 * ranks == end - start, (start, end, ranks)
        parts += [torch.arange(chunk) + (start + i * chunk) for i in (rank, 2 * ranks - 1 - rank)]
    return torch.cat(parts)


def whole_tokens(values: torch.Tensor, pack: Pack, *, group: dist.ProcessGroup) -> torch.Tensor:
    """[N, ...] of this context rank's response tokens -> [whole N, ...] in the order of the pack's rows.

    One all-gather over the context-parallel ranks ``group``; with one rank the values as they are.
    """
    if pack.context is None:
        return values
    counts = [len(share) for share in pack.context.shares]
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    gathered = all_gather_stacked(padded, group=group)
    parts = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
    return parts[upload([torch.cat(pack.context.shares).argsort()], dtype=torch.int64, device=values.device)]


def balance(lengths: Sequence[int], bins: int, loads: list[int] | None = None) -> list[list[int]]:
    """Share rows over ``bins`` replicas so that token loads differ by at most the longest row.

    Args:
        lengths: tokens of each row.
        bins: number of replicas.
        loads: [bins] tokens that each replica has already; these rows' are added to it. Over several calls with the
            same list the loads differ by at most the longest row of all, since a row always goes where there is least.

    Returns:
        Row indices of each replica, ascending. Longest rows first, each to the least loaded replica (Graham's
        LPT rule), with ties broken by index so that every rank computes the same answer.
    """
    shares: list[list[int]] = [[] for _ in range(bins)]
    heap = [(load, replica) for replica, load in enumerate(loads or [0] * bins)]
    heapq.heapify(heap)
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, replica = heapq.heappop(heap)
        shares[replica].append(row)
        heapq.heappush(heap, (load + lengths[row], replica))
    for load, replica in heap if loads is not None else ():
        loads[replica] = load  # type: ignore[index]
    return [sorted(share) for share in shares]


def split_by_rows(rows: Sequence[int], rows_a_batch: int) -> list[list[int]]:
    """Cut rows, in order, into micro-batches of a fixed number of rows (the last may be smaller)."""
    return [list(rows[i : i + rows_a_batch]) for i in range(0, len(rows), rows_a_batch)]


def split_by_tokens(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows, in order, into micro-batches of at most ``budget`` tokens; a longer row goes alone."""
    batches: list[list[int]] = []
    load = budget
    for row in rows:
        if load + lengths[row] > budget:
            batches.append([])
            load = 0
        batches[-1].append(row)
        load += lengths[row]
    return batches


def fill_by_tokens(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put rows into micro-batches of at most ``budget`` tokens by best-fit decreasing, which needs few of them.
    A longer row goes alone.

    Args:
        rows: indices, in any order.
        lengths: tokens of every row.
        budget: tokens.

    Returns:
        Micro-batches in the order of their longest row, in each the longest row first; a function of the set of rows
        alone, so that every rank computes the same.
    """
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[row], 0))  # the tightest that holds it, the first of equals
        if place < len(room):
            left, batch = room.pop(place)
        else:
            left, batch = budget, len(batches)
            batches.append([])
        batches[batch].append(row)
        if left > lengths[row]:
            bisect.insort(room, (left - lengths[row], batch))
    return batches


def pack_rows(
    prompts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    rows: Sequence[int],
    *,
    multiple: int,
    device: torch.device,
    context: int = 1,
    context_rank: int = 0,
) -> Pack:
    """Lay rows end to end.

    Args:
        prompts: [P_i] int64 token ids of every row of the batch, P_i >= 1.
        responses: [R_i] int64 token ids of every row of the batch.
        rows: which of them to pack; may be empty (then the pack is padding only, so that a replica with nothing
            to do still takes part in its collectives).
        multiple: T is padded to a multiple of this (sequence parallelism splits T over the tensor ranks).
        device: where the pack goes.
        context: context-parallel ranks, which get two chunks of every row each; rows are padded at their ends for
            that, where no token that counts attends to them.
        context_rank: whose part to make.
    """
    tokens = [torch.cat((prompts[r], responses[r])) for r in rows]
    if context > 1:
        tokens = [torch.nn.functional.pad(t, (0, -len(t) % (2 * context))) for t in tokens]
        multiple = context * math.lcm(2, multiple)
    lengths = [len(t) for t in tokens]
    total = sum(lengths)
    padding = (-total) % multiple or (multiple if total == 0 else 0)
    if padding:
        tokens.append(torch.zeros(padding, dtype=torch.int64))
        lengths.append(padding)
    starts = [0, *itertools.accumulate(lengths)]
    sizes, part = [len(responses[r]) for r in rows], None
    # The token before a response token predicts it, also the last one of the prompt.
    firsts = [start + len(prompts[r]) - 1 for r, start in zip(rows, starts, strict=False)]
    empty = torch.zeros(0, dtype=torch.int64)
    columns = [
        torch.cat(tokens),
        torch.cat([torch.arange(n) for n in lengths]),
        torch.cat([empty, *(torch.arange(size) + first for size, first in zip(sizes, firsts, strict=True))]),
        torch.cat([empty, *(responses[r] for r in rows)]),
    ]
    if context > 1:
        columns, part = _take_context(columns, starts, sizes, context, context_rank, device)
    on_device = upload(columns, dtype=torch.int64, device=device)
    token_ids, position_ids, selected, targets = on_device.split([len(column) for column in columns])
    return Pack(
        token_ids=token_ids[None],
        position_ids=position_ids[None],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        select=selected,
        targets=targets,
        rows=tuple(rows),
        response_lengths=tuple(sizes),
        real_lengths=tuple(len(prompts[r]) + len(responses[r]) for r in rows),
        context=part,
    )


def _take_context(
    columns: Sequence[torch.Tensor],
    starts: Sequence[int],
    sizes: Sequence[int],
    ranks: int,
    rank: int,
    device: torch.device,
) -> tuple[list[torch.Tensor], ContextPart]:
    """A context rank's part of the whole pack's token ids, positions, selected positions and targets."""
    token_ids, position_ids, select, targets = columns
    # A position may be on another rank than its next token, so targets are told apart by position before the split.
    place_of = torch.full((len(token_ids),), -1)
    place_of[select] = torch.arange(len(select))
    indices = [zigzag(starts, ranks, r) for r in range(ranks)]
    places = [place_of[index] for index in indices]
    shares = tuple(place[place >= 0] for place in places)
    row_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
    part = ContextPart(
        rank=rank,
        shares=shares,
        lengths=tuple(torch.bincount(row_of[shares[rank]], minlength=len(sizes)).tolist()),
        order=upload([torch.cat(indices).argsort()], dtype=torch.int64, device=device),
    )
    mine = indices[rank]
    local = (places[rank] >= 0).nonzero().flatten()
    return [token_ids[mine], position_ids[mine], local, targets[part.places]], part
