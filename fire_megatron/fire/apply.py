"""Running the hooks of a recipe over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fire_megatron.fire.batch import FireBatch, Reducer, Selection
from fire_megatron.fire.hooks import Hook
from fire_megatron.metrics.values import Mean, Sum, Value, merge
from fire_megatron.parallel.reducer import Reducer as RankReducer


def start(batch: FireBatch) -> Selection:
    """All rows at weight 1, except rows that cannot train: empty ones, and ones whose scores are not finite."""
    mask = batch.mask_BR
    tables = (batch.teacher_logp_BR, batch.teacher_entropy_BR, batch.student_entropy_BR)
    finite = torch.stack([table.isfinite() for table in tables]).all(0)
    rows = len(mask)
    selection = Selection(
        keep_B=torch.ones(rows, dtype=torch.bool, device=mask.device),
        weight_BR=torch.ones(mask.shape, dtype=torch.float32, device=mask.device),
        reasons=(None,) * rows,
    )
    return selection.drop(~mask.any(-1), "empty").drop((mask & ~finite).any(-1), "nonfinite")


def apply_hooks(batch: FireBatch, hooks: Sequence[Hook], *, reducer: Reducer, micro_batch_size: int) -> Selection:
    """Apply hooks in order.

    Args:
        batch: this rank's rows.
        hooks: from :func:`fire_megatron.fire.hooks.build_hooks`.
        reducer: over the ranks that hold the other rows. Every rank calls with the same hooks.
        micro_batch_size: rows that a hook with ``scope: microbatch`` sees at a time, on its own rank only.

    Returns:
        The selection; rows that are empty or not finite are dropped whatever the hooks.
    """
    selection = start(batch)
    # Rows that were dropped for what they hold must not reach a maximum or a sum.
    broken = [reason == "nonfinite" for reason in selection.reasons]
    if any(broken):
        sound = ~torch.tensor(broken, device=batch.mask_BR.device)[:, None]
        clean = {
            name: torch.where(sound, getattr(batch, name), 0.0)
            for name in ("teacher_logp_BR", "teacher_entropy_BR", "student_entropy_BR")
        }
        batch = replace(batch, mask_BR=batch.mask_BR & sound, **clean)
    for hook in hooks:
        if getattr(hook, "scope", "global") == "microbatch":
            selection = _by_micro_batch(batch, selection, hook, micro_batch_size)
        else:
            selection = hook(batch, selection, reducer)
    return selection.report(_summary(batch, selection))


def _by_micro_batch(batch: FireBatch, selection: Selection, hook: Hook, size: int) -> Selection:
    """The published scope: statistics within each micro-batch, not across ranks."""
    parts = []
    metrics: dict[str, Value] = dict(selection.metrics)
    for first in range(0, len(batch.teacher_B), size):
        part = slice(first, first + size)
        view = Selection(selection.keep_B[part], selection.weight_BR[part], selection.reasons[part])
        parts.append(hook(batch.rows(part), view, RankReducer(None)))
        merge(metrics, parts[-1].metrics)
    if not parts:
        return selection
    return Selection(
        torch.cat([p.keep_B for p in parts]),
        torch.cat([p.weight_BR for p in parts]),
        tuple(reason for p in parts for reason in p.reasons),
        metrics,
    )


def _summary(batch: FireBatch, selection: Selection) -> dict[str, Value]:
    rows = len(batch.teacher_B)
    metrics: dict[str, Value] = {"fire/keep_ratio": Mean(float(selection.keep_B.sum()), rows)}
    for index, name in enumerate(batch.teacher_names):
        own = batch.teacher_B == index
        metrics[f"teacher/{name}/rows"] = Sum(float(own.sum()))
        metrics[f"teacher/{name}/keep_ratio"] = Mean(float((own & selection.keep_B).sum()), float(own.sum()))
    for reason in selection.reasons:
        if reason is not None:
            merge(metrics, {f"fire/dropped/{reason}": Sum(1.0)})
    return metrics
