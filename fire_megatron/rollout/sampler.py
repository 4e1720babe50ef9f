"""Sampling from logits that are sharded over the vocabulary, the same for every tensor-parallel size.

One uniform number a token, a pure function of (seed, step, row, position), is inverted through the cumulative
distribution in vocabulary order. Nothing is drawn from a generator, so a sample does not depend on which rank,
batch or pipeline computes it.

Shapes: B rows, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from fire_megatron.parallel.collectives import all_gather_stacked

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, step: int, row_ids: Sequence[int], position: int) -> torch.Tensor:
    """[B] float64 in [0, 1): one number a row for the token at ``position`` of its response in ``step``."""
    with np.errstate(over="ignore"):
        state = np.array(row_ids, dtype=np.uint64)
        for word in (position, step, seed):
            state = _mix(state * _GOLDEN + np.uint64(word % 2**64) + _GOLDEN)
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


@dataclass(frozen=True)
class Sampled:
    """One sampled token a row."""

    tokens: torch.Tensor
    """[B] int64."""
    log_probs: torch.Tensor
    """[B] float32, log-probability under the distribution that was sampled from (temperature and top-p applied);
    for greedy decoding, under the full softmax."""
    entropies: torch.Tensor
    """[B] float32, nats, entropy of the full softmax at temperature 1."""


def _all_reduce(values: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values


def _gather_vocabulary(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=-1)


def _nucleus(mass: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero everything outside the smallest set of likeliest tokens that holds ``top_p`` of the mass. [B, V]

    Of equals at the edge the first are kept. Keeping all would add their mass where two differ by less than rounding,
    which depends on the layout, and many where logits are bfloat16.
    """
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1, dtype=torch.float64) - ranked
    outside = before >= top_p * mass.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.zeros_like(mass).scatter(-1, order, ranked.masked_fill(outside, 0.0))


def _invert(mass: torch.Tensor, numbers: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each row's number in the cumulative mass over the whole vocabulary.

    Returns the index within this shard ([B] int64, -1 when another shard holds it) and the total mass [B].
    """
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    local = cumulative[:, -1].contiguous()
    bounds = all_gather_stacked(local, group=group).cumsum(0)  # [shards, B] cumulative mass at the end of each shard
    total = bounds[-1]
    # Rounding may leave u * total at or beyond the end; the largest double below keeps it inside.
    target = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    owner = (bounds <= target).sum(0)
    rank = group.rank()
    start = bounds[rank - 1] if rank else torch.zeros_like(total)
    # right=True: the first entry whose cumulative mass exceeds the target, which therefore has mass itself.
    index = torch.searchsorted(cumulative, (target - start)[:, None], right=True).squeeze(-1)
    last = (cumulative < local[:, None]).sum(-1)  # subtraction may round up to the shard's end
    return torch.where(owner == rank, torch.minimum(index, last), -1), total


def sample(
    logits: torch.Tensor,
    numbers: torch.Tensor,
    *,
    temperature: float,
    top_p: float,
    vocab_start: int,
    group: dist.ProcessGroup,
) -> Sampled:
    """Sample one token a row.

    Args:
        logits: [B, V] any float dtype, this rank's vocabulary shard; ``-inf`` in padding columns. Not changed.
        numbers: [B] float64 in [0, 1), from :func:`uniforms`.
        temperature: 0 is greedy (smallest index among equals).
        top_p: nucleus mass in (0, 1] (Holtzman et al. 2020, arXiv 1904.09751).
        vocab_start: first vocabulary entry of this shard.
        group: tensor-parallel group.

    Returns:
        The same on every rank of the group. Collectives: one max, one sum of [2, B], one gather of [B], one
        combine of [2, B]; with ``top_p`` below 1 also a gather of the logits.
    """
    z = logits.float()
    peak = _all_reduce(z.amax(-1), dist.ReduceOp.MAX, group)
    shifted = z - peak[:, None]
    weight = shifted.exp()
    # exp(-inf) * -inf is NaN, so padding is taken out of the product.
    product = (weight * shifted.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
    sums = _all_reduce(torch.stack((weight.sum(-1), product)), dist.ReduceOp.SUM, group)
    log_norm = sums[0].log()
    entropies = log_norm - sums[1] / sums[0]

    if temperature == 0:
        at_peak = (shifted == 0).to(torch.int64)
        first = torch.where(at_peak.amax(-1) > 0, at_peak.argmax(-1) + vocab_start, torch.iinfo(torch.int64).max)
        return Sampled(_all_reduce(first, dist.ReduceOp.MIN, group), -log_norm, entropies)

    mass = weight if temperature == 1 else (shifted / temperature).exp()
    if top_p < 1:
        whole = _nucleus(_gather_vocabulary(mass, group), top_p)
        mass = whole[:, vocab_start : vocab_start + mass.shape[-1]]
    index, total = _invert(mass, numbers.to(mass.device), group)
    chosen = mass.gather(-1, index.clamp_min(0)[:, None]).squeeze(-1).double()
    picked = torch.where(index >= 0, torch.stack(((index + vocab_start).double(), chosen)), 0.0)
    token, token_mass = _all_reduce(picked, dist.ReduceOp.SUM, group)
    return Sampled(token.long(), (token_mass.log() - total.log()).float(), entropies)
