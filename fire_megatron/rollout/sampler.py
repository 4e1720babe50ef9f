"""Sampling from logits that are sharded over the vocabulary, the same for every tensor-parallel size.

One uniform number a token, a pure function of (seed, step, row, position), is inverted through the cumulative
distribution in vocabulary order. Nothing is drawn from a generator, so a sample does not depend on which rank,
batch or pipeline computes it.

Shapes: B rows, V local vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fire_megatron import kernels
from fire_megatron.parallel.collectives import all_gather_stacked

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, step: int, row_ids: Sequence[int], positions: int | np.ndarray) -> torch.Tensor:
    """Numbers in [0, 1), float64, one for each token to be sampled in ``step``.

    Args:
        positions: of a row's tokens in its response; one for all rows, or [B] or [B, P] of each row's own.

    Returns:
        [B], or [B, P] where positions are.
    """
    places = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    with np.errstate(over="ignore"):
        state = np.array(row_ids, dtype=np.uint64)
        state = state[:, None] if places.ndim == 2 else state
        for word in (places, np.uint64(step % 2**64), np.uint64(seed % 2**64)):
            state = _mix(state * _GOLDEN + word + _GOLDEN)
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
    which depends on the layout.
    """
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1, dtype=torch.float64) - ranked
    outside = before >= top_p * mass.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.zeros_like(mass).scatter(-1, order, ranked.masked_fill(outside, 0.0))


_BLOCK = 256
"""Entries of a block of the vocabulary, whose masses are summed before any cumulative sum is taken."""

InBlock = Callable[[torch.Tensor], torch.Tensor]
"""Number of a block in each row, [B] int64 -> mass of its entries, [B, _BLOCK]."""


def _invert(
    blocks: torch.Tensor, in_block: InBlock, numbers: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find each row's number in the cumulative mass over the whole vocabulary.

    Only the block that holds the number is looked into: a cumulative sum of every entry in float64 would be most of
    sampling.

    Args:
        blocks: [B, blocks] float64, mass of this shard's blocks.
        in_block: what is in one of them.
        numbers: [B] float64 in [0, 1).

    Returns:
        The index within this shard ([B] int64, -1 when another shard holds it), its mass and the total mass [B].
    """
    ends = blocks.cumsum(-1)  # cumulative mass at the end of each block
    local = ends[:, -1].contiguous()
    bounds = all_gather_stacked(local, group=group).cumsum(0)  # [shards, B] cumulative mass at the end of each shard
    total = bounds[-1]
    # Rounding may leave u * total at or beyond the end; the largest double below keeps it inside.
    target = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    owner = (bounds <= target).sum(0)
    rank = group.rank()
    start = bounds[rank - 1] if rank else torch.zeros_like(total)
    block, before = _first_beyond(ends, target - start)
    inside = in_block(block)
    entry, _ = _first_beyond(inside.cumsum(-1, dtype=torch.float64), target - start - before)
    chosen = inside.gather(-1, entry[:, None]).squeeze(-1)
    return torch.where(owner == rank, block * _BLOCK + entry, -1), chosen, total


def _in_blocks(mass: torch.Tensor) -> tuple[torch.Tensor, InBlock]:
    """[B, V] -> its blocks for :func:`_invert`."""
    blocks = F.pad(mass, (0, -mass.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))

    def in_block(block: torch.Tensor) -> torch.Tensor:
        return blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK)).squeeze(1)

    return blocks.sum(-1, dtype=torch.float64), in_block


def _in_blocks_at_once(z: torch.Tensor, peak: torch.Tensor, temperature: float) -> tuple[torch.Tensor, InBlock]:
    """The same of ``exp((z - peak) / temperature)``, which is not written anywhere."""
    from fire_megatron.kernels.softmax import block_masses

    def in_block(block: torch.Tensor) -> torch.Tensor:
        column = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=z.device)
        inside = column < z.shape[-1]
        logit = z.gather(-1, torch.where(inside, column, 0)).masked_fill(~inside, -torch.inf)
        return ((logit - peak[:, None]) / temperature).exp()

    return block_masses(z, peak, temperature, _BLOCK), in_block


def _first_beyond(cumulative: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, n] ascending, [B] -> the first place in each row whose value exceeds the target, which therefore has mass
    itself, and the value before it. Where rounding leaves none, the last place that has mass."""
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    place = torch.minimum(torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1), last)
    before = cumulative.gather(-1, (place - 1).clamp_min(0)[:, None]).squeeze(-1)
    return place, torch.where(place > 0, before, 0.0)


def sample_tokens(
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
    peak, sums, weight = _statistics(z, group)
    log_norm = sums[0].log()
    entropies = log_norm - sums[1] / sums[0]

    if temperature == 0:
        at_peak = (z == peak[:, None]).to(torch.int64)
        first = torch.where(at_peak.amax(-1) > 0, at_peak.argmax(-1) + vocab_start, torch.iinfo(torch.int64).max)
        return Sampled(_all_reduce(first, dist.ReduceOp.MIN, group), -log_norm, entropies)

    if weight is None and top_p == 1:
        blocks, in_block = _in_blocks_at_once(z, peak, temperature)
    else:
        mass = ((z - peak[:, None]) / temperature).exp() if weight is None or temperature != 1 else weight
        if top_p < 1:
            whole = _nucleus(_gather_vocabulary(mass, group), top_p)
            mass = whole[:, vocab_start : vocab_start + mass.shape[-1]]
        blocks, in_block = _in_blocks(mass)
    index, chosen, total = _invert(blocks, in_block, numbers.to(z.device), group)
    picked = torch.where(index >= 0, torch.stack(((index + vocab_start).double(), chosen.double())), 0.0)
    token, token_mass = _all_reduce(picked, dist.ReduceOp.SUM, group)
    return Sampled(token.long(), (token_mass.log() - total.log()).float(), entropies)


def _statistics(z: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of logits [B, V]: the peak of the whole vocabulary [B]; the sums of exp(z - peak), and of that times (z - peak),
    over it [2, B]; and exp(z - peak) of this shard where it has been written, else None."""
    if kernels.usable(z):
        from fire_megatron.kernels.softmax import softmax_sums

        local_peak, total, moment = softmax_sums(z)
        peak = _all_reduce(local_peak.clone(), dist.ReduceOp.MAX, group)
        drop = local_peak - peak
        sums, weight = drop.exp() * torch.stack((total, moment + drop * total)), None
    else:
        peak = _all_reduce(z.amax(-1), dist.ReduceOp.MAX, group)
        shifted = z - peak[:, None]
        weight = shifted.exp()
        # exp(-inf) * -inf is NaN, so padding is taken out of the product.
        product = (weight * shifted.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
        sums = torch.stack((weight.sum(-1), product))
    return peak, _all_reduce(sums, dist.ReduceOp.SUM, group), weight
