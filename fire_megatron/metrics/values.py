"""Metric values that carry how they reduce: adding two of a kind is what reducing over ranks does.

A mean travels as total and count, so the mean over ranks is the mean over everything, not a mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

import torch.distributed as dist


@dataclass(frozen=True)
class Mean:
    """``total / count``; left out of the report when the count is 0."""

    total: float
    count: float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def result(self) -> float | None:
        """The mean, or None of nothing."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True)
class _Single:
    """Something of one number."""

    value: float

    @property
    def result(self) -> float | None:
        """The number."""
        return self.value


class Sum(_Single):
    """A total over micro-batches and ranks."""

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)


class Max(_Single):
    """The largest; not-a-number wins over everything, so that no rank can hide another's."""

    def __add__(self, other: Max) -> Max:
        return Max(math.nan if _any_nan(self, other) else max(self.value, other.value))


class Min(_Single):
    """The smallest; not-a-number wins over everything, so that no rank can hide another's."""

    def __add__(self, other: Min) -> Min:
        return Min(math.nan if _any_nan(self, other) else min(self.value, other.value))


class Last(_Single):
    """Something that every rank knows alike, such as a learning rate: the lowest rank's is taken."""

    def __add__(self, other: Last) -> Last:
        return self


def _any_nan(*values: _Single) -> bool:
    return any(math.isnan(value.value) for value in values)


Value: TypeAlias = Mean | Sum | Max | Min | Last


def merge(into: dict[str, Value], values: Mapping[str, Value]) -> dict[str, Value]:
    """Add ``values`` key by key to ``into`` and return it.

    Raises:
        TypeError: one key carries two kinds of value, which is our own mistake.
    """
    for key, value in values.items():
        have = into.get(key)
        if have is not None and type(have) is not type(value):
            raise TypeError(f"metric {key} is a {type(have).__name__} here and a {type(value).__name__} there")
        into[key] = value if have is None else have + value  # type: ignore[operator]
    return into


def to_plain(values: Mapping[str, Value]) -> dict[str, list[Any]]:
    """The values as lists for JSON; :func:`from_plain` takes them back."""
    return {key: [type(value).__name__, *astuple(value)] for key, value in values.items()}


def from_plain(plain: Mapping[str, list[Any]]) -> dict[str, Value]:
    """What :func:`to_plain` was given."""
    kinds = {kind.__name__: kind for kind in (Mean, Sum, Max, Min, Last)}
    return {key: kinds[kind](*numbers) for key, (kind, *numbers) in plain.items()}


def reduce_metrics(metrics: Mapping[str, Value], *, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Reduce over ranks to plain numbers; the ranks' keys may differ, their union is reported in sorted order.

    Args:
        metrics: this rank's values; empty where another rank reports the same rows.
        group: the ranks that take part; None for this process alone.
    """
    parts: list[Mapping[str, Value]] = [metrics]
    if group is not None and group.size() > 1:
        parts = [{}] * group.size()
        dist.all_gather_object(parts, dict(metrics), group=group)
    totals: dict[str, Value] = {}
    for part in parts:
        merge(totals, part)
    results = {key: totals[key].result for key in sorted(totals)}
    return {key: value for key, value in results.items() if value is not None}
