"""Rows into packs: balanced over replicas, cut into micro-batches, laid end to end without padding.

Shapes: T tokens of a pack, N response tokens of a pack, R response tokens of a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pack:
    """One micro-batch: rows laid end to end, each attending only to itself and starting at position 0."""

    token_ids: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64, position within the row."""
    cu_seqlens: torch.Tensor
    """[rows + 1] int32, row boundaries; a last extra row holds padding tokens where there are any."""
    max_seqlen: int
    select: torch.Tensor
    """[N] int64, the positions whose next token is a response token, row by row."""
    targets: torch.Tensor
    """[N] int64, those response tokens."""
    rows: tuple[int, ...]
    """Indices of the rows in the batch that the pack was cut from."""
    response_lengths: tuple[int, ...]
    """R of each row; N is their sum."""
    real_lengths: tuple[int, ...]
    """Tokens of each row, prompt and response, without padding."""

    def __post_init__(self) -> None:
        assert self.token_ids.shape == self.position_ids.shape == (1, int(self.cu_seqlens[-1]))
        assert self.select.shape == self.targets.shape == (sum(self.response_lengths),)
        assert len(self.rows) == len(self.response_lengths)

    @property
    def padding(self) -> torch.Tensor:
        """[1, T] bool, which tokens are padding, on the pack's device."""
        sizes = self.cu_seqlens.diff() * self.token_ids.shape[1] // self.cu_seqlens[-1]
        ends = torch.tensor([*self.real_lengths, 0])[: len(sizes)]  # the last extra row is padding from its start
        return self.position_ids >= torch.repeat_interleave(ends, sizes).to(self.position_ids.device)


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


def pack_rows(
    prompts: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    rows: Sequence[int],
    *,
    multiple: int,
    device: torch.device,
) -> Pack:
    """Lay rows end to end.

    Args:
        prompts: [P_i] int64 token ids of every row of the batch, P_i >= 1.
        responses: [R_i] int64 token ids of every row of the batch.
        rows: which of them to pack; may be empty (then the pack is padding only, so that a replica with nothing
            to do still takes part in its collectives).
        multiple: T is padded to a multiple of this (sequence parallelism splits T over the tensor ranks).
        device: where the pack goes.
    """
    tokens = [torch.cat((prompts[r], responses[r])) for r in rows]
    lengths = [len(t) for t in tokens]
    total = sum(lengths)
    padding = (-total) % multiple or (multiple if total == 0 else 0)
    if padding:
        tokens.append(torch.zeros(padding, dtype=torch.int64))
        lengths.append(padding)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    select = [
        torch.arange(start + len(prompts[r]) - 1, start + len(prompts[r]) + len(responses[r]) - 1)
        for r, start in zip(rows, starts, strict=False)
    ]
    empty = torch.zeros(0, dtype=torch.int64)
    return Pack(
        token_ids=torch.cat(tokens)[None].to(device),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        select=torch.cat([empty, *select]).to(device),
        targets=torch.cat([empty, *(responses[r] for r in rows)]).to(device),
        rows=tuple(rows),
        response_lengths=tuple(len(responses[r]) for r in rows),
        real_lengths=tuple(len(prompts[r]) + len(responses[r]) for r in rows),
    )
