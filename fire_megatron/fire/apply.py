"""Running the hooks of a recipe over a batch.

Shapes: B rows of this rank, R longest response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fire_megatron.fire.batch import FireBatch, Selection
from fire_megatron.fire.hooks import Hook
from fire_megatron.metrics.values import Max, Mean, Min, Sum, Value, merge
from fire_megatron.parallel.reducer import Reducer

EMPTY, NONFINITE = "empty", "nonfinite"
"""Reasons for which rows are dropped whatever the hooks."""


def apply_hooks(batch: FireBatch, hooks: Sequence[Hook], *, reducer: Reducer, micro_batch_size: int) -> Selection:
    """Apply hooks in order. Collective over the reducer's ranks, all of which pass the same hooks.

    Rows that cannot train are dropped first, whatever the hooks: empty ones, and ones where a teacher's score or an
    entropy is NaN or infinite. Hooks see such rows as fully masked, so they reach no maximum, sum or percentile.

    Args:
        batch: this rank's rows, possibly none.
        hooks: from :func:`fire_megatron.fire.hooks.build_hooks`; none give weight 1 and keep every sound row.
        reducer: over the ranks that hold the other rows.
        micro_batch_size: rows that a hook with ``scope: microbatch`` sees at a time, on its own rank only.

    Returns:
        The selection, its weights 0 on padding, with metrics to be reduced over the reducer's ranks, each row on one
        rank.
    """
    assert micro_batch_size >= 1, micro_batch_size
    batch, selection = _start(batch)
    for hook in hooks:
        micro = getattr(hook, "scope", "global") == "microbatch"
        after = _by_micro_batch(batch, selection, hook, micro_batch_size) if micro else hook(batch, selection, reducer)
        assert not (after.keep_B & ~selection.keep_B).any(), f"{hook} keeps rows that were dropped before it"
        # A hook that builds a Selection of its own need not carry what the hooks before it reported.
        selection = replace(after, metrics=selection.metrics | after.metrics, details=selection.details | after.details)
    selection = selection.reweight(torch.where(batch.mask_BR, selection.weight_BR, 0))
    reasons = [EMPTY, NONFINITE, *(reason for hook in hooks for reason in getattr(hook, "reasons", ()))]
    return selection.report(_summary(batch, selection, reasons))


def _start(batch: FireBatch) -> tuple[FireBatch, Selection]:
    """The batch as hooks may see it, and all its sound rows at weight 1."""
    mask_BR = batch.mask_BR
    names = ("teacher_logp_BR", "teacher_entropy_BR", "student_entropy_BR")
    finite_BR = torch.stack([getattr(batch, name).isfinite() for name in names]).all(0)
    broken_B = (mask_BR & ~finite_BR).any(-1)
    selection = Selection(
        keep_B=torch.ones_like(batch.truncated_B),
        weight_BR=torch.ones_like(mask_BR, dtype=torch.float32),
        reason=(None,) * len(batch),
    )
    selection = selection.drop(~mask_BR.any(-1), EMPTY).drop(broken_B, NONFINITE)
    sound_BR = mask_BR & ~broken_B[:, None]
    clean = {name: torch.where(sound_BR, getattr(batch, name), 0) for name in names}
    return replace(batch, mask_BR=sound_BR, **clean), selection


def _by_micro_batch(batch: FireBatch, selection: Selection, hook: Hook, size: int) -> Selection:
    """The published scope: statistics within each micro-batch, not across ranks."""
    parts = []
    metrics: dict[str, Value] = {}
    for first in range(0, len(batch), size):
        part = slice(first, first + size)
        view = Selection(selection.keep_B[part], selection.weight_BR[part], selection.reason[part])
        parts.append(hook(batch.rows(part), view, Reducer(None)))
        merge(metrics, parts[-1].metrics)
    if not parts:
        return selection
    told = set.intersection(*(set(p.details) for p in parts))
    return Selection(
        keep_B=torch.cat([p.keep_B for p in parts]),
        weight_BR=torch.cat([p.weight_BR for p in parts]),
        reason=tuple(reason for p in parts for reason in p.reason),
        metrics=selection.metrics | metrics,
        details={name: torch.cat([p.details[name] for p in parts]) for name in sorted(told)},
    )


def _summary(batch: FireBatch, selection: Selection, reasons: Sequence[str]) -> dict[str, Value]:
    """Counts over rows and statistics of the weights over the response tokens of the rows that train."""
    keep_B = selection.keep_B.cpu()
    teacher_B = batch.teacher_B.cpu()
    metrics: dict[str, Value] = {"fire/keep_ratio": Mean(float(keep_B.sum()), len(batch))}
    for index, name in enumerate(batch.teacher_names):
        own_B = teacher_B == index
        metrics[f"teacher/{name}/rows"] = Sum(float(own_B.sum()))
        metrics[f"teacher/{name}/keep_ratio"] = Mean(float((own_B & keep_B).sum()), float(own_B.sum()))
    for reason in reasons:
        metrics[f"fire/dropped/{reason}"] = Sum(0.0)
    for reason in filter(None, selection.reason):
        merge(metrics, {f"fire/dropped/{reason}": Sum(1.0)})
    weights = selection.weight_BR[batch.mask_BR & selection.keep_B[:, None]]
    if weights.numel():
        metrics["fire/token_weight_mean"] = Mean(float(weights.double().sum()), weights.numel())
        metrics["fire/token_weight_min"] = Min(float(weights.min()))
        metrics["fire/token_weight_max"] = Max(float(weights.max()))
    return metrics
