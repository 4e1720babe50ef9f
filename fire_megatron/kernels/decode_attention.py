"""Attention of one new token a row over keys and values of rows of different lengths.

Every row reads what it may look at and nothing else: neither other rows' lengths nor the bucket that a CUDA graph is
captured for cost anything. Where rows and heads are too few to occupy the GPU, the positions of each are shared between
programs, whose parts are put together afterwards (flash-decoding; Dao et al. 2023).

Shapes: n rows, S slots (row i is in slot i), Q query heads, G key/value heads, L positions, D head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 64
"""Positions that a program looks at at a time."""
_PROGRAMS = 528
"""Programs that occupy a GPU: four for each of an H100's multiprocessors."""
_LEAST_POSITIONS = 256
"""Of a part: less would be lost to putting parts together."""
_NOTHING = tl.constexpr(-1.0e30)
"""Peak of a part without positions."""


@triton.jit
def _attend(
    query, keys, values, at, out, peaks, totals,
    heads, kv_heads, size, stride_row, stride_head, parts, window, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One part of one row's positions for the query heads that share a key/value head."""
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group = heads // kv_heads
    last = tl.load(at + row).to(tl.int32)
    first = tl.maximum(last + 1 - window, 0)
    length = (tl.cdiv(last + 1 - first, parts) + BLOCK - 1) // BLOCK * BLOCK
    start = first + part * length
    stop = tl.minimum(start + length, last + 1)

    member, place = tl.arange(0, GROUP), tl.arange(0, DIM)
    in_group, in_head = member < group, place < size
    own = in_group[:, None] & in_head[None, :]
    head = kv_head * group + member
    q = tl.load(query + (row * heads + head)[:, None] * size + place[None, :], mask=own, other=0.0)
    base = row * stride_row + kv_head.to(tl.int64) * stride_head

    peak = tl.full([GROUP], _NOTHING, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    mixed = tl.zeros([GROUP, DIM], tl.float32)
    for block in range(start, stop, BLOCK):
        position = block + tl.arange(0, BLOCK)
        seen = position < stop
        where = position[:, None] * size + place[None, :]
        there = seen[:, None] & in_head[None, :]
        k = tl.load(keys + base + where, mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        highest = tl.maximum(peak, tl.max(score, 1))
        kept, weight = tl.exp(peak - highest), tl.exp(score - highest[:, None])
        v = tl.load(values + base + where, mask=there, other=0.0)
        mixed = mixed * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        peak = highest
    if WHOLE:
        target = out + (row * heads + head)[:, None] * size + place[None, :]
        tl.store(target, (mixed / total[:, None]).to(out.dtype.element_ty), mask=own)
    else:
        piece = (row * heads + head) * parts + part
        tl.store(out + piece[:, None] * size + place[None, :], mixed, mask=own)
        tl.store(peaks + piece, peak, mask=in_group)
        tl.store(totals + piece, total, mask=in_group)


@triton.jit
def _join(mixed, peaks, totals, out, size, parts, PARTS: tl.constexpr, DIM: tl.constexpr):
    """The parts of one query head of one row."""
    head = tl.program_id(0).to(tl.int64)
    part, place = tl.arange(0, PARTS), tl.arange(0, DIM)
    there, in_head = part < parts, place < size
    peak = tl.load(peaks + head * parts + part, mask=there, other=_NOTHING)
    scale = tl.where(there, tl.exp(peak - tl.max(peak, 0)), 0.0)
    total = tl.sum(scale * tl.load(totals + head * parts + part, mask=there, other=0.0), 0)
    source = mixed + (head * parts + part)[:, None] * size + place[None, :]
    values = tl.load(source, mask=there[:, None] & in_head[None, :], other=0.0)
    joined = tl.sum(values * scale[:, None], 0) / total
    tl.store(out + head * size + place, joined.to(out.dtype.element_ty), mask=in_head)


def parts_of(rows: int, kv_heads: int, positions: int) -> int:
    """Parts that a row's positions are cut into, from sizes that are the same for every replay of a CUDA graph."""
    wanted = -(-_PROGRAMS // (rows * kv_heads))
    return max(1, min(wanted, positions // _LEAST_POSITIONS))


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    at: torch.Tensor,
    *,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Attend from the newest token of every row.

    Args:
        query: [n, Q, D].
        keys, values: [n, G, L, D] with L positions that hold the longest row, each of them contiguous.
        at: [n] int64, the newest token's position, up to which its row is filled.
        window: tokens that it may look back on, itself included; None for all.
        scale: of the scores.

    Returns:
        [n, Q, D] in the dtype of the query; scores and sums are float32.
    """
    query = query.contiguous()
    rows, heads, size = query.shape
    kv_heads, positions = keys.shape[1:3]
    assert keys.stride() == values.stride() and keys.stride()[2:] == (size, 1), (keys.stride(), values.stride())
    parts = parts_of(rows, kv_heads, positions)
    out = torch.empty_like(query)
    # tl.dot takes no fewer than 16 rows; the copies of zeros beyond the group cost nothing that memory does not hide.
    group, dim = max(16, triton.next_power_of_2(heads // kv_heads)), max(16, triton.next_power_of_2(size))
    whole = parts == 1
    mixed = out if whole else torch.empty(rows, heads, parts, size, dtype=torch.float32, device=query.device)
    peaks, totals = (
        (out, out) if whole else torch.empty(2, rows, heads, parts, dtype=torch.float32, device=query.device)
    )
    _attend[(rows, kv_heads, parts)](
        query, keys, values, at, mixed, peaks, totals,
        heads, kv_heads, size, keys.stride(0), keys.stride(1), parts, window or 2**30, scale,
        GROUP=group, DIM=dim, BLOCK=_BLOCK, WHOLE=whole,
        num_warps=4, num_stages=1 if query.dtype == torch.float32 else 3,
    )  # fmt: skip
    if not whole:
        _join[(rows * heads,)](
            mixed, peaks, totals, out, size, parts, PARTS=triton.next_power_of_2(parts), DIM=dim, num_warps=4
        )
    return out


@triton.jit
def _append(
    keys, values, key, value, at,
    size, stride_slot, stride_head, key_row, key_head, value_row, value_head,
    DIM: tl.constexpr,
):  # fmt: skip
    row, head, place = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, DIM)
    inside = place < size
    target = row * stride_slot + head * stride_head + tl.load(at + row) * size + place
    tl.store(keys + target, tl.load(key + row * key_row + head * key_head + place, mask=inside), mask=inside)
    tl.store(values + target, tl.load(value + row * value_row + head * value_head + place, mask=inside), mask=inside)


def append(keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: torch.Tensor) -> None:
    """Store one token a row.

    Args:
        keys, values: [S, G, L, D], contiguous.
        key, value: [n, G, D] of any strides but contiguous heads.
        at: [n] int64, where in its row.
    """
    rows, heads, size = key.shape
    assert keys.is_contiguous() and values.is_contiguous() and key.stride(2) == value.stride(2) == 1
    _append[(rows, heads)](
        keys, values, key, value, at, size, keys.stride(0), keys.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), DIM=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
