"""From scored rollouts to the rows that train: FiRe over the global batch.

Shapes: B rows of this replica, R longest response, R_i response tokens of row i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fire_megatron.data.rollouts import Rollouts, Scores, TrainingRows
from fire_megatron.fire.apply import apply_hooks
from fire_megatron.fire.batch import FireBatch, Selection
from fire_megatron.fire.hooks import Hook
from fire_megatron.metrics.values import Mean, Sum, Value
from fire_megatron.parallel.grid import ModelGrid
from fire_megatron.parallel.reducer import Reducer
from fire_megatron.platform.device import compute_device


def _padded(rows: Sequence[torch.Tensor], width: int, device: torch.device) -> torch.Tensor:
    """Ragged rows -> [B, R] float32, zero on the right."""
    table = torch.zeros(len(rows), width, dtype=torch.float32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table.to(device)


def fire_batch(rollouts: Rollouts, scores: Scores, teacher_names: Sequence[str]) -> FireBatch:
    """Tables of this replica's rows for the hooks."""
    device = compute_device()
    lengths = [len(r) for r in rollouts.responses]
    width = max(lengths, default=0)
    mask = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    return FireBatch(
        teacher_B=torch.tensor([teacher_names.index(t) for t in scores.teachers], dtype=torch.int64, device=device),
        teacher_names=tuple(teacher_names),
        mask_BR=mask.to(device),
        teacher_logp_BR=_padded(scores.log_probs, width, device),
        teacher_entropy_BR=_padded(scores.entropies, width, device),
        student_entropy_BR=_padded(rollouts.entropies, width, device),
        truncated_B=torch.tensor(rollouts.truncated, dtype=torch.bool, device=device),
    )


@dataclass(frozen=True)
class Selected:
    """What is left of this replica's rows, and why."""

    rows: TrainingRows
    """Those that train, in their order."""
    selection: Selection
    """What the hooks have decided on all of them."""
    metrics: dict[str, Value]
    """Count every row once: on one rank of each replica."""


def select(
    rollouts: Rollouts,
    scores: Scores,
    hooks: Sequence[Hook],
    teacher_names: Sequence[str],
    *,
    micro_batch_size: int,
    grid: ModelGrid,
) -> Selected:
    """Apply the hooks over the global batch and keep this replica's surviving rows. Collective over
    ``grid.row_group``.

    Args:
        rollouts: B answers.
        scores: what the teachers say of them.
        hooks: in their order.
        teacher_names: of all targets (:attr:`TeacherRouter.names`).
        micro_batch_size: ``optimizer.micro_batch_size``, for hooks whose scope it is.
        grid: the student's.
    """
    batch = fire_batch(rollouts, scores, teacher_names)
    selection = apply_hooks(batch, hooks, reducer=Reducer(grid.row_group), micro_batch_size=micro_batch_size)
    kept = selection.keep_B.nonzero().flatten().tolist()
    weights = selection.weight_BR.cpu()
    rows = TrainingRows(
        rollouts=rollouts.take(kept),
        targets=tuple(scores.targets[i] for i in kept),
        teacher_log_probs=tuple(scores.log_probs[i] for i in kept),
        weights=tuple(weights[i, : len(rollouts.responses[i])] for i in kept),
    )
    return Selected(rows, selection, _metrics(rollouts, scores, selection))


def _metrics(rollouts: Rollouts, scores: Scores, selection: Selection) -> dict[str, Value]:
    metrics: dict[str, Value] = dict(selection.metrics)
    by_teacher: dict[str, list[int]] = {}
    for i, teacher in enumerate(scores.teachers):
        if selection.reason[i] not in ("empty", "nonfinite"):
            by_teacher.setdefault(teacher, []).append(i)
    for teacher, rows in by_teacher.items():
        tokens = sum(len(rollouts.responses[i]) for i in rows)
        log_prob = sum(float(scores.log_probs[i].sum()) for i in rows)
        student = sum(float(rollouts.log_probs[i].sum()) for i in rows)
        metrics[f"teacher/{teacher}/reverse_kl"] = Mean(student - log_prob, tokens)
        metrics[f"teacher/{teacher}/log_prob"] = Mean(log_prob, tokens)
    return metrics


def rollout_metrics(rollouts: Rollouts) -> dict[str, Value]:
    """Lengths, truncation and entropy of this replica's rollouts."""
    rows = len(rollouts)
    tokens = sum(len(r) for r in rollouts.responses)
    return {
        "rollout/tokens": Sum(tokens),
        "rollout/mean_length": Mean(tokens, rows),
        "rollout/truncated": Mean(sum(rollouts.truncated), rows),
        "rollout/entropy": Mean(sum(float(e.sum()) for e in rollouts.entropies), tokens),
    }


def mini_batches(rows: TrainingRows, count: int) -> list[TrainingRows]:
    """Split rows by id into ``count`` parts, one an optimizer update; every replica splits alike."""
    parts = [[i for i, row in enumerate(rows.rollouts.row_ids) if row % count == part] for part in range(count)]
    return [rows.take(part) for part in parts]
