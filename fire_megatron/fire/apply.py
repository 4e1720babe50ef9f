"""Running the hooks of a recipe over a batch.

Shapes: B rows of this rank, R longest response.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from fire_megatron.config.errors import RecipeError, UserError
from fire_megatron.fire.batch import FireBatch, Selection
from fire_megatron.fire.hooks import Hook
from fire_megatron.metrics.values import Max, Mean, Min, Sum, Value, merge
from fire_megatron.parallel.reducer import Reducer

EMPTY, NONFINITE = "empty", "nonfinite"
"""Reasons for which rows are dropped whatever the hooks."""
_PACKAGE = str(Path(__file__).parents[1])


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

    Raises:
        RecipeError: a hook fails, or returns what is no selection of these rows; on the rank that finds it so.
    """
    assert micro_batch_size >= 1, micro_batch_size
    batch, selection, blamed_B = _start(batch)
    for index, hook in enumerate(hooks):
        micro = getattr(hook, "scope", "global") == "microbatch"
        with _naming(f"loss.hooks.{index}"):
            if micro:
                after = _by_micro_batch(batch, selection, hook, micro_batch_size)
            else:
                after = _asked(hook, batch, selection, reducer)
        # A hook that builds a Selection of its own need not carry what the hooks before it reported.
        selection = replace(after, metrics=selection.metrics | after.metrics, details=selection.details | after.details)
    selection = selection.reweight(torch.where(batch.mask_BR, selection.weight_BR, 0))
    reasons = [EMPTY, NONFINITE, *(reason for hook in hooks for reason in getattr(hook, "reasons", ()))]
    return selection.report(_summary(batch, selection, reasons, blamed_B))


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Turn a fault of a hook into an error about its key in the recipe. Devices and other ranks fail in other ways."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith(_PACKAGE)]
        kind = f"{type(error).__name__}: " if frames[-1] in theirs else ""  # our own checks say enough
        place = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
        raise RecipeError(f"{key}: {kind}{error}{place}") from error
    except Exception as error:
        error.add_note(f"in {key}")
        raise


def _asked(hook: Hook, batch: FireBatch, selection: Selection, reducer: Reducer) -> Selection:
    """What a hook returns, checked. It is given copies, so that what it changes in place is its own."""
    return _checked(hook(_copied(batch), _copied(selection), reducer), selection, batch.mask_BR)


def _copied(values: Any) -> Any:
    tensors = {field.name: getattr(values, field.name) for field in fields(values)}
    return replace(values, **{name: value.clone() for name, value in tensors.items() if torch.is_tensor(value)})


def _checked(after: object, before: Selection, mask_BR: torch.Tensor) -> Selection:
    """What a hook has returned. Raises ValueError: it is no selection of the same rows."""
    if not isinstance(after, Selection):
        raise TypeError(f"returned {after!r:.80}; a hook returns a Selection, such as selection.drop(rows_B, reason)")
    if after.weight_BR.shape != before.weight_BR.shape:
        shapes = f"{tuple(after.weight_BR.shape)}, not {tuple(before.weight_BR.shape)}"
        raise ValueError(f"returned weights of shape {shapes}: one a token, [rows, longest response]")
    if (after.keep_B & ~before.keep_B).any():
        raise ValueError("returned rows as kept that were dropped before; a hook can only drop rows")
    if not after.weight_BR[mask_BR & after.keep_B[:, None]].isfinite().all():
        raise ValueError("returned weights that are not finite")
    return after


def _start(batch: FireBatch) -> tuple[FireBatch, Selection, torch.Tensor]:
    """The batch as hooks may see it, all its sound rows at weight 1, and [B] which rows are not sound for their
    teacher's scores alone."""
    mask_BR = batch.mask_BR
    names = ("teacher_logp_BR", "teacher_entropy_BR", "student_entropy_BR")
    finite_3BR = torch.stack([getattr(batch, name).isfinite() for name in names])
    broken_B = (mask_BR & ~finite_3BR.all(0)).any(-1)
    blamed_B = broken_B & ~(mask_BR & ~finite_3BR[2]).any(-1)
    selection = Selection(
        keep_B=torch.ones_like(batch.truncated_B),
        weight_BR=torch.ones_like(mask_BR, dtype=torch.float32),
        reason=(None,) * len(batch),
    )
    selection = selection.drop(~mask_BR.any(-1), EMPTY).drop(broken_B, NONFINITE)
    sound_BR = mask_BR & ~broken_B[:, None]
    clean = {name: torch.where(sound_BR, getattr(batch, name), 0) for name in names}
    return replace(batch, mask_BR=sound_BR, **clean), selection, blamed_B


def _by_micro_batch(batch: FireBatch, selection: Selection, hook: Hook, size: int) -> Selection:
    """The published scope: statistics within each micro-batch, not across ranks."""
    parts = []
    metrics: dict[str, Value] = {}
    for first in range(0, len(batch), size):
        part = slice(first, first + size)
        view = Selection(selection.keep_B[part], selection.weight_BR[part], selection.reason[part])
        rows = batch.rows(part)
        parts.append(_asked(hook, rows, view, Reducer(None)))
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


def _summary(
    batch: FireBatch, selection: Selection, reasons: Sequence[str], blamed_B: torch.Tensor
) -> dict[str, Value]:
    """Counts over rows and statistics of the weights over the response tokens of the rows that train."""
    keep_B, blamed_B = selection.keep_B.cpu(), blamed_B.cpu()
    teacher_B = batch.teacher_B.cpu()
    metrics: dict[str, Value] = {"fire/keep_ratio": Mean(float(keep_B.sum()), len(batch))}
    for index, name in enumerate(batch.teacher_names):
        own_B = teacher_B == index
        metrics[f"teacher/{name}/rows"] = Sum(float(own_B.sum()))
        metrics[f"teacher/{name}/keep_ratio"] = Mean(float((own_B & keep_B).sum()), float(own_B.sum()))
        metrics[f"teacher/{name}/nonfinite"] = Sum(float((own_B & blamed_B).sum()))
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
