"""Softmax over a sharded vocabulary: what every vocabulary-parallel loss is made of.

Shapes: T tokens, V columns of this shard, C tokens of a block. A row's logarithm of the sum of exponentials is kept as
two numbers, the peak logit and the log of the sum of exp(logit - peak): their sum would round away the second next to
large logits.

A shard may have no column at all, or none but ``-inf`` (vocabulary padding): it has no mass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from fire_megatron.parallel.collectives import all_gather_stacked
from fire_megatron.platform.device import device_kind

_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
"""Logits whose full-precision copies exist at a time: what stays in a core's cache, or what fills a GPU."""

FLOOR = -1e30
"""Stands for the log of 0, so that ``0 * log 0`` is 0 and ``log 0 - log 0`` is not NaN."""


def default_block(columns: int, device: torch.device) -> int:
    """Tokens of a block of so many columns."""
    return max(1, _BLOCK_ELEMENTS.get(device_kind(device), _BLOCK_ELEMENTS["cuda"]) // max(columns, 1))


def blocks(logits_TV: torch.Tensor, block_tokens: int | None, span: slice | None = None) -> Iterator[slice]:
    """Slices of the tokens (of ``span``, if given), cut so that a block's full-precision copies are small."""
    first, last = (0, len(logits_TV)) if span is None else (span.start, span.stop)
    step = default_block(logits_TV.shape[-1], logits_TV.device) if block_tokens is None else block_tokens
    assert step > 0, step
    for start in range(first, last, step):
        yield slice(start, min(start + step, last))


def compute_dtype(logits: torch.Tensor) -> torch.dtype:
    """float32, or float64 for float64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def is_sharded(group: dist.ProcessGroup | None) -> bool:
    """Whether the vocabulary is spread over several ranks."""
    return group is not None and group.size() > 1


def all_reduce(values: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    """All-reduce in place; nothing to do for an unsharded vocabulary."""
    if is_sharded(group):
        dist.all_reduce(values, op=op, group=group)


def local_columns(ids: torch.Tensor, vocab_start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each vocabulary id in this shard (an arbitrary one when elsewhere) and whether it is here."""
    column = ids - vocab_start
    return column.clamp(0, max(width - 1, 0)), (column >= 0) & (column < width)


def gather_local(logits_TV: torch.Tensor, ids: torch.Tensor, vocab_start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logit of each vocabulary id ([T, K] int64) that this shard holds, 0 for the others, and whether it is here."""
    column, here = local_columns(ids, vocab_start, logits_TV.shape[-1])
    if logits_TV.shape[-1] == 0:
        return logits_TV.new_zeros(ids.shape), here
    return torch.where(here, logits_TV.gather(-1, column), 0), here


def local_peak(logits_CV: torch.Tensor) -> torch.Tensor:
    """[C] largest logit of this shard in the compute dtype; finite also where there is none."""
    dtype = compute_dtype(logits_CV)
    if logits_CV.shape[-1] == 0:
        return logits_CV.new_full(logits_CV.shape[:1], torch.finfo(dtype).min, dtype=dtype)
    return logits_CV.amax(-1).to(dtype).clamp_min_(torch.finfo(dtype).min)


def shifted(logits_CV: torch.Tensor, peak_C: torch.Tensor, temperature: float) -> torch.Tensor:
    """[C, V] ``(logits - peak) / temperature`` in the compute dtype, at least FLOOR: a copy of one's own."""
    shifted_CV = torch.sub(logits_CV, peak_C[:, None])
    if temperature != 1:
        shifted_CV.mul_(1 / temperature)
    return shifted_CV.clamp_min_(FLOOR)


def log_softmax(
    logits_CV: torch.Tensor, peak_C: torch.Tensor, log_total_C: torch.Tensor, temperature: float
) -> torch.Tensor:
    """[C, V] log-probabilities in the compute dtype: a copy of one's own."""
    return shifted(logits_CV, peak_C, temperature).sub_(log_total_C[:, None])


def combine(
    peak: torch.Tensor, totals: torch.Tensor, temperature: torch.Tensor | float, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the shards' sums together. Collective: one all-gather.

    Args:
        peak: [...] each row's peak logit in this shard.
        totals: [K, ...] sums over this shard of exp((logit - peak) / temperature), K sums of each row.
        temperature: of each row, to be broadcast against ``peak``.
        group: the ranks that hold the other shards.

    Returns:
        The global peak [...] and the sums [K, ...] over all shards relative to it; the same on every rank.
    """
    if not is_sharded(group):
        return peak, totals
    table = all_gather_stacked(torch.cat((peak[None], totals)), group=group)
    highest = table[:, 0].amax(0)
    scale = ((table[:, 0] - highest) / temperature).exp()
    return highest, (table[:, 1:] * scale[:, None]).sum(0)
